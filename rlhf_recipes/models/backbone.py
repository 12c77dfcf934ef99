"""The frozen causal language model under every role."""

import copy
import itertools
import os.path
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from unittest import mock

import torch
from accelerate import PartialState
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_recipes.recipe.errors import RecipeError, loading, nearest
from rlhf_recipes.recipe.sections import ModelSection

M = TypeVar("M", bound=nn.Module)


@contextmanager
def safetensors_only() -> Iterator[None]:
    """While this lasts, weights are not unpickled, which can execute anything: without safetensors PEFT takes
    adapter_model.bin, and transformers, whatever `use_safetensors` says, where a config's `transformers_weights` names it.

    Raises:
        RecipeError: instead.
    """

    def refuse(file: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise RecipeError(f"{file}: a pickle, which can execute anything and is not loaded; give the weights as safetensors")

    with mock.patch.object(torch, "load", refuse):
        yield


def load_backbone(section: ModelSection, path: str) -> PreTrainedModel:
    """The frozen causal LM of the recipe's `model`.

    Args:
        path: where `model.path` lies, or a Hub id.

    Raises:
        RecipeError: it is neither a folder nor on the Hub, not in safetensors, or brings code that is not trusted.
    """
    found = "" if os.path.exists(path) else " (no folder beside the recipe or here, so a Hub id)"
    with loading(f"`model.path` {section.path}{found}"), safetensors_only():
        model = pretrained(AutoModelForCausalLM, path, **loading_fields(section), **quantizing(section))
    model.name_or_path = section.path  # adapters record it: the recipe's words, not this machine's path
    # moved before anything shares its weights: a later move to the same device changes nothing, another would copy them
    model = model.requires_grad_(False).eval().to(PartialState().device)
    model.is_loaded_in_4bit = False  # see known_as_4bit
    for module in filter(is_4bit, model.modules()):
        # on such CPUs an evaluation would repack the weights, after which no gradient passes them
        module.support_avx512bf16_for_cpu = False
    _check_weights(model, section.dtype)
    return model


def keep_in_evaluation(model: M) -> M:
    """From now on `train()` leaves the transformers models in `model` in evaluation mode, except LoRA's own dropout and
    NEFTune's noise.

    A policy with dropout is another one in training than the one that was sampled. TRL sets the probability of dropout modules
    to 0 (`disable_dropout_in_model`), which models that call the function (OPT, BioGPT, Falcon) never look at. Gradient
    checkpointing, which layers do in training mode alone, still works: while it runs a layer, that one is in evaluation mode.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.eval()
            module.train = types.MethodType(_train_adapters, module)
    return model


def _train_adapters(self: nn.Module, mode: bool = True) -> nn.Module:
    for module in self.modules():
        if isinstance(module, LoraLayer):
            module.training = mode
            module.lora_dropout.train(mode)
        elif isinstance(module, nn.Embedding):  # transformers adds NEFTune's noise (arXiv 2310.05914) in training mode alone
            module.training = mode and hasattr(module, "neftune_noise_alpha")
        elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = mode
            checkpoint = module._gradient_checkpointing_func
            if getattr(checkpoint, "func", None) is not _checkpoint_in_evaluation:
                module._gradient_checkpointing_func = partial(_checkpoint_in_evaluation, checkpoint)
    return self


def _checkpoint_in_evaluation(checkpoint: Callable[..., Any], forward: "partial[Any]", *args: Any) -> Any:
    """`forward` is a layer's, bound to it as GradientCheckpointingLayer does; it runs once more in the backward pass."""
    (layer,) = forward.args

    def in_evaluation(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(in_evaluation, *args)


def shared_copy(model: M) -> M:
    """Modules of their own over the very same parameters and buffers: an adapter put into one is not in the other."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def hidden_width(model: PreTrainedModel) -> int:
    """Of the trunk's last hidden state: what the output embedding reads, which OPT-350M's config calls by another name than
    the width of its layers."""
    return model.get_output_embeddings().in_features


def loading_fields(section: ModelSection) -> dict[str, Any]:
    """How `from_pretrained` loads a model of the recipe."""
    trusted = section.trust_remote_code  # never None: transformers would ask on standard input
    return {
        "dtype": getattr(torch, section.dtype),
        "attn_implementation": section.attention,
        "trust_remote_code": trusted,
    }


def quantizing(section: ModelSection) -> dict[str, Any]:
    """How it quantises the backbone: as QLoRA does (Dettmers et al. 2023, arXiv 2305.14314), on this process's device."""
    if section.quantization is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": PartialState().device}}


def is_4bit(module: nn.Module) -> bool:
    """Whether it is a quantised layer itself, not PEFT's around one."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes")


@contextmanager
def known_as_4bit(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, PEFT is told of 4-bit layers if there are any. TRL's trainers must not be: they would round adapters to
    bfloat16, in which the small steps of training are lost."""
    model.is_loaded_in_4bit = any(map(is_4bit, model.modules()))
    try:
        yield
    finally:
        model.is_loaded_in_4bit = False


def pretrained(auto_class: Any, path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """`auto_class.from_pretrained`, with every weight from there: transformers draws the ones that are missing at random.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    model, found = auto_class.from_pretrained(
        path, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
    )
    lost = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if lost:
        raise ValueError(f"{len(lost)} weights are missing, or of another shape than its config.json says, such as {lost[0]}")
    return model


@torch.no_grad()
def _check_weights(model: PreTrainedModel, dtype: str) -> None:
    logits = model(input_ids=torch.arange(4, device=model.device).unsqueeze(0)).logits
    if not logits.isfinite().all():
        raise RecipeError(
            f"`model.path` {model.name_or_path}: its logits are not finite: the weights are damaged, or `model.dtype` "
            f"{dtype} overflows"
        )


def build_backbone(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A new, untrained causal LM of `model.architecture`, for `sft.from_scratch`."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    torch.manual_seed(seed)
    with loading("`model.architecture`", "no such model can be built"):
        config = AutoConfig.for_model(**architecture, **special)
        known = type(config)().to_dict()
        for key in architecture.keys() & config.to_dict().keys() - known.keys():
            raise RecipeError(f"`model.architecture.{key}`: {type(config).__name__} would not read it{nearest(key, known)}")
        return AutoModelForCausalLM.from_config(config)


def tokens_without_row(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """The tokens for which a model's embedding has no row, but for those that stand for images and sound, as Gemma 3 of 1B has
    one."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return []
    others = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return [token for token, number in vocabulary if number >= rows and token not in others]
