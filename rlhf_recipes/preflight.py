"""Checks before a run, from small files alone: no weights are loaded and nothing is written."""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import psutil

from rlhf_recipes.recipe import Recipe, RecipeError, nearest, section_of

_CHUNK_TOKENS = 512
# TRL finds out about others at the first step only
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
BEST_BY = ("objective", "reward", "gold")  # of evaluation.Completions.means
_COUNTS = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "num_ppo_epochs", "total_episodes",
    "local_rollout_forward_batch_size", "rounds", "kl_horizon", "reference_sync_steps",
}  # fmt: skip
ENGINES_FOR = ("sft", "reward", "dpo")  # the stages that FSDP 2 and DeepSpeed can shard
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check(recipe: Recipe, stage: str) -> None:
    """Raises RecipeError for the first thing that would stop `stage` later, and says what to change."""
    _check_engine(recipe, stage)
    if not (recipe.folder / "task.py").is_file():
        raise RecipeError(f"{recipe.folder / 'task.py'}: no such file; a recipe's task.py gives its data")
    if recipe.run.name == "latest":
        raise RecipeError("`run.name` latest: the link to the newest run has this name; choose another")
    if recipe.evaluate.exact and recipe.objective.beta == 0 and stage == "evaluate":
        raise RecipeError("`evaluate.exact` divides by `objective.beta`, which is 0")
    if stage == "report":  # loads no weights
        return
    section = recipe.stages.get(section_of(stage), {})
    if stage == "sft" and section.get("from_scratch"):
        _check_architecture(recipe)
        return
    _check_folder(recipe, "model.path", recipe.model.path, "config.json")
    if stage not in ("sft", "reward"):
        for term in recipe.reward.all_terms():
            if term.adapter:
                _check_folder(recipe, "reward.adapter", term.adapter, "adapter_config.json")
            if term.model:
                _check_folder(recipe, "reward.model", term.model, "config.json")
        _check_lengths(recipe)
    for key in _COUNTS & section.keys():
        if section[key] is not None and section[key] < 1:
            raise RecipeError(f"`{section_of(stage)}.{key}`: expected at least 1, got {section[key]}")
    if stage in ("ppo", "a2c"):
        _check_online(recipe, stage, section)
    if stage == "dpo":
        _check_dpo(recipe)
    _check_pad(recipe)
    _check_disk(recipe, stage)


def _check_engine(recipe: Recipe, stage: str) -> None:
    """FSDP and DeepSpeed, which `accelerate launch` announces in the environment."""
    for engine, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "false").lower() != "true":
            continue
        if stage not in ENGINES_FOR:
            raise RecipeError(
                f"launched with {engine}, which takes the backbone's weights apart; {stage} samples from adapters on one "
                f"frozen copy of them that every role shares, and their own optimizer state is too small to be worth "
                f"sharding. Launch with accelerate_configs/multi_gpu.yaml (DDP); {', '.join(ENGINES_FOR)} can be sharded"
            )
        if engine == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
            raise RecipeError("launched with FSDP 1, which is not supported; launch with accelerate_configs/fsdp2.yaml")
        if stage == "dpo" and recipe.stages["dpo"].get("rounds", 1) > 1:
            raise RecipeError(
                f"`dpo.rounds` above 1 samples from the policy between trainings, which {engine} has then taken apart; give "
                f"--dpo.rounds=1, or launch with accelerate_configs/multi_gpu.yaml (DDP)"
            )


def _check_architecture(recipe: Recipe) -> None:
    missing = {"model_type", "vocab_size"} - set(recipe.model.architecture or {})
    if missing:
        raise RecipeError(f"`sft.from_scratch` needs `model.architecture` with {', '.join(sorted(missing))}")


def _check_folder(recipe: Recipe, key: str, value: str, file: str) -> None:
    """A path whose first part is a folder beside the recipe, or that starts with . or /, is meant as a folder."""
    resolved = Path(recipe.path(value))
    first = value.split("/")[0]
    local = (
        value.startswith((".", "/", "~")) or value.count("/") > 1 or (recipe.folder / first).exists() or Path(first).exists()
    )
    if resolved.exists() and not (resolved / file).is_file():
        raise RecipeError(f"`{key}` {value}: the folder {resolved} has no {file}")
    if not resolved.exists() and local:
        raise RecipeError(f"`{key}` {value}: no such folder, neither beside the recipe ({recipe.folder}) nor here")


