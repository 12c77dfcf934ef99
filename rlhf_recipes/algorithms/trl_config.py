"""From a recipe's stage section to the TRL config that runs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rlhf_recipes.models.logprobs import Head
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.rollouts.forward import trunk_and_head


@dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's SFTConfig, and where the weights start."""

    from_scratch: bool = field(
        default=False,
        metadata={"help": "Train a new backbone and tokenizer of `model.architecture` instead of continuing `model.path`."},
    )


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's DPOConfig, and how often new pairs are sampled."""

    rounds: int = field(
        default=1,
        metadata={
            "help": "Rounds of pairs and training; from the second on the policy itself is sampled. The labels depend on "
            "the rewards alone, so DPO's optimum at this beta and reference is the same whoever was sampled."
        },
    )


@torch.no_grad()
def balances_experts(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a mixture of experts gives the auxiliary loss that TRL asks for; DeepSeek's routers balance without one."""
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    return getattr(model(input_ids=ids, output_router_logits=True), "aux_loss", None) is not None


def sft_fields(train: Dataset, model: PreTrainedModel | PeftModel, recipe: Recipe) -> dict[str, Any]:
    """What the data and the model ask of TRL's SFT, where the recipe does not say otherwise.

    It trains on completions alone where it finds prompts beside them; we hand it their tokens. Its chunked loss makes logits of
    its own: as Cohere's and Gemma's are, not as Granite's, Falcon-H1's or ModernBERT's, and it fails where a mixture of experts
    has no `num_experts` in its config. It adds an auxiliary loss of routers, which DeepSeek's do not have.

    Raises:
        RecipeError: `completion_only_loss` of data without completions.
    """
    if recipe.stages["sft"].get("completion_only_loss") and "completion" not in train.column_names:
        raise RecipeError(
            f"`sft.completion_only_loss` needs columns `prompt` and `completion`, and load_demonstrations has "
            f"{', '.join(train.column_names)}"
        )
    config = model.config.get_text_config()
    _, head = trunk_and_head(model)
    scale, cap = getattr(config, "logit_scale", None) or 1.0, getattr(config, "final_logit_softcapping", None)
    followed = type(head.embedding) is nn.Linear and head == Head(head.embedding, scale, cap)
    fields: dict[str, Any] = {"completion_only_loss": True} if "completion" in train.column_names else {}
    if getattr(config, "output_router_logits", None) is not None:
        followed = followed and hasattr(config, "num_experts")
        if not balances_experts(model):
            fields["router_aux_loss_coef"] = 0.0
    return fields if followed else fields | {"loss_type": "nll"}


def row_lengths(train: Dataset) -> np.ndarray:
    """Tokens of each row that an SFTTrainer has made; of packed rows, of each of the texts in them."""
    if "input_ids" not in train.column_names:  # `dataset_kwargs` left them as they are
        return np.zeros(1, int)
    column = "seq_lengths" if "seq_lengths" in train.column_names else "input_ids"
    count = pc.list_flatten if column == "seq_lengths" else pc.list_value_length
    tables = train.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([count(table[column]).to_numpy() for table in tables])


def stage_config(config_class: type, recipe: Recipe, section: str, output_dir: Path = Path(), **shared: Any) -> Any:
    """Builds the TRL config of `recipe.<section>` with the shared facts filled in.

    Args:
        config_class: a TRL config class; it checks the values.
        section: "sft", "reward_training", "ppo", ...
        output_dir: a folder that is there; a trainer of a run is told the run's when it has one (Resumable.attach).
        shared: TRL fields owned by another section of the recipe (such as kl_coef for objective.beta).

    Raises:
        RecipeError: with TRL's own words, when TRL refuses the values.
    """
    bfloat16 = recipe.model.dtype == "bfloat16"
    values = {
        "output_dir": str(output_dir),
        "seed": recipe.run.seed,
        "report_to": "none",  # runs/trackers.py logs, under TRL's metric names
        "bf16": bfloat16,  # TRL's default is true whatever the model's dtype
        "use_cpu": not torch.cuda.is_available(),  # else transformers refuses bf16 there
        **shared,
        **recipe.stages[section],
    }
    with refused_by_trl(section):
        config = config_class(**values)
    if getattr(config, "activation_offloading", False) and not torch.cuda.is_available():
        raise RecipeError(
            f"`{section}.activation_offloading` moves activations off a GPU, and this machine has none; leave it out"
        )
    return config


def refuse_unread(trainer: Any, recipe: Recipe, section: str) -> None:
    """
    Raises:
        RecipeError: for a key that only some backbones read, and this one does not.
    """
    if recipe.stages[section].get("router_aux_loss_coef") and not trainer.aux_loss_enabled:
        raise RecipeError(
            f"`{section}.router_aux_loss_coef` has no effect here: `model.path` {recipe.model.path} is no mixture of experts; "
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
