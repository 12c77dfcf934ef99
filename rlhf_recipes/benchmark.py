"""The same PPO or DPO work done by this repository and by stock TRL, one measurement a process.

Stock is trl 1.12's trainer as its example runs it: LoRA by `peft_config`, a value model and a reward model of their own.
Both sides read the same weights from the same folder.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from rlhf_recipes.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from rlhf_recipes.runtime import progress_bar

LORA_RANK = 16
WIDE = {
    "model_type": "llama", "vocab_size": 151_936, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip


class BenchmarkError(Exception):
    """A measurement's process failed; the message has its last words."""


@dataclass(frozen=True)
class Work:
    """One measurement: who does what on which model."""

    side: str  # "ours" or "stock"
    stage: str  # "ppo" or "dpo"
    model: str  # a folder or a Hub id
    dtype: str  # of the backbone
    batch: int  # episodes, or pairs, an update
    response: int  # tokens
    updates: int  # timed ones; one more warms up
    epochs: int = 4
    threads: int = 0  # 0: all cores
    onednn: bool = True  # matmul.py's products, on machines where they apply


def measure(work: Work) -> dict[str, Any]:
    """Runs `work` in a process of its own.

    Returns:
        seconds (of an update), samples_per_second, peak_memory_mb (above the imports'), phases (seconds of an update),
        context (mean prompt length with padding).
    """
    command = [sys.executable, "-m", "rlhf_recipes.benchmark", json.dumps(asdict(work))]
    done = subprocess.run(  # noqa: S603 - this very module
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    )
    if done.returncode:
        raise BenchmarkError(
            f"{work} ended with exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def compare(works: dict[str, Work], runs: int, title: str) -> dict:
    """Medians over alternating processes of each side, and what ours is in units of stock's."""
    order = [side for _ in range(runs) for side in works]
    measured: dict[str, list[dict]] = {side: [] for side in works}
    for side in progress_bar(order, desc=title):
        measured[side].append(measure(works[side]))
    result: dict = {side: _medians(measurements) for side, measurements in measured.items()}
    numbers = ("samples_per_second", "peak_memory_mb")
    result["ratio"] = {name: result["ours"][name] / result["stock"][name] for name in numbers}
    floors = [m["floor_seconds"] for m in measured["ours"]]
    result["floor_ratio"] = None if floors[0] is None else result["ours"]["seconds"] / statistics.median(floors)
    return result


def _medians(measurements: list[dict]) -> dict:
    names = ("seconds", "samples_per_second", "peak_memory_mb")
    phases = {name: statistics.median(m["phases"][name] for m in measurements) for name in measurements[0]["phases"]}
    return {name: statistics.median(m[name] for m in measurements) for name in names} | {"phases": phases}


def table(results: dict) -> str:
    lines = ["| work | side | samples/s | peak memory, MB | s an update: where |", "| --- | --- | --- | --- | --- |"]
    for name, result in results.items():
        for side in [key for key in result if key not in ("ratio", "floor_ratio")]:
            m = result[side]
            where = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in m["phases"].items() if seconds >= 0.01)
            numbers = f"{m['samples_per_second']:.1f} | {m['peak_memory_mb']:,.0f} | {m['seconds']:.2f}: {where}"
            lines.append(f"| {name} | {side} | {numbers} |")
        speed, memory = result["ratio"]["samples_per_second"], result["ratio"]["peak_memory_mb"]
        floor = "" if result["floor_ratio"] is None else f"{result['floor_ratio']:.1f} times the floor"
        lines.append(f"| {name} | **ours : stock** | **{speed:.1f}x** | **{memory:.2f}x** | {floor} |")
    return "\n".join(lines)