def _local_json(recipe: Recipe, name: str) -> dict[str, Any]:
    file = Path(recipe.path(recipe.model.path)) / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _check_lengths(recipe: Recipe) -> None:
    room = _local_json(recipe, "config.json").get("max_position_embeddings", math.inf)
    prompt, completion = recipe.data.max_prompt_tokens, recipe.data.max_completion_tokens
    if prompt + completion > room:
        raise RecipeError(
            f"`data.max_prompt_tokens` {prompt} + `data.max_completion_tokens` {completion} exceed the {room} tokens "
            f"that {recipe.model.path} reads; lower one of them"
        )


def _check_dpo(recipe: Recipe) -> None:
    if recipe.objective.beta == 0:
        raise RecipeError(
            "`objective.beta` 0: DPO cannot do without the leash: its loss is a function of beta * log(pi / pi_ref), which "
            "is then zero for every policy. scripts/ppo.py and scripts/a2c.py can"
        )
    if recipe.sampling.temperature != 1:
        raise RecipeError(
            f"`sampling.temperature` {recipe.sampling.temperature}: DPO's loss reads log pi at temperature 1, so its pairs "
            f"must be sampled there"
        )
    dpo = recipe.stages["dpo"]
    for loss in dpo.get("loss_type", []):
        if loss not in DPO_LOSSES:
            raise RecipeError(f"`dpo.loss_type`: {loss!r} is none of TRL's losses{nearest(loss, DPO_LOSSES)}")
    pairs = recipe.preferences
    to_be_made = pairs.source == "sampled" and pairs.path is None
    if to_be_made and pairs.label == "expected" and dpo.get("loss_type", ["sigmoid"]) != ["sigmoid"]:
        raise RecipeError("`preferences.label` expected is a smoothing of the labels that only `dpo.loss_type` [sigmoid] has")
    if "exo_pair" in dpo.get("loss_type", []) and not dpo.get("label_smoothing"):
        raise RecipeError("`dpo.loss_type` exo_pair needs a `dpo.label_smoothing` above 0; its paper recommends 1e-3")
    divergence = dpo.get("f_divergence_type", "reverse_kl")
    if divergence not in F_DIVERGENCES:
        raise RecipeError(f"`dpo.f_divergence_type`: {divergence!r} is none of TRL's{nearest(divergence, F_DIVERGENCES)}")
    if recipe.preferences.source == "task" and dpo.get("rounds", 1) > 1:
        raise RecipeError("`dpo.rounds` samples new pairs, but `preferences.source` is `task`; use one of the two")
    if recipe.preferences.path is not None:
        _check_folder(recipe, "preferences.path", recipe.preferences.path, "pairs.jsonl")


def _check_online(recipe: Recipe, stage: str, section: dict[str, Any]) -> None:
    per_device = section.get("per_device_train_batch_size", 8)
    local = per_device * section.get("gradient_accumulation_steps", 1)
    minibatches = section.get("num_mini_batches", 1)
    if local % minibatches:
        raise RecipeError(
            f"`{stage}.num_mini_batches` {minibatches} does not divide the {local} episodes of a process "
            f"(per_device_train_batch_size x gradient_accumulation_steps)"
        )
    _check_held_out(recipe, stage, section)
    if section.get("reward_baseline") and not any(term.adapter for term in recipe.reward.all_terms()):
        raise RecipeError(
            f"`{stage}.reward_baseline` reads unfinished text, which a reward adapter can; `reward` has none: give "
            f"--{stage}.reward_baseline=false"
        )
    if section.get("loop") == "trl":
        _check_trl_loop(recipe, stage, section)
    _check_leash(recipe, stage, section, local)
    if section.get("whiten_rewards"):
        if local // minibatches < 8:
            raise RecipeError(f"`{stage}.whiten_rewards` needs minibatches of at least 8 episodes, not {local // minibatches}")
        for key in ("full_kl", "kl_loss", "reward_baseline"):
            if section.get(key):
                raise RecipeError(
                    f"`{stage}.{key}` is in units of the reward, which `{stage}.whiten_rewards` changes; drop one"
                )


