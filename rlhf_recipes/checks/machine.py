"""Checks before a run, from small files alone: no weights are loaded and nothing is written."""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import psutil

from rlhf_recipes.checks.files import (
    _slip_of,
    backbone_of,
    check_architecture,
    check_folder,
    check_lengths,
    check_pad,
    check_run_folder,
)
from rlhf_recipes.checks.memory import BYTES, lengths_known, lora_parameters, memory_warning
from rlhf_recipes.checks.settings import check_settings
from rlhf_recipes.data.pair_files import pairs_file
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import LATEST, Recipe
from rlhf_recipes.recipe.stages import STAGES, Stage
from rlhf_recipes.runs.fingerprint import rewards_of_others


def check(recipe: Recipe, name: str) -> None:
    """Raises RecipeError for the first thing that would stop the stage later, and says what to change."""
    stage = STAGES[name]
    _check_engine(recipe, stage)
    _check_quantization(recipe, stage)
    if not (recipe.folder / "task.py").is_file():
        raise RecipeError(f"{recipe.folder / 'task.py'}: no such file; a recipe's task.py gives its data")
    check_run_folder(recipe, name)
    if not stage.loads_weights:
        return
    if recipe.lora.init_lora_weights is False:
        raise RecipeError(
            "`lora.init_lora_weights` false: B starts at random, and a new policy is not the reference; leave it out"
        )
    section = recipe.stages.get(stage.section, {})
    check_settings(recipe, stage, section)
    _check_machine(stage, section)
    if section.get("from_scratch"):
        check_architecture(recipe)
        return
    check_folder(recipe, "model.path", recipe.model.path, "config.json", "*.safetensors")
    if stage.samples:
        for i, term in enumerate(recipe.reward.all_terms()):
            where = "reward" if recipe.reward.terms is None else f"reward.terms[{i}]"
            if term.adapter:
                check_folder(recipe, f"{where}.adapter", term.adapter, "adapter_config.json", "adapter_model.safetensors")
            if term.model:
                check_folder(recipe, f"{where}.model", term.model, "config.json", "*.safetensors")
        check_lengths(recipe)
    if stage.sampled_pairs and recipe.preferences.path is not None:
        pairs_file(recipe.preferences.path, recipe.folder)
    check_pad(recipe)
    _check_disk(recipe, stage)


def _check_engine(recipe: Recipe, stage: Stage) -> None:
    """FSDP and DeepSpeed."""
    shardable = ", ".join(other.name for other in STAGES.values() if other.shardable)
    for engine in ("FSDP", "DeepSpeed"):
        if not _launched_with(engine):
            continue
        if not stage.shardable:
            raise RecipeError(
                f"launched with {engine}, which takes the backbone's weights apart; {stage.name} samples from adapters on one "
                f"frozen copy of them that every role shares, and their own optimizer state is too small to be worth "
                f"sharding. Launch with accelerate_configs/multi_gpu.yaml (DDP); {shardable} can be sharded"
            )
        if engine == "DeepSpeed" and recipe.run.resume is not None:
            raise RecipeError(
                "--resume: under DeepSpeed no checkpoints are written, since its own are pickled; FSDP 2 has them "
                "(accelerate_configs/fsdp2.yaml)"
            )
        if engine == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
            raise RecipeError("launched with FSDP 1, which is not supported; launch with accelerate_configs/fsdp2.yaml")
        if recipe.stages[stage.section].get("rounds", 1) > 1:
            rounds = f"{stage.section}.rounds"
            raise RecipeError(
                f"`{rounds}` above 1 samples from the policy between its rounds, which {engine} has then taken apart; give "
                f"--{rounds}=1, or launch with accelerate_configs/multi_gpu.yaml (DDP)"
            )


