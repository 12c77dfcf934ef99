"""One measurement of benchmarks/compare.py, in a process of its own.

    python -m benchmarks.worker '{"side": "ours", "stage": "ppo", ...}'

Stock is trl 1.12's trainer as its example runs it: LoRA by `peft_config`, a value model and a reward model of their own.
Both sides read the same weights from the same folder.
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import psutil
import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from benchmarks.compare import Work
from rlhf_recipes import roles
from rlhf_recipes.algorithms import experience
from rlhf_recipes.algorithms.dpo import DPOConfig, DPOTrainer, dpo_fields
from rlhf_recipes.algorithms.pairs import tokenize_preferences
from rlhf_recipes.algorithms.ppo_config import PPOConfig, trl_ppo, trl_ppo_trainer
from rlhf_recipes.algorithms.trainer import PPOTrainer
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.tokenizer import end_token_ids, load_tokenizer
from rlhf_recipes.models.adapters import lora_config
from rlhf_recipes.models.classifier import build_classifier
from rlhf_recipes.models.lora import use_lean_lora
from rlhf_recipes.process import configure
from rlhf_recipes.recipe.loading import DEFAULT_RECIPE, load_recipe
from rlhf_recipes.recipe.sections import LoraSection, Recipe
from rlhf_recipes.rewards.adapter import AdapterReward
from rlhf_recipes.rewards.reward import Shared
from rlhf_recipes.rewards.total import Rewards, Term
from rlhf_recipes.roles import Roles, build_roles
from rlhf_recipes.rollouts.lean import LeanSampler
from rlhf_recipes.tasks import load_dataset, load_task

LORA_RANK = 16
LOADING = {"use_safetensors": True, "trust_remote_code": False}


class Stopwatch:
    """Seconds spent in functions, by label; the outermost counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running = False

    def of(self, function: Callable, label: str | Callable[..., str]) -> Callable:
        """`function`, timed; `label` may depend on its arguments."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return function(*args, **kwargs)
            name = label if isinstance(label, str) else label(*args, **kwargs)
            self._running, start = True, _now()
            try:
                return function(*args, **kwargs)
            finally:
                self._running = False
                self.seconds[name] = self.seconds.get(name, 0.0) + _now() - start

        return timed


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory_mb() -> float:
    """The most this process has held: of the GPU's memory where there is one, else of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(work: Work) -> dict[str, Any]:
    """Does the work; see `benchmark.measure` for what is returned."""
    configure(seed=0, onednn=work.onednn)
    if work.threads:
        torch.set_num_threads(work.threads)
    recipe = load_recipe(DEFAULT_RECIPE, _overrides(work))
    baseline = 0.0 if torch.cuda.is_available() else psutil.Process().memory_info().rss / 2**20
    sides = {("ours", "ppo"): _our_ppo, ("stock", "ppo"): _stock_ppo, ("ours", "dpo"): _our_dpo, ("stock", "dpo"): _stock_dpo}
    with tempfile.TemporaryDirectory() as folder:
        result = sides[work.side, work.stage](work, recipe, folder)
    result |= {"samples_per_second": work.batch / result["seconds"], "peak_memory_mb": _memory_mb() - baseline}
    if (work.side, work.stage) == ("ours", "ppo"):
        result["floor_seconds"] = _floor(work, recipe)
    return result


def _overrides(work: Work) -> dict[str, Any]:
    return {
        "model.path": work.model,
        "model.dtype": work.dtype,
        "lora.r": LORA_RANK,
        "data.max_completion_tokens": work.response,
        "run.tracker": "none",
    }


def _prompts(work: Work, recipe: Recipe, tokenizer: Any) -> Any:
    prompts = load_dataset(load_task(recipe), "load_prompts", "train")
    longest = recipe.data.max_prompt_tokens
    return tokenize_prompts(prompts, tokenizer, longest, limit=work.batch * (work.updates + 1), at_least=work.batch)