def _check_leash(recipe: Recipe, stage: str, section: dict[str, Any], episodes: int) -> None:
    """How the KL is charged, and to whom."""
    beta, target = recipe.objective.beta, section.get("kl_target")
    if section.get("full_kl") and section.get("kl_loss"):
        raise RecipeError(f"`{stage}.full_kl` and `{stage}.kl_loss` are two ways to put the KL into the loss; give one of them")
    for key in ("kl_target", "target_kl"):
        if section.get(key) is not None and section[key] <= 0:
            raise RecipeError(f"`{stage}.{key}`: expected more than 0 nats, got {section[key]}")
    if target is not None and beta == 0:
        raise RecipeError(f"`{stage}.kl_target` multiplies `objective.beta`, which is 0; start from a small one such as 0.01")
    if target is not None and section.get("kl_horizon", 10000) < episodes:
        raise RecipeError(
            f"`{stage}.kl_horizon` {section.get('kl_horizon', 10000)}: beta would jump; expected at least the {episodes} "
            f"episodes of one update"
        )
    if section.get("reference") == "none" and (beta != 0 or section.get("full_kl") or section.get("kl_loss")):
        raise RecipeError(
            f"`{stage}.reference` none: without a reference there is no KL to charge; say so with --objective.beta=0 and "
            f"without full_kl and kl_loss, or keep the reference"
        )


def _check_held_out(recipe: Recipe, stage: str, section: dict[str, Any]) -> None:
    """Evaluation during training, and what is kept by it."""
    if section.get("eval_strategy") not in (None, "no", "steps"):
        raise RecipeError(
            f"`{stage}.eval_strategy` {section['eval_strategy']}: PPO counts updates, not epochs; use steps or no"
        )
    evaluates = section.get("eval_strategy") == "steps"
    action = recipe.watch.on_over_optimisation
    if action != "warn" and not evaluates:
        raise RecipeError(f"`watch.on_over_optimisation` {action} needs `{stage}.eval_strategy` steps and `{stage}.eval_steps`")
    if action == "rollback" and section.get("metric_for_best_model", "gold") != "gold":
        raise RecipeError(
            f"`watch.on_over_optimisation` rollback ends with the best policy by gold, and `{stage}.metric_for_best_model` "
            f"says {section['metric_for_best_model']}; leave that out"
        )
    if evaluates and (section.get("eval_steps") is None or section["eval_steps"] < 1 or section["eval_steps"] % 1):
        raise RecipeError(f"`{stage}.eval_steps`: expected a whole number of updates, got {section.get('eval_steps')}")
    best = section.get("metric_for_best_model")
    if best is not None and best not in BEST_BY:
        raise RecipeError(f"`{stage}.metric_for_best_model`: {best!r} is none of {', '.join(BEST_BY)}{nearest(best, BEST_BY)}")
    for key in ("metric_for_best_model", "load_best_model_at_end"):
        if section.get(key) and not evaluates:
            raise RecipeError(f"`{stage}.{key}` needs `{stage}.eval_strategy` steps and `{stage}.eval_steps`")
    if section.get("load_best_model_at_end") and best is None:
        raise RecipeError(f"`{stage}.load_best_model_at_end` needs `{stage}.metric_for_best_model`, such as objective")


def _check_trl_loop(recipe: Recipe, stage: str, section: dict[str, Any]) -> None:
    """TRL's own loop would accept and ignore what it does not know."""
    reward, (term, *others) = recipe.reward, recipe.reward.all_terms()
    if others or not term.adapter or term.weight != 1 or reward.normalize or reward.clip or reward.length_penalty:
        raise RecipeError(
            f"`{stage}.loop` trl: TRL's own loop knows one reward model and `reward.missing_eos_penalty` alone; give one "
            f"`reward.adapter`, without weight, normalize, clip and length_penalty"
        )
    off = {
        "full_kl": False, "reward_baseline": False, "max_grad_norm": 0, "whiten_advantages": True, "eval_strategy": "no",
        "eval_on_start": False, "kl_loss": False, "kl_target": None, "target_kl": None, "reference": "frozen",
    }  # fmt: skip
    unknown = [key for key, value in off.items() if section.get(key, value) != value]
    if unknown:
        switches = " ".join(f"--{stage}.{key}={str(off[key]).lower()}" for key in unknown)
        raise RecipeError(f"`{stage}.loop` trl: TRL's own loop does not know {', '.join(unknown)}; switch off: {switches}")
    if section.get("value") == "trunk":
        raise RecipeError(f"`{stage}.loop` trl runs the value function as a model of its own: `{stage}.value` must be adapter")


def _check_pad(recipe: Recipe) -> None:
    config = _local_json(recipe, "tokenizer_config.json")
    pad, eos = config.get("pad_token"), config.get("eos_token")
    if config and (pad is None or pad == eos):
        raise RecipeError(
            f"the tokenizer of `model.path` {recipe.model.path} has the pad token {pad!r} and the eos token {eos!r}; "
            f"pad must exist and differ from eos: PPO finds a response's end by its first pad"
        )


