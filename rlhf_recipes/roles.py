"""Policy, reference, value and reward on ONE frozen backbone.

The backbone's weights are in memory once. Every role is those weights plus something small of its own: the policy a LoRA
adapter, the reference nothing (the policy with its adapters off), the value a head on the policy's trunk or a LoRA adapter
and head, the reward a LoRA adapter and score head. Sharing frozen tensors is safe: no optimizer touches them.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data.tokenizer import load_ends
from rlhf_recipes.models.adapters import with_new_adapter
from rlhf_recipes.models.backbone import keep_in_evaluation, load_backbone, shared_copy
from rlhf_recipes.models.lora import use_lean_lora
from rlhf_recipes.models.reference import Reference
from rlhf_recipes.models.value import ValueHead, build_value
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.rewards.reward import Shared
from rlhf_recipes.rewards.total import Rewards, load_rewards
from rlhf_recipes.rollouts.lean import LeanSampler
from rlhf_recipes.rollouts.sampler import Sampler
from rlhf_recipes.tasks import load_task, task_function


@dataclass
class Roles:
    """The four roles of RLHF, and what they share.

    backbone: without any adapter; modules of its own over the very same weights.
    sampler: draws the completions of policy and reference.
    """

    tokenizer: PreTrainedTokenizerBase
    policy: PeftModel
    reference: Reference
    value: ValueHead
    reward: Rewards
    backbone: PreTrainedModel
    sampler: Sampler


def build_roles(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, value: str = "trunk") -> Roles:
    """All four roles over one load of the backbone, the policy a new adapter, at which it equals the reference exactly.

    Args:
        value: "trunk" or "adapter".
    """
    backbone = keep_in_evaluation(load_backbone(recipe.model, recipe.path(recipe.model.path)))
    ends = load_ends(tokenizer, recipe.path(recipe.model.path), recipe.sampling.stop)
    dtype = getattr(torch, recipe.model.dtype)
    shared = Shared(recipe.path, dtype, backbone, ends.tokens, lambda name: task_function(load_task(recipe), name))
    reward = load_rewards(recipe.reward, shared)
    torch.manual_seed(recipe.run.seed)  # the same start whatever was built before, here and below
    value_role = build_value(value, backbone, recipe.lora)
    torch.manual_seed(recipe.run.seed)
    policy = with_new_adapter(shared_copy(backbone), recipe.lora, "CAUSAL_LM")
    use_lean_lora(policy)
    sampler = LeanSampler(ends, recipe.data.max_completion_tokens, recipe.sampling.temperature)
    return Roles(tokenizer, policy, Reference(policy), value_role, reward, backbone, sampler)