class Clock(TrainerCallback):
    """Notes when each update ends; the first one warms up, so its phases do not count."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.ends:
            self.stopwatch.seconds.clear()
        self.ends.append(_now())


def _result(clock: Clock, rest: str) -> dict[str, Any]:
    durations = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    phases = {name: seconds / len(durations) for name, seconds in clock.stopwatch.seconds.items()}
    mean = statistics.mean(durations)
    return {"seconds": statistics.median(durations), "phases": phases | {rest: mean - sum(phases.values())}}


def _ppo_values(work: Work, folder: str) -> dict[str, Any]:
    """TRL's fields, the same on both sides; what is not named is TRL's default."""
    return {
        "output_dir": folder, "per_device_train_batch_size": work.batch, "local_rollout_forward_batch_size": work.batch,
        "total_episodes": work.batch * (work.updates + 1), "num_ppo_epochs": work.epochs, "num_mini_batches": 1,
        "response_length": work.response, "temperature": 1.0, "num_sample_generations": 0, "stop_token": "eos",
        "save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def _random_reward(section: LoraSection, shared: Shared) -> Rewards:
    """`load_rewards` with random weights, so that any model can be measured."""
    model = get_peft_model(build_classifier(shared.backbone), lora_config(section, "SEQ_CLS")).requires_grad_(False).eval()
    use_lean_lora(model)
    return Rewards({"reward": Term(AdapterReward(model, shared.ends[:1]))})


def _our_roles(recipe: Recipe) -> Roles:
    with mock.patch.object(roles, "load_rewards", lambda section, shared: _random_reward(recipe.lora, shared)):
        return build_roles(recipe, load_tokenizer(recipe))


def _our_ppo(work: Work, recipe: Recipe, folder: str) -> dict[str, Any]:
    ours = _our_roles(recipe)
    watch = Stopwatch()
    clock = Clock(watch)
    args = PPOConfig(**_ppo_values(work, folder))
    trainer = PPOTrainer(args, ours, _prompts(work, recipe, ours.tokenizer), callbacks=[clock])
    trainer.reward_model.forward = watch.of(trainer.reward_model.forward, "reward")
    with (
        mock.patch.object(trainer, "update", watch.of(trainer.update, "update")),
        mock.patch.object(LeanSampler, "__call__", watch.of(LeanSampler.__call__, "generate")),
        mock.patch.object(experience, "response_forward", watch.of(experience.response_forward, "reference")),
        mock.patch.object(
            experience.PolicyAndValue, "forward", watch.of(experience.PolicyAndValue.forward, "policy and value")
        ),
    ):
        trainer.train()
    return _result(clock, "other")


def _stock_ppo(work: Work, recipe: Recipe, folder: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(recipe)
    path, dtype = recipe.path(work.model), getattr(torch, work.dtype)
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **LOADING)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype, **LOADING) for _ in range(2)
    )
    prompts = _prompts(work, recipe, tokenizer).select_columns(["input_ids"])
    watch = Stopwatch()
    clock = Clock(watch)
    trainer = trl_ppo.PPOTrainer(
        args=trl_ppo.PPOConfig(**_ppo_values(work, folder)), processing_class=tokenizer, model=policy, ref_model=None,
        reward_model=reward, value_model=value, train_dataset=prompts, eval_dataset=prompts, callbacks=[clock],
        peft_config=lora_config(recipe.lora, "CAUSAL_LM"),
    )  # fmt: skip

    def which_model(model: Any, *args: Any) -> str:
        return "value" if model is value else "reward"

    def which_pass(*args: Any) -> str:
        return "update" if torch.is_grad_enabled() else "reference"

    with (
        mock.patch.object(trl_ppo_trainer, "batch_generation", watch.of(trl_ppo_trainer.batch_generation, "generate")),
        mock.patch.object(trl_ppo_trainer, "get_reward", watch.of(trl_ppo_trainer.get_reward, which_model)),
        mock.patch.object(trl_ppo_trainer, "forward", watch.of(trl_ppo_trainer.forward, which_pass)),
    ):
        trainer.train()
    result = _result(clock, "rest")
    result["phases"]["update"] = result["phases"].pop("update", 0.0) + result["phases"].pop("rest")
    return result


# --- the floor ---------------------------------------------------------------------------------------------------


def _floor(work: Work, recipe: Recipe) -> float:
    """Seconds that an update's matrix products alone would take at this machine's best measured rate in this dtype."""
    config = AutoConfig.from_pretrained(recipe.path(work.model), trust_remote_code=False)
    lengths = [len(ids) for ids in _prompts(work, recipe, load_tokenizer(recipe))["input_ids"]]
    batches = [lengths[at : at + work.batch] for at in range(0, len(lengths), work.batch)]
    context = statistics.mean(max(batch) for batch in batches)
    flops = update_flops(config, work.batch, context, work.response, work.epochs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=getattr(torch, work.dtype), device=device) for _ in range(2))
    times = []
    for _ in range(7):
        start = _now()
        a @ b
        times.append(_now() - start)
    return flops * min(times) / (2 * size**3)


def update_flops(config: Any, batch: int, context: float, response: int, epochs: int) -> float:
    """Floating-point operations of the matrix products in one PPO update of a LoRA policy with its value on the trunk.

    A product of [m, k] and [k, n] counts 2 m k n. Forward passes: generation, policy, reference and reward; each epoch one
    forward pass, and one backward pass for activations and adapters (the frozen weights get no gradient).
    """
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = width * heads, width * (getattr(config, "num_key_value_heads", None) or heads)
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), *[(hidden, inner)] * 2, (inner, hidden)]
    weights = layers * sum(a * b for a, b in shapes)
    adapters = layers * LORA_RANK * sum(a + b for a, b in shapes)
    length = context + response
    tokens = batch * length
    attention = 4 * layers * queries * batch * length**2 / 2  # causal
    trunk = 2 * weights * tokens + attention
    head = 2 * config.vocab_size * hidden * batch * response
    lora = 2 * adapters * tokens
    forwards = 4 * trunk + 3 * head + 2 * lora  # generation (merged), policy, reference; the reward has no output embedding
    epoch = 2 * (trunk + head) + attention + 3 * lora
    return forwards + epochs * epoch


# --- DPO ---------------------------------------------------------------------------------------------------------


def _pairs(work: Work, recipe: Recipe) -> Any:
    """Pairs of text: the openings of reviews, each with excerpts of two others, about `response` tokens long."""
    task, count = load_task(recipe), work.batch * (work.updates + 1)
    openings = load_dataset(task, "load_prompts", "train").select(range(count))["prompt"]
    excerpts = load_dataset(task, "load_preferences", "train").filter(lambda row: row["words"] >= 24).select(range(count))
    sides = {side: [" " + " ".join(text.split()[:24]) for text in excerpts[side]] for side in ("chosen", "rejected")}
    return Dataset.from_dict({"prompt": openings[:], **sides})


def _dpo_values(work: Work, recipe: Recipe, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": work.batch, "num_train_epochs": 1, "learning_rate": 1e-4,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1, "bf16": False, "use_cpu": not torch.cuda.is_available(), "beta": recipe.objective.beta,
    }  # fmt: skip


def _our_dpo(work: Work, recipe: Recipe, folder: str) -> dict[str, Any]:
    ours = _our_roles(recipe)
    ends = end_token_ids(ours.tokenizer, recipe.path(recipe.model.path))
    pairs = tokenize_preferences(_pairs(work, recipe), ours.tokenizer, ends, recipe.data)
    args = DPOConfig(**(_dpo_values(work, recipe, folder) | dpo_fields(recipe.objective.beta)))
    return _timed_dpo(lambda: DPOTrainer(args, ours, pairs), work)


def _stock_dpo(work: Work, recipe: Recipe, folder: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe.path(work.model), dtype=getattr(torch, work.dtype), **LOADING)
    args = trl.DPOConfig(**_dpo_values(work, recipe, folder), max_length=recipe.data.max_prompt_tokens + work.response)
    pairs = _pairs(work, recipe)
    return _timed_dpo(
        lambda: trl.DPOTrainer(
            model=model, args=args, train_dataset=pairs, processing_class=tokenizer,
            peft_config=lora_config(recipe.lora, "CAUSAL_LM"),
        ),
        work,
    )  # fmt: skip


def _timed_dpo(build: Callable[[], Any], work: Work) -> dict[str, Any]:
    """Everything from pairs to a trained adapter, the reference's log-probabilities included wherever they are computed."""
    started = _now()
    trainer = build()
    built = _now()
    trainer.train()
    seconds = _now() - started
    steps = trainer.state.global_step
    return {"seconds": seconds / steps, "phases": {"prepare": (built - started) / steps, "train": (_now() - built) / steps}}


if __name__ == "__main__":
    print(json.dumps(run(Work(**json.loads(sys.argv[1])))))
