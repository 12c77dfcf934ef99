"""A stage that saves a model reads it back, and compares."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.checks.models import PROMPTS, ROUNDING
from rlhf_recipes.data.tokens import encode_prompt, pad_left
from rlhf_recipes.models.adapters import load_policy_adapter
from rlhf_recipes.models.backbone import safetensors_only, shared_copy
from rlhf_recipes.recipe.errors import StoppedError
from rlhf_recipes.rewards.adapter import AdapterReward
from rlhf_recipes.roles import Roles
from rlhf_recipes.rollouts.forward import model_inputs


@torch.no_grad()
def read_back_policy(folder: Path, roles: Roles, prompts: Dataset) -> None:
    """The adapter that was saved, loaded anew over the backbone, must say of ten prompts what the policy says; a value function
    that was saved must be the one that was trained.

    Raises:
        StoppedError: it does not.
    """
    rows = prompts.select(range(min(PROMPTS, len(prompts))))["input_ids"][:]
    inputs = model_inputs(*(tensor.to(roles.policy.device) for tensor in pad_left(rows, roles.tokenizer.pad_token_id)))
    saved = load_policy_adapter(shared_copy(roles.backbone), folder)
    roles.policy.eval()
    trained, again = (model(**inputs).logits[:, -1] for model in (roles.policy, saved))
    _same(folder, trained, again, ROUNDING[roles.backbone.dtype])
    file = folder / "value.safetensors"
    if file.is_file():
        value = dict(roles.value.named_parameters())
        for name, tensor in load_file(file).items():
            if not torch.equal(tensor, value[name].detach().cpu()):
                raise StoppedError(f"{file}: `{name}` is not what was trained; the disk may be faulty")


@torch.no_grad()
def read_back_backbone(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[Any], trust_remote_code: bool
) -> None:
    """The backbone and tokenizer that were saved must read ten texts as `model`, which was saved, does.

    Args:
        texts: prompts or texts.

    Raises:
        StoppedError: they do not.
    """
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    rows = [encode_prompt(tokenizer, text) for text in texts[:PROMPTS]]
    if [encode_prompt(again, text) for text in texts[:PROMPTS]] != rows:
        raise StoppedError(f"{folder}: the tokenizer that was saved, read back as {type(again).__name__}, gives other tokens")
    device = model.device
    inputs = model_inputs(*(tensor.to(device) for tensor in pad_left(rows, tokenizer.pad_token_id)))
    trained = model.eval()(**inputs).logits[:, -1]
    model.to("cpu")  # a GPU need not hold both
    saved = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    _same(folder, trained, saved.to(device).eval()(**inputs).logits[:, -1], ROUNDING[model.dtype])


@torch.no_grad()
def read_back_reward(folder: Path, model: Any, pairs: Dataset) -> None:
    """The reward adapter that was saved, loaded beside the one that was trained, must score ten texts alike.

    Raises:
        StoppedError: it does not.
    """
    batch = pad_left(pairs.select(range(min(PROMPTS, len(pairs))))["chosen_ids"][:], 0)
    trained = AdapterReward(model)(*(tensor.to(model.device) for tensor in batch))
    with safetensors_only():
        model.load_adapter(str(folder), "saved")
    model.set_adapter("saved")
    saved = AdapterReward(model.eval())(*(tensor.to(model.device) for tensor in batch))
    model.set_adapter("default")
    model.delete_adapter("saved")
    _same(folder, trained, saved, ROUNDING[torch.float32])


def _same(folder: Path, mine: Tensor, saved: Tensor, allowed: float) -> None:
    gap = (mine.float() - saved.float()).abs().mean().item()
    if not gap <= allowed:
        raise StoppedError(
            f"{folder}: what was saved, read back, is not what was trained: its outputs are {gap:.3g} apart on average, and "
            f"rounding explains {allowed:g}; do not use it, and look at `lora` and `model`"
        )