def warnings(recipe: Recipe, stage: str) -> list[str]:
    """What may go wrong, by rough estimates."""
    estimate = None if stage == "report" else memory_estimate(recipe, stage)
    needed, free = sum((estimate or {}).values()), psutil.virtual_memory().available
    if needed <= free:
        return []
    return [
        f"{stage} needs about {needed / 2**30:.1f} GiB and this machine has {free / 2**30:.1f} GiB free; if no GPU "
        f"holds it, lower the batch size, `data.max_completion_tokens` or `lora.r`, or use `model.dtype` bfloat16"
    ]


def _check_disk(recipe: Recipe, stage: str) -> None:
    """Room for what a run writes: about three copies of what it trains, with the optimizer's state for a whole backbone."""
    _, shapes = _backbone(recipe)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    from_scratch = stage == "sft" and recipe.stages["sft"].get("from_scratch")
    needed = 16 * parameters if from_scratch else _BYTES[recipe.model.save_dtype] * parameters if stage == "sft" else 0
    needed += 3 * 12 * _lora_parameters(recipe, shapes)
    folder = Path(recipe.run.output).resolve()
    while not folder.exists():
        folder = folder.parent
    free = psutil.disk_usage(str(folder)).free
    if needed > free:
        raise RecipeError(
            f"`run.output` {recipe.run.output}: {stage} writes about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are "
            f"free in {folder}; make room, or choose another place with --run.output"
        )


def _lora_parameters(recipe: Recipe, shapes: dict[str, list[int]]) -> int:
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name and "head" not in name]
    return recipe.lora.r * sum(sum(shape) for shape in matrices)


# --- what --dry-run prints ---------------------------------------------------------------------------------------


def describe(recipe: Recipe, stage: str) -> str:
    """The resolved recipe and the memory estimate."""
    lines = [f"# {stage} of {recipe.task}", recipe.to_yaml(), f"# memory of {stage}, estimated"]
    if stage == "report":
        return "\n".join([*lines, "  little: a report loads no weights"])
    estimate = memory_estimate(recipe, stage)
    if estimate is None:
        lines.append(f"unknown: {recipe.model.path} is not on this machine")
    else:
        lines += [f"  {part:<34}{size / 2**20:>10,.0f} MiB" for part, size in estimate.items()]
        lines.append(f"  {'sum':<34}{sum(estimate.values()) / 2**20:>10,.0f} MiB")
        lines.append(f"  {'free memory of this machine':<34}{psutil.virtual_memory().available / 2**20:>10,.0f} MiB")
    return "\n".join(lines)


def memory_estimate(recipe: Recipe, stage: str) -> dict[str, float] | None:
    """Bytes by part; None where the backbone is not on this machine.

    Weights are exact (from the safetensors header). A trained parameter costs 16 bytes: weight, gradient and AdamW's two
    moments in float32. Activations are about 16 hidden vectors a layer and token, logits three float32 copies a token.
    """
    config, shapes = _backbone(recipe)
    if not shapes:
        return None
    weight_bytes = _BYTES[recipe.model.dtype]
    parameters = sum(math.prod(shape) for shape in shapes.values())
    lora = _lora_parameters(recipe, shapes)
    section = recipe.stages.get(section_of(stage), {})
    trains = section_of(stage) in recipe.stages
    batch = section.get("per_device_train_batch_size", 8) if trains else recipe.evaluate.batch_size
    from_scratch = stage == "sft" and section.get("from_scratch")
    if stage in ("sft", "reward"):
        tokens = predicted = section.get("max_length") or 1024
    else:
        tokens, predicted = recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens, recipe.data.max_completion_tokens
    layers, hidden = config.get("num_hidden_layers", 12), config.get("hidden_size", 768)
    vocabulary = 1 if stage == "reward" else config.get("vocab_size", 32000)
    logits = batch * predicted if stage in ("sft", "dpo") else max(batch, _CHUNK_TOKENS)  # others keep one step's or chunk's
    return {
        "imports (torch, transformers, trl)": 700 * 2**20,
        "backbone, once for all roles": parameters * (16 if from_scratch else weight_bytes),
        "trained adapters with optimizer": 0 if from_scratch else (16 if trains else 4) * lora,
        "activations": 16 * weight_bytes * batch * tokens * layers * hidden,
        "logits": 3 * 4 * logits * vocabulary,
    }


def _backbone(recipe: Recipe) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The config and the shapes of all weights; ({}, {}) where they are not on this machine."""
    folder = Path(recipe.path(recipe.model.path))
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return _local_json(recipe, "config.json"), shapes
