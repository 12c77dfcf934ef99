"""Policy, reference, value and reward on ONE frozen backbone.

The backbone's weights are in memory once. Every role is those weights plus something small of its own: the policy a LoRA
adapter, the reference nothing (the policy with its adapters off), the value a head on the policy's trunk or a LoRA adapter
and head, the reward a LoRA adapter and score head. Sharing frozen tensors is safe: no optimizer touches them.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data.tokenizer import Ends, load_ends
from rlhf_recipes.models.adapters import loading_adapter, with_new_adapter, with_saved_adapter
from rlhf_recipes.models.backbone import (
    keep_in_evaluation,
    load_backbone,
    loading_fields,
    pretrained,
    safetensors_only,
    shared_copy,
)
from rlhf_recipes.models.lora import use_lean_lora
from rlhf_recipes.models.reference import Reference
from rlhf_recipes.models.value import ValueHead, build_value
from rlhf_recipes.recipe.errors import RecipeError, loading
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.rewards.total import Rewards, load_rewards


@dataclass
class Roles:
    """The four roles of RLHF, and what they share.

    backbone: without any adapter; modules of its own over the very same weights.
    ends, length, temperature: where a completion ends, at the latest after how many tokens, and at what it is sampled.
    """

    tokenizer: PreTrainedTokenizerBase
    policy: PeftModel
    reference: Reference
    value: ValueHead
    reward: Rewards
    backbone: PreTrainedModel
    ends: Ends
    length: int
    temperature: float


def build_roles(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, value: str = "trunk") -> Roles:
    """All four roles over one load of the backbone, the policy a new adapter, at which it equals the reference exactly.

    Args:
        value: "trunk" or "adapter".
    """
    backbone = keep_in_evaluation(load_backbone(recipe))
    reward = load_rewards(recipe, backbone, tokenizer)
    torch.manual_seed(recipe.run.seed)  # the same start whatever was built before, here and below
    value_role = build_value(recipe, backbone, value)
    torch.manual_seed(recipe.run.seed)
    policy = with_new_adapter(shared_copy(backbone), recipe, "CAUSAL_LM")
    use_lean_lora(policy)
    ends = load_ends(tokenizer, recipe.path(recipe.model.path), recipe.sampling.stop)
    length, temperature = recipe.data.max_completion_tokens, recipe.sampling.temperature
    return Roles(tokenizer, policy, Reference(policy), value_role, reward, backbone, ends, length, temperature)


def load_policy_adapter(backbone: PreTrainedModel, folder: Path, recipe: Recipe) -> PeftModel:
    """A policy of its own over the weights of `backbone`: any LoRA that PEFT loads, however it was made.

    Raises:
        RecipeError: it is no LoRA, a reward's, or does not fit the backbone.
    """
    with loading(str(folder)):
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("task_type") == "SEQ_CLS":  # PEFT would load it into a policy without a word
        raise RecipeError(f"{folder}: an adapter of a reward model, not of a policy")
    if config.get("peft_type") != "LORA":
        raise RecipeError(f"{folder}: an adapter of the type {config.get('peft_type')}; policies here are LoRA adapters")
    if config.get("alora_invocation_tokens"):
        raise RecipeError(f"{folder}: an activated LoRA, which adapts a part of each text; policies here adapt all of it")
    shares = config.get("bias", "none") == "none" and config.get("init_lora_weights", True) in (True, False, "gaussian")
    with loading_adapter(str(folder), recipe):
        shares = shares and not _holds_backbone(folder, config.get("modules_to_save") or [])
        own = shared_copy(backbone) if shares else copy.deepcopy(backbone)  # others change the backbone's weights as they load
        return with_saved_adapter(own, folder).eval()


def _holds_backbone(folder: Path, modules_to_save: list[str]) -> bool:
    """Whether weights of the backbone's own were saved with an adapter, as PEFT's `save_embedding_layers` does."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return False
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if "lora_" not in name and "trainable_tokens" not in name]  # noqa: SIM118
    return not all(set(modules_to_save) & set(name.split(".")) for name in names)


def load_adapter_policy(recipe: Recipe, folder: Path) -> PeftModel:
    """The backbone with the adapter of `folder`; see `load_policy_adapter`."""
    return load_policy_adapter(load_backbone(recipe), folder, recipe)


@contextmanager
def judged_policy(folder: Path | None, roles: Roles, recipe: Recipe) -> Iterator[PreTrainedModel | PeftModel | Reference]:
    """The policy of `folder`, while this lasts: an adapter on the same backbone, or a full model of its own; without a
    folder the reference.

    Raises:
        RecipeError: what it holds does not fit the backbone and its tokenizer.
    """
    if folder is None:
        yield roles.reference
    elif (folder / "adapter_config.json").is_file():
        yield load_policy_adapter(roles.backbone, folder, recipe)
    else:
        with loading(str(folder)), safetensors_only():
            model = pretrained(AutoModelForCausalLM, folder, **loading_fields(recipe))
        theirs, ours = (each.get_input_embeddings().num_embeddings for each in (model, roles.backbone))
        if theirs != ours:
            raise RecipeError(f"{folder}: has a vocabulary of {theirs} tokens, and {recipe.model.path} one of {ours}")
        yield model.requires_grad_(False).eval().to(roles.policy.device)