def build_wide(folder: Path) -> None:
    """A model of random weights with a real vocabulary, and imdb's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_RECIPE / "checkpoints" / "backbone")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIDE, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- one measurement ---------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds spent in functions, by label; the outermost counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running = False

    @contextmanager
    def timing(self, label: str):
        if self._running:
            yield
            return
        self._running, start = True, _now()
        try:
            yield
        finally:
            self._running = False
            self.seconds[label] = self.seconds.get(label, 0.0) + _now() - start

    def of(self, function: Callable, label: str | Callable[..., str]) -> Callable:
        """`function`, timed; `label` may depend on its arguments."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(label if isinstance(label, str) else label(*args, **kwargs)):
                return function(*args, **kwargs)

        return timed


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory_mb() -> float:
    """The most this process has held: of the GPU's memory where there is one, else of the machine's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _work(work: Work) -> dict[str, Any]:
    import torch

    import rlhf_recipes.online  # noqa: F401 - both sides pay for the same imports
    from rlhf_recipes.runtime import configure

    configure(seed=0, onednn=work.onednn)
    if work.threads:
        torch.set_num_threads(work.threads)
    folder = tempfile.mkdtemp()
    recipe = load_recipe(DEFAULT_RECIPE, _overrides(work))
    baseline = psutil.Process().memory_info().rss / 2**20 if not torch.cuda.is_available() else 0.0
    try:
        run = {("ours", "ppo"): _our_ppo, ("stock", "ppo"): _stock_ppo, ("ours", "dpo"): _our_dpo, ("stock", "dpo"): _stock_dpo}
        result = run[work.side, work.stage](work, recipe, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    peak = _memory_mb() - baseline
    return (
        result
        | {"floor_seconds": _floor(work, recipe) if work.stage == "ppo" else None}
        | {"samples_per_second": work.batch / result["seconds"], "peak_memory_mb": peak}
    )


def _overrides(work: Work) -> dict[str, Any]:
    return {
        "model.path": work.model,
        "model.dtype": work.dtype,
        "lora.r": LORA_RANK,
        "data.max_completion_tokens": work.response,
        "run.tracker": "none",
        **({"preferences.label": "bradley_terry", "dpo.rounds": 1} if work.stage == "dpo" else {}),
    }


def _prompts(work: Work, recipe: Recipe, tokenizer: Any) -> Any:
    from rlhf_recipes.data import tokenize_prompts
    from rlhf_recipes.tasks import load_dataset, load_task

    prompts = load_dataset(load_task(recipe), "load_prompts", "train")
    longest = recipe.data.max_prompt_tokens
    return tokenize_prompts(prompts, tokenizer, longest, limit=work.batch * (work.updates + 1), at_least=work.batch)


class _Clock:
    """A callback that notes when each update ends."""

    def __new__(cls, stopwatch: Stopwatch) -> Any:
        from transformers import TrainerCallback

        class Clock(TrainerCallback):
            ends: list[float] = []  # noqa: RUF012
            first: dict[str, float] = {}  # noqa: RUF012

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if not self.ends:  # the warm-up's phases do not count
                    stopwatch.seconds.clear()
                self.ends.append(_now())

        return Clock()


def _result(clock: Any, stopwatch: Stopwatch, rest: str) -> dict[str, Any]:
    durations = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    phases = {name: seconds / len(durations) for name, seconds in stopwatch.seconds.items()}
    mean = statistics.mean(durations)
    return {"seconds": statistics.median(durations), "phases": phases | {rest: mean - sum(phases.values())}}


def _ppo_values(work: Work, folder: str) -> dict[str, Any]:
    """TRL's fields, the same on both sides; what is not named is TRL's default."""
    import torch

    return {
        "output_dir": folder, "per_device_train_batch_size": work.batch, "local_rollout_forward_batch_size": work.batch,
        "total_episodes": work.batch * (work.updates + 1), "num_ppo_epochs": work.epochs, "num_mini_batches": 1,
        "response_length": work.response, "temperature": 1.0, "num_sample_generations": 0, "stop_token": "eos",
        "save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def _our_roles(recipe: Recipe) -> Any:
    """The four roles, with a reward adapter of random weights: any model can be measured."""
    from peft import get_peft_model

    from rlhf_recipes.data import load_tokenizer
    from rlhf_recipes.lora import use_lean_lora
    from rlhf_recipes.rewards import AdapterReward
    from rlhf_recipes.roles import Reference, Roles, build_classifier, build_value, load_backbone, lora_config

    tokenizer = load_tokenizer(recipe)
    backbone = load_backbone(recipe)
    scorer = get_peft_model(build_classifier(backbone), lora_config(recipe, "SEQ_CLS")).requires_grad_(False).eval()
    value = build_value(recipe, backbone, "trunk")
    policy = get_peft_model(backbone, lora_config(recipe, "CAUSAL_LM"))
    use_lean_lora(policy)
    use_lean_lora(scorer)
    return Roles(tokenizer, policy, Reference(policy), value, AdapterReward(scorer, tokenizer.pad_token_id))


def _our_ppo(work: Work, recipe: Recipe, folder: str) -> dict[str, Any]:
    from rlhf_recipes import ppo_trainer

    roles = _our_roles(recipe)
    watch = Stopwatch()
    clock = _Clock(watch)
    args = ppo_trainer.PPOConfig(**_ppo_values(work, folder))
    trainer = ppo_trainer.PPOTrainer(args, roles, _prompts(work, recipe, roles.tokenizer), callbacks=[clock])
    trainer.reward_model.forward = watch.of(trainer.reward_model.forward, "reward")
    with (
        mock.patch.object(trainer, "update", watch.of(trainer.update, "update")),
        mock.patch.object(ppo_trainer, "sample_completions", watch.of(ppo_trainer.sample_completions, "generate")),
        mock.patch.object(ppo_trainer, "response_forward", watch.of(ppo_trainer.response_forward, "reference")),
        mock.patch.object(
            ppo_trainer.PolicyAndValue, "forward", watch.of(ppo_trainer.PolicyAndValue.forward, "policy and value")
        ),
    ):
        trainer.train()
    return _result(clock, watch, "other")


def _stock_ppo(work: Work, recipe: Recipe, folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_recipes.data import load_tokenizer
    from rlhf_recipes.ppo_trainer import trl_ppo, trl_ppo_trainer
    from rlhf_recipes.roles import lora_config

    tokenizer = load_tokenizer(recipe)
    path, dtype = recipe.path(work.model), getattr(torch, work.dtype)
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    value, reward = (AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype) for _ in range(2))
    prompts = _prompts(work, recipe, tokenizer).select_columns(["input_ids"])
    watch = Stopwatch()
    clock = _Clock(watch)
    trainer = trl_ppo.PPOTrainer(
        args=trl_ppo.PPOConfig(**_ppo_values(work, folder)), processing_class=tokenizer, model=policy, ref_model=None,
        reward_model=reward, value_model=value, train_dataset=prompts, eval_dataset=prompts, callbacks=[clock],
        peft_config=lora_config(recipe, "CAUSAL_LM"),
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
    result = _result(clock, watch, "rest")
    result["phases"]["update"] = result["phases"].pop("update", 0.0) + result["phases"].pop("rest")
    return result


# --- the floor ---------------------------------------------------------------------------------------------------


def _floor(work: Work, recipe: Recipe) -> float:
    """Seconds that an update's matrix products alone would take at this machine's best measured rate in this dtype."""
    import torch
    from transformers import AutoConfig

    from rlhf_recipes.data import load_tokenizer

    config = AutoConfig.from_pretrained(recipe.path(work.model))
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
    from datasets import Dataset

    from rlhf_recipes.tasks import load_dataset, load_task

    task, count = load_task(recipe), work.batch * (work.updates + 1)
    openings = load_dataset(task, "load_prompts", "train").select(range(count))["prompt"]
    excerpts = load_dataset(task, "load_preferences", "train").filter(lambda row: row["words"] >= 24).select(range(count))
    sides = {side: [" " + " ".join(text.split()[:24]) for text in excerpts[side]] for side in ("chosen", "rejected")}
    return Dataset.from_dict({"prompt": openings[:], **sides})


def _dpo_values(work: Work, folder: str) -> dict[str, Any]:
    import torch

    return {
        "output_dir": folder, "per_device_train_batch_size": work.batch, "num_train_epochs": 1, "learning_rate": 1e-4,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1, "bf16": False, "use_cpu": not torch.cuda.is_available(), "beta": 0.1,
    }  # fmt: skip


def _our_dpo(work: Work, recipe: Recipe, folder: str) -> dict[str, Any]:
    from rlhf_recipes.configs import DPOConfig
    from rlhf_recipes.dpo_trainer import DPOTrainer, dpo_fields
    from rlhf_recipes.preferences import tokenize_preferences

    roles = _our_roles(recipe)
    pairs = tokenize_preferences(_pairs(work, recipe), roles.tokenizer, recipe)
    args = DPOConfig(**(_dpo_values(work, folder) | dpo_fields(recipe)))
    return _timed_dpo(lambda: DPOTrainer(args, roles, pairs), work)


def _stock_dpo(work: Work, recipe: Recipe, folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from rlhf_recipes.data import load_tokenizer
    from rlhf_recipes.roles import lora_config

    tokenizer = load_tokenizer(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe.path(work.model), dtype=getattr(torch, work.dtype))
    args = DPOConfig(**_dpo_values(work, folder), max_length=recipe.data.max_prompt_tokens + work.response)
    pairs = _pairs(work, recipe)
    return _timed_dpo(
        lambda: DPOTrainer(
            model=model, args=args, train_dataset=pairs, processing_class=tokenizer,
            peft_config=lora_config(recipe, "CAUSAL_LM"),
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
    print(json.dumps(_work(Work(**json.loads(sys.argv[1])))))