def _check_quantization(recipe: Recipe, stage: Stage) -> None:
    """4-bit layers, and what cannot be done with them."""
    quantization, dtype = recipe.model.quantization, recipe.model.dtype
    if quantization is None or not stage.loads_weights:
        return
    where = f"`model.quantization` {quantization}"
    if stage.writes_model:
        raise RecipeError(
            f"{where}: {stage.name} merges an adapter into the backbone's weights, which 4 bits would round; give "
            f"--model.quantization=null"
        )
    if dtype != "bfloat16":
        raise RecipeError(f"{where} computes in bfloat16, and `model.dtype` is {dtype}; give --model.dtype=bfloat16")
    if _launched_with("FSDP") or _launched_with("DeepSpeed"):
        raise RecipeError(
            f"{where}: 4-bit weights are not taken apart by FSDP or DeepSpeed here; launch with "
            f"accelerate_configs/multi_gpu.yaml (DDP)"
        )
    if not _installed("bitsandbytes"):
        raise RecipeError(f"{where} needs the package bitsandbytes: pip install bitsandbytes")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check_machine(stage: Stage, section: dict[str, Any]) -> None:
    """Keys that this machine, or the way it was launched, leaves without effect."""
    for key in ("use_cpu", "ddp_backend"):
        if key in section and not _launched_with("DeepSpeed"):  # which TRL still starts
            raise RecipeError(
                f"`{stage.section}.{key}` has no effect here: a GPU is used where there is one (CUDA_VISIBLE_DEVICES= hides it)"
                f", and the processes are connected before TRL reads its keys; leave it out"
            )
    if section.get("use_liger_kernel") and not _installed("liger_kernel"):
        raise RecipeError(f"`{stage.section}.use_liger_kernel` needs the package liger-kernel: pip install liger-kernel")
    held_out = stage.held_out_loss and section.get("eval_strategy", "no") != "no"
    if section.get("lr_scheduler_type") == "reduce_lr_on_plateau" and not held_out:
        raise RecipeError(
            f"`{stage.section}.lr_scheduler_type` reduce_lr_on_plateau follows a held-out loss while it trains, which only sft "
            f"with `sft.eval_strategy` steps or epoch has"
        )


def _launched_with(engine: str) -> bool:
    """`accelerate launch` says so in the environment."""
    return os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"


def warnings(recipe: Recipe, name: str, longest: int | None = None) -> list[str]:
    """Whose code is executed, whose reward it is, and what may go wrong by rough estimates; `longest` as in
    `memory_estimate`."""
    stage = STAGES[name]
    found = [f"{key}: code of {path} is executed on this machine" for key, path in _trusted(recipe, stage)]
    found += rewards_of_others(recipe) if stage.samples else []
    own = Path(recipe.path(recipe.model.path)) / "chat_template.jinja"
    if stage.loads_weights and recipe.model.chat_template is None and os.path.isfile(own) and (slip := _slip_of(own)):
        found.append(f"{own}: {slip}; chat messages will be refused")
    if _launched_with("DeepSpeed"):
        found.append("under DeepSpeed no checkpoints are written, since its own are pickled; FSDP 2 has them")
    if stage.loads_weights and lengths_known(recipe, stage, longest):
        found += memory_warning(recipe, name, longest)
    return found


def _trusted(recipe: Recipe, stage: Stage) -> list[tuple[str, str]]:
    """Every model that the stage loads with its own code: (the key that allows it, the model)."""
    if not stage.loads_weights or recipe.stages.get(stage.section, {}).get("from_scratch"):
        return []
    own = [recipe.model.path]
    if stage.judges:  # full models are loaded as the backbone is
        paths = [word.rpartition("=")[2] for word in recipe.evaluate.policies or ()]
        own += [path for path in paths if (Path(recipe.path(path)) / "config.json").is_file()]
    rewards = recipe.reward.all_terms() if stage.samples else []
    return [
        *(("model.trust_remote_code", path) for path in own if recipe.model.trust_remote_code),
        *(("reward.trust_remote_code", term.model) for term in rewards if term.model and term.trust_remote_code),
    ]


def _check_disk(recipe: Recipe, stage: Stage) -> None:
    """Room for what a run writes: about three copies of what it trains, with the optimizer's state for a whole backbone."""
    _, shapes = backbone_of(recipe)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    needed = BYTES[recipe.model.save_dtype] * parameters if stage.writes_model else 0
    needed += 3 * 12 * lora_parameters(recipe, shapes)
    folder = Path(recipe.run.output).resolve()
    if (folder / LATEST).is_dir() and not (folder / LATEST).is_symlink():  # as some copies make of a link
        raise RecipeError(f"{folder / LATEST}: this folder has the name of the link to the newest run; rename or remove it")
    while not folder.exists():
        folder = folder.parent
    free = psutil.disk_usage(str(folder)).free
    if needed > free:
        raise RecipeError(
            f"`run.output` {recipe.run.output}: {stage.name} writes about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} "
            f"MiB are free in {folder}; make room, or choose another place with --run.output"
        )


# --- what --dry-run prints ---------------------------------------------------------------------------------------


def describe(recipe: Recipe, stage: str) -> str:
    """The resolved recipe."""
    lines = [f"# {stage} of {recipe.task}", recipe.to_yaml()]
    if STAGES[stage].merges and recipe.merge.push:
        kind = "private" if recipe.merge.private else "public"
        lines.append(f"# would upload model, tokenizer, generation config and card to {recipe.merge.push}, {kind} if it is new")
    return "\n".join(lines)
