"""From a recipe's stage section to the TRL config that runs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rlhf_recipes.recipe.errors import RecipeError


@torch.no_grad()
def balances_experts(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a mixture of experts gives the auxiliary loss that TRL asks for; DeepSeek's routers balance without one."""
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    return getattr(model(input_ids=ids, output_router_logits=True), "aux_loss", None) is not None


def stage_config(
    config_class: type, section: str, given: dict[str, Any], seed: int, dtype: str, output_dir: Path = Path(), **shared: Any
) -> Any:
    """Builds the TRL config of a stage's section with the facts that stages share filled in.

    Args:
        config_class: a TRL config class; it checks the values.
        section: "sft", "reward_training", "ppo", ...
        given: the section's keys and values.
        dtype: the backbone's.
        output_dir: a folder that is there; a trainer of a run is told the run's when it has one (Resumable.attach).
        shared: TRL fields owned by another section of the recipe (such as kl_coef for objective.beta).

    Raises:
        RecipeError: with TRL's own words, when TRL refuses the values.
    """
    values = {
        "output_dir": str(output_dir),
        "seed": seed,
        "report_to": "none",  # runs/trackers.py logs, under TRL's metric names
        "bf16": dtype == "bfloat16",  # TRL's default is true whatever the model's dtype
        "use_cpu": not torch.cuda.is_available(),  # else transformers refuses bf16 there
        **shared,
        **given,
    }
    with refused_by_trl(section):
        config = config_class(**values)
    if getattr(config, "activation_offloading", False) and not torch.cuda.is_available():
        raise RecipeError(
            f"`{section}.activation_offloading` moves activations off a GPU, and this machine has none; leave it out"
        )
    return config


def refuse_unread(trainer: Any, section: str, given: dict[str, Any], backbone: str) -> None:
    """
    Args:
        given: the section's keys and values.
        backbone: `model.path`.

    Raises:
        RecipeError: for a key that only some backbones read, and this one does not.
    """
    if given.get("router_aux_loss_coef") and not trainer.aux_loss_enabled:
        raise RecipeError(
            f"`{section}.router_aux_loss_coef` has no effect here: `model.path` {backbone} is no mixture of experts; "
            f"leave it out"
        )


@contextmanager
def refused_by_trl(section: str) -> Iterator[None]:
    """While this lasts, TRL looks at a section's values: some as its config is built, some as its trainer is.

    Raises:
        RecipeError: with TRL's own words.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError, OSError) as error:
        raise RecipeError(f"`{section}`: TRL refuses these values: {error}") from error
