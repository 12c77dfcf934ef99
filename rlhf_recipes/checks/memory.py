"""How much memory a stage needs, from config.json alone."""

import math
from pathlib import Path

import psutil

from rlhf_recipes.checks.files import backbone_of, shapes_of
from rlhf_recipes.checks.sizes import sizes_of
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.recipe.stages import STAGES, Stage

CHUNK_TOKENS = 512
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BYTES_OF_4BIT = (
    4 + 0.127
) / 8  # with the blocks' scales, doubly quantised: Dettmers et al. 2023 (arXiv 2305.14314), section 3


def memory_warning(recipe: Recipe, name: str, longest: int | None = None) -> list[str]:
    """A line where the machine has less free memory than the stage needs by `memory_estimate`."""
    estimate = memory_estimate(recipe, name, longest, cpu=not has_gpu())
    needed, free = sum((estimate or {}).values()), psutil.virtual_memory().available
    if needed <= free:
        return []
    return [
        f"{name} needs about {needed / 2**30:.1f} GiB and this machine has {free / 2**30:.1f} GiB free; if no GPU "
        f"holds it, lower the batch size, `data.max_completion_tokens` or `lora.r`, or use `model.dtype` bfloat16"
    ]


def lora_parameters(recipe: Recipe, shapes: dict[str, list[int]]) -> int:
    return recipe.lora.r * sum(map(sum, matrices(shapes)))


def matrices(shapes: dict[str, list[int]]) -> list[list[int]]:
    """Of the linear layers that get adapters; 4 bits are for these too."""
    return [shape for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name and "head" not in name]


def describe_memory(recipe: Recipe, name: str, longest: int | None = None) -> str:
    """The memory estimate.

    Args:
        longest: tokens of the longest row that a supervised stage trains on, where that is known.
    """
    lines, stage = [f"# memory of {name}, estimated"], STAGES[name]
    if not stage.loads_weights:
        return "\n".join([*lines, "  little: a report loads no weights"])
    estimate = memory_estimate(recipe, name, longest, cpu=not has_gpu())
    if estimate is None:
        return "\n".join([*lines, f"unknown: {recipe.model.path} is not on this machine"])
    lines += [f"  {part:<34}{size / 2**20:>10,.0f} MiB" for part, size in estimate.items()]
    title = "sum" if lengths_known(recipe, stage, longest) else "sum, at most"
    lines.append(f"  {title:<34}{sum(estimate.values()) / 2**20:>10,.0f} MiB")
    lines.append(f"  {'free memory of this machine':<34}{psutil.virtual_memory().available / 2**20:>10,.0f} MiB")
    if not lengths_known(recipe, stage, longest):
        tokens = row_tokens(recipe, stage, None)
        lines.append(f"  for rows of {tokens} tokens, the most that `{stage.section}.max_length` lets be")
    return "\n".join(lines)


def has_gpu() -> bool:
    """Whether the system names one of NVIDIA's; torch would take seconds to ask."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def lengths_known(recipe: Recipe, stage: Stage, longest: int | None) -> bool:
    """Of the rows that are trained on; packed rows are full."""
    return not stage.supervised or longest is not None or bool(recipe.stages[stage.section].get("packing"))


def row_tokens(recipe: Recipe, stage: Stage, longest: int | None) -> int:
    """Of the longest row in a batch."""
    if not stage.supervised:
        return recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens
    section = recipe.stages[stage.section]
    most = section.get("max_length", 1024)
    if section.get("packing") or longest is None:  # packed rows are full
        return most or longest or 1024
    return min(longest, most or longest)


def memory_estimate(recipe: Recipe, name: str, longest: int | None = None, cpu: bool = False) -> dict[str, float] | None:
    """Bytes by part; None where the backbone is not on this machine.

    Weights are exact (from the safetensors header). A trained parameter costs 16 bytes: weight, gradient and AdamW's two
    moments in float32. What a layer keeps of a token for its backward pass is about 9 hidden vectors and 4 of the feed-forward
    layer's (2 where it has no gate), with eager attention also a weight for each head and token; counted with
    torch.autograd.graph.saved_tensors_hooks on Llama. With gradient checkpointing it is one vector a layer, and all of that of
    the layer at work; without training that alone. Logits are three float32 copies a token. Pairs count twice.

    Args:
        longest: tokens of the longest row that a supervised stage trains on; by default all that its `max_length` lets be.
        cpu: the process keeps about as much again as a backward pass needs, since pieces of memory of all sizes are freed and
            asked for in between (measured with glibc on recipes/imdb); a GPU's allocator rounds sizes.
    """
    config, shapes = backbone_of(recipe)
    if not shapes:
        return None
    weight_bytes = BYTES[recipe.model.dtype]
    parameters = sum(math.prod(shape) for shape in shapes.values())
    backbone: float = parameters * weight_bytes
    if recipe.model.quantization is not None:
        backbone -= (weight_bytes - _BYTES_OF_4BIT) * sum(map(math.prod, matrices(shapes)))
    lora = lora_parameters(recipe, shapes)
    stage = STAGES[name]
    section = recipe.stages.get(stage.section, {})
    from_scratch = section.get("from_scratch")
    batch = section.get("per_device_train_batch_size", 8) if stage.trains else recipe.evaluate.batch_size
    if stage.online:
        episodes = batch * section.get("gradient_accumulation_steps", 1)
        batch = min(batch, math.ceil(episodes / section.get("num_mini_batches", 1)))
    batch = 10 if stage.merges else batch  # prompts that are compared
    rows, tokens = 2 * batch if stage.pairs else batch, row_tokens(recipe, stage, longest)
    size = sizes_of(config)
    a_layer = 9 * size.hidden + (4 if any("gate" in name for name in shapes) else 2) * size.inner
    a_layer += size.heads * tokens if recipe.model.attention == "eager" else 0
    recomputed = stage.trains and not stage.online and section.get("gradient_checkpointing", True)
    kept = (a_layer + size.layers * size.hidden if recomputed else size.layers * a_layer) if stage.trains else a_layer
    whole = stage.logits == "batch" or section.get("loss_type") in ("nll", "dft")  # others: one step's or chunk's
    logits = rows * tokens if whole else max(batch, CHUNK_TOKENS)
    estimate = {
        "imports (torch, transformers, trl)": 650 * 2**20,
        "backbone, once for all roles": 16 * parameters if from_scratch else backbone,
        "trained adapters with optimizer": 0 if from_scratch else (16 if stage.trains else 4) * lora,
        "activations": weight_bytes * rows * tokens * kept * (2 if cpu and stage.trains else 1),
        "logits": 3 * 4 * logits * (1 if stage.logits == "none" else size.vocabulary),
    }
    if stage.samples:
        foreign = [term.model for term in recipe.reward.all_terms() if term.model]
        if foreign:
            weights = sum(math.prod(shape) for path in foreign for shape in shapes_of(recipe, path).values())
            estimate["reward models of their own"] = weight_bytes * weights
        if stage.online:
            at_once = section.get("local_rollout_forward_batch_size", 64)
        else:
            at_once = getattr(recipe, stage.samples).batch_size
        width = size.head_width * size.key_heads
        estimate["keys and values while sampling"] = 2 * weight_bytes * at_once * tokens * size.layers * width
    return estimate
