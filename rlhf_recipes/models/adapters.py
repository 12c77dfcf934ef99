"""LoRA adapters: making, loading, merging for a while."""

import copy
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from rlhf_recipes.models.backbone import keep_in_evaluation, known_as_4bit, load_backbone, safetensors_only, shared_copy
from rlhf_recipes.models.classifier import build_classifier
from rlhf_recipes.models.lora import is_plain
from rlhf_recipes.recipe.errors import RecipeError, loading
from rlhf_recipes.recipe.sections import LoraSection, ModelSection

# Models whose kernels read the weights of these layers and never call them, so that an adapter there is passed over.
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_MAMBA_LAYERS = ("out_proj", "conv1d", "dt_proj")


def with_saved_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    with known_as_4bit(model), safetensors_only():
        return PeftModel.from_pretrained(model, folder)


@contextmanager
def loading_adapter(what: str, backbone: PreTrainedModel) -> Iterator[None]:
    """While this lasts, an adapter must fit the backbone, and all of it must be there."""
    with loading(what, f"cannot be loaded, or does not fit {backbone.name_or_path}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT draws those at random
        yield


def lora_config(section: LoraSection, task_type: str, training: bool = False) -> LoraConfig:
    """PEFT's LoraConfig of the recipe's `lora` section.

    Args:
        task_type: "CAUSAL_LM" or "SEQ_CLS" (which also trains the score head).
        training: dropout is for supervised stages; in PPO it would make the policy differ from the sampler.
    """
    fields = {key: value for key, value in vars(section).items() if value is not None}
    alpha, dropout = fields.pop("alpha"), fields.pop("dropout")
    return LoraConfig(**fields, lora_alpha=alpha, lora_dropout=dropout if training else 0.0, task_type=task_type)


def with_new_adapter(model: PreTrainedModel, section: LoraSection, task_type: str, training: bool = False) -> PeftModel:
    """`model` with an adapter that changes nothing yet; see `lora_config`.

    With `all-linear` those layers get none that PEFT refuses (Mamba's kernels pass them over) or that read no text (of models
    that also see images). `modules_to_save` that a classifier does not have, such as the output embedding, are left out of it.
    """
    config = lora_config(section, task_type, training)
    with (
        loading(f"`lora` with target_modules {section.target_modules}", f"does not fit {model.name_or_path}"),
        known_as_4bit(model),
    ):
        if config.target_modules == "all-linear":
            given = config.exclude_modules or []
            names = [name for name, _ in model.named_modules()]
            matched = [name for name in names if re.fullmatch(given, name)] if isinstance(given, str) else given
            uncalled = _MAMBA_LAYERS if model.config.model_type in _MAMBA else ()
            config.exclude_modules = [*matched, *uncalled, *outside_the_text_model(model)] or None
        if config.modules_to_save and task_type == "SEQ_CLS":
            present = {part for name, _ in model.named_modules() for part in name.split(".")}
            config.modules_to_save = [name for name in config.modules_to_save if name in present] or None
        return get_peft_model(model, config)


def outside_the_text_model(model: PreTrainedModel) -> list[str]:
    """The linear layers that read images or sound, by name."""
    prefix = model.base_model_prefix
    trunk = getattr(model, prefix)
    inside = set(getattr(trunk, "language_model", trunk).modules())
    return [
        name for name, module in trunk.named_modules(prefix=prefix) if isinstance(module, nn.Linear) and module not in inside
    ]


def load_with_new_adapter(section: ModelSection, path: str, lora: LoraSection, task_type: str) -> PeftModel:
    """What a supervised stage trains: the backbone ("CAUSAL_LM") or a classifier over it ("SEQ_CLS") with a new adapter."""
    backbone = load_backbone(section, path)
    model = keep_in_evaluation(build_classifier(backbone)) if task_type == "SEQ_CLS" else backbone
    return with_new_adapter(model, lora, task_type, training=True)


def load_policy_adapter(backbone: PreTrainedModel, folder: Path) -> PeftModel:
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
    with loading_adapter(str(folder), backbone):
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


def can_merge(policy: PeftModel) -> bool:
    """Whether weights alone can hold the policy: a bias of the adapter's needs one of the layer's."""
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    biased = [layer for layer in layers if any(layer.lora_bias.get(name) for name in layer.active_adapters)]
    return all(getattr(layer.get_base_layer(), "bias", None) is not None for layer in biased)


@contextmanager
def merged_adapters(policy: PeftModel) -> Iterator[PeftModel]:
    """Generates at the backbone's own speed: inside, W + BA stands in for W; outside, W is the very same tensor again.

    Only the policy's own modules point to the merged copies, so roles that share W never see them, and neither does an output
    embedding that is tied to an adapted one. What is not plain LoRA, PEFT merges. Costs one copy of the adapted matrices while
    it lasts.
    """
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    originals: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
    try:
        for layer in layers:
            base, names = layer.get_base_layer(), [name for name in layer.active_adapters if name in layer.r]
            own = originals.setdefault(base, dict(base._parameters))
            if is_plain(layer, names):
                weight, delta = base.weight, sum(layer.get_delta_weight(name) for name in names)
                base.weight = nn.Parameter((weight.float() + delta.float()).to(weight.dtype), requires_grad=False)
                layer.merged_adapters += names
            elif names:
                for name, parameter in own.items():
                    if parameter is not None and base._parameters[name] is parameter:
                        base._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                layer.merge(adapter_names=names)
        yield policy
    finally:
        for base, own in originals.items():
            base._parameters.update(own)
        for layer in layers:
            layer.merged_adapters.clear()
            layer._caches.clear()  # what PEFT would need to take a merge out again
