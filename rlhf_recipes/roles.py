"""Policy, reference, value and reward on ONE frozen backbone.

The backbone's weights are in memory once. Every role is those weights plus something small of its own: the policy a LoRA
adapter, the reference nothing (the policy with its adapters off), the value a head on the policy's trunk or a LoRA adapter
and head, the reward a LoRA adapter and score head. Sharing frozen tensors is safe: no optimizer touches them.
"""

import copy
import itertools
import json
import re
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from unittest import mock

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_recipes.data import Ends, end_token_ids, load_ends, loading
from rlhf_recipes.lora import is_plain, use_lean_lora
from rlhf_recipes.recipe import Recipe, RecipeError, RewardTerm, nearest
from rlhf_recipes.rewards import AdapterReward, FunctionReward, ModelReward, Rewards, Term
from rlhf_recipes.tasks import load_task, task_function

M = TypeVar("M", bound=nn.Module)

# Models whose kernels read the weights of these layers and never call them, so that an adapter there is passed over.
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_MAMBA_LAYERS = ("out_proj", "conv1d", "dt_proj")


class Reference(nn.Module):
    """pi_ref: the policy with its adapters off, hence bit for bit the backbone.

    It holds the policy without registering it, so it has no parameters of its own, and DDP, optimizers and `.to()` see
    nothing twice.
    """

    def __init__(self, policy: PeftModel) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple: nn.Module would register a plain attribute

    @contextmanager
    def speaking(self) -> Iterator[PeftModel]:
        """The policy, speaking as the reference while this lasts."""
        (policy,) = self._policy
        with policy.disable_adapter():
            yield policy

    def forward(self, **inputs: Tensor):
        with self.speaking() as policy:
            return policy(**inputs)


class SyncedReference(Reference):
    """The policy as it was when `sync` was last called; at first, as it is now. Costs a copy of the adapter."""

    def __init__(self, policy: PeftModel) -> None:
        super().__init__(policy)
        self.sync()

    def sync(self) -> None:
        """Follows the policy."""
        (policy,) = self._policy
        self.adapter = [(p, p.detach().clone()) for p in policy.parameters() if p.requires_grad]

    @contextmanager
    def speaking(self) -> Iterator[PeftModel]:
        (policy,) = self._policy
        now = [parameter.data for parameter, _ in self.adapter]
        try:
            for parameter, then in self.adapter:
                parameter.data = then
            yield policy
        finally:
            for (parameter, _), data in zip(self.adapter, now, strict=True):
                parameter.data = data


class Score(nn.Linear):
    """A scalar in float32 from a hidden state of any precision."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype))


class ValueHead(nn.Module):
    """V(s): one linear layer on a trunk's last hidden state; it starts at zero, so the first advantages are returns."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = Score(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> [batch, tokens]"""
        return self.score(hidden).squeeze(-1)


class ValueAdapter(ValueHead):
    """V(s) with a LoRA adapter of its own over the shared frozen weights (`ppo.value: adapter`)."""

    base_model_prefix = "trunk"  # where TRL's own loop looks for it

    def __init__(self, trunk: nn.Module, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.trunk = trunk

    def hidden(self, **inputs: Tensor) -> Tensor:
        return self.trunk(**inputs, use_cache=False).last_hidden_state


@dataclass
class Roles:
    """The four roles of RLHF, and what they share.

    backbone: without any adapter; modules of its own over the very same weights.
    ends: where a completion ends.
    """

    tokenizer: PreTrainedTokenizerBase
    policy: PeftModel
    reference: Reference
    value: ValueHead
    reward: Rewards
    backbone: PreTrainedModel
    ends: Ends


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


def load_backbone(recipe: Recipe) -> PreTrainedModel:
    """The frozen causal LM of `model.path`.

    Raises:
        RecipeError: it is neither a folder nor to be had from the Hub, not in safetensors, or brings code that is not trusted.
    """
    with loading(f"`model.path` {recipe.said(recipe.model.path)}"), safetensors_only():
        model = _pretrained(AutoModelForCausalLM, recipe.path(recipe.model.path), **_loading(recipe), **_quantizing(recipe))
    model.name_or_path = recipe.model.path  # adapters record it: the recipe's words, not this machine's path
    # moved before anything shares its weights: a later move to the same device changes nothing, another would copy them
    model = model.requires_grad_(False).eval().to(PartialState().device)
    model.is_loaded_in_4bit = False  # see _known_as_4bit
    for module in filter(_is_4bit, model.modules()):
        # on such CPUs an evaluation would repack the weights, after which no gradient passes them
        module.support_avx512bf16_for_cpu = False
    _check_weights(model, recipe)
    return model


def keep_in_evaluation(model: M) -> M:
    """From now on `train()` leaves the transformers models in `model` in evaluation mode, except LoRA's own dropout.

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


def _loading(recipe: Recipe) -> dict[str, Any]:
    """How `from_pretrained` loads a model of the recipe."""
    dtype, attention = getattr(torch, recipe.model.dtype), recipe.model.attention
    trusted = recipe.model.trust_remote_code  # never None: transformers would ask on standard input
    return {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": trusted}


def _quantizing(recipe: Recipe) -> dict[str, Any]:
    """How it quantises the backbone: as QLoRA does (Dettmers et al. 2023, arXiv 2305.14314), on this process's device."""
    if recipe.model.quantization is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": PartialState().device}}


def _is_4bit(module: nn.Module) -> bool:
    """Whether it is a quantised layer itself, not PEFT's around one."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes")


@contextmanager
def _known_as_4bit(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, PEFT is told of 4-bit layers if there are any. TRL's trainers must not be: they would round adapters to
    bfloat16, in which the small steps of training are lost."""
    model.is_loaded_in_4bit = any(map(_is_4bit, model.modules()))
    try:
        yield
    finally:
        model.is_loaded_in_4bit = False


def _load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    with _known_as_4bit(model), safetensors_only():
        return PeftModel.from_pretrained(model, folder)


def _pretrained(auto_class: Any, path: str | Path, **kwargs: Any) -> PreTrainedModel:
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


@contextmanager
def _loading_adapter(what: str, recipe: Recipe) -> Iterator[None]:
    """While this lasts, an adapter must fit the backbone, and all of it must be there."""
    problem = f"cannot be loaded, or does not fit {recipe.model.path}"
    with loading(what, problem), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT draws those at random
        yield


@torch.no_grad()
def _check_weights(model: PreTrainedModel, recipe: Recipe) -> None:
    logits = model(input_ids=torch.arange(4, device=model.device).unsqueeze(0)).logits
    if not logits.isfinite().all():
        raise RecipeError(
            f"`model.path` {recipe.model.path}: its logits are not finite: the weights are damaged, or `model.dtype` "
            f"{recipe.model.dtype} overflows"
        )


def build_backbone(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new, untrained causal LM of `model.architecture`, for `sft.from_scratch`."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    torch.manual_seed(recipe.run.seed)
    with loading("`model.architecture`", "no such model can be built"):
        config = AutoConfig.for_model(**(recipe.model.architecture or {}), **special)
        known = type(config)().to_dict()
        for key in (recipe.model.architecture or {}).keys() & config.to_dict().keys() - known.keys():
            raise RecipeError(f"`model.architecture.{key}`: {type(config).__name__} would not read it{nearest(key, known)}")
        return AutoModelForCausalLM.from_config(config)


def lora_config(recipe: Recipe, task_type: str, training: bool = False) -> LoraConfig:
    """PEFT's LoraConfig of the recipe's `lora` section.

    Args:
        task_type: "CAUSAL_LM" or "SEQ_CLS" (which also trains the score head).
        training: dropout is for supervised stages; in PPO it would make the policy differ from the sampler.
    """
    fields = {key: value for key, value in vars(recipe.lora).items() if value is not None}
    alpha, dropout = fields.pop("alpha"), fields.pop("dropout")
    return LoraConfig(**fields, lora_alpha=alpha, lora_dropout=dropout if training else 0.0, task_type=task_type)


def with_new_adapter(model: PreTrainedModel, recipe: Recipe, task_type: str, training: bool = False) -> PeftModel:
    """`model` with an adapter that changes nothing yet; see `lora_config`.

    With `all-linear` those layers get none that PEFT refuses (Mamba's kernels pass them over) or that read no text (of models
    that also see images). `modules_to_save` that a classifier does not have, such as the output embedding, are left out of it.
    """
    config = lora_config(recipe, task_type, training)
    with (
        loading(f"`lora` with target_modules {recipe.lora.target_modules}", f"does not fit {recipe.model.path}"),
        _known_as_4bit(model),
    ):
        if config.target_modules == "all-linear":
            given = config.exclude_modules or []
            names = [name for name, _ in model.named_modules()]
            matched = [name for name in names if re.fullmatch(given, name)] if isinstance(given, str) else given
            uncalled = _MAMBA_LAYERS if model.config.model_type in _MAMBA else ()
            config.exclude_modules = [*matched, *uncalled, *_outside_the_text_model(model)] or None
        if config.modules_to_save and task_type == "SEQ_CLS":
            present = {part for name, _ in model.named_modules() for part in name.split(".")}
            config.modules_to_save = [name for name in config.modules_to_save if name in present] or None
        return get_peft_model(model, config)


def _outside_the_text_model(model: PreTrainedModel) -> list[str]:
    """The linear layers that read images or sound, by name."""
    prefix = model.base_model_prefix
    trunk = getattr(model, prefix)
    inside = set(getattr(trunk, "language_model", trunk).modules())
    return [
        name for name, module in trunk.named_modules(prefix=prefix) if isinstance(module, nn.Linear) and module not in inside
    ]


class SequenceClassifier:
    """A head with one label on a family's trunk, before which `build_classifier` puts the family's PreTrainedModel.

    Its weights have the names that transformers' own classifiers of that family give theirs. It reads the score where the mask
    says that a text ends; theirs look for the last token that is not the pad, and not every family has one.
    """

    def __init__(self, config: Any, trunk: nn.Module, width: int) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.post_init()  # type: ignore[attr-defined] # before there are weights, which it would draw
        setattr(self, self.base_model_prefix, trunk)  # type: ignore[attr-defined]
        self.score = nn.Linear(width, 1, bias=False, dtype=torch.float32, device=trunk.device)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """[batch, tokens], padded on the right -> logits [batch, 1]"""
        trunk = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        hidden = trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return SequenceClassifierOutput(logits=self.score(hidden.float())[torch.arange(len(last), device=mask.device), last])


def build_classifier(backbone: PreTrainedModel) -> PreTrainedModel:
    """A sequence classifier with one label over the very tensors of `backbone` (call before adapters are injected)."""
    trunk = shared_copy(getattr(backbone, backbone.base_model_prefix))
    family = next(cls for cls in type(trunk).__mro__ if PreTrainedModel in cls.__bases__)
    name = f"{type(backbone).__name__.partition('For')[0]}ForSequenceClassification"
    config = type(backbone.config)(**{**backbone.config.to_dict(), "num_labels": 1})
    made: Any = type(name, (SequenceClassifier, family), {"base_model_prefix": backbone.base_model_prefix})
    classifier = made(config, trunk, hidden_width(backbone))
    classifier.name_or_path = backbone.name_or_path
    return classifier.requires_grad_(False)


def load_with_new_adapter(recipe: Recipe, task_type: str) -> PeftModel:
    """What a supervised stage trains: the backbone ("CAUSAL_LM") or a classifier over it ("SEQ_CLS") with a new adapter."""
    backbone = load_backbone(recipe)
    model = keep_in_evaluation(build_classifier(backbone)) if task_type == "SEQ_CLS" else backbone
    return with_new_adapter(model, recipe, task_type, training=True)


def load_rewards(recipe: Recipe, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Rewards:
    """The recipe's `reward`: adapters over the backbone's frozen weights, models of their own, functions of task.py."""
    terms = {}
    for spec in recipe.reward.all_terms():
        if spec.adapter:
            scorer: Any = load_adapter_reward(recipe, spec, backbone, tokenizer)
        elif spec.model:
            scorer = load_model_reward(recipe, spec)
        else:
            scorer = FunctionReward(task_function(load_task(recipe), str(spec.function_name)), spec.on_error)
        terms[spec.title] = Term(scorer, spec.weight)
    section = recipe.reward
    return Rewards(terms, section.clip, section.length_penalty, section.missing_eos_penalty)


def load_adapter_reward(
    recipe: Recipe, spec: RewardTerm, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> AdapterReward:
    where, own = f"the reward's `adapter` {spec.adapter}", list(backbone.parameters())
    before = [(parameter.data_ptr(), parameter._version) for parameter in own]
    with _loading_adapter(where, recipe):
        classifier = build_classifier(backbone)
        model = _load_adapter(classifier, recipe.path(str(spec.adapter)))
    if [(parameter.data_ptr(), parameter._version) for parameter in own] != before:
        raise RecipeError(
            f"{where}: it holds weights of the backbone's own (PEFT's `bias`, `save_embedding_layers` and such), which "
            f"every role shares; train it without"
        )
    use_lean_lora(model)
    ends = end_token_ids(tokenizer, recipe.path(recipe.model.path))
    return AdapterReward(model.requires_grad_(False).eval(), ends, spec.read_eos)


def load_model_reward(recipe: Recipe, spec: RewardTerm) -> ModelReward:
    """A sequence classifier and its tokenizer.

    Raises:
        RecipeError: it cannot be loaded, or it has several labels and `label` names none of them.
    """
    where, path = f"the reward's `model` {spec.model}", recipe.path(str(spec.model))
    dtype, trusted = getattr(torch, recipe.model.dtype), spec.trust_remote_code
    with loading(where, switch="reward.trust_remote_code"), safetensors_only():
        model = _pretrained(AutoModelForSequenceClassification, path, dtype=dtype, trust_remote_code=trusted)
    tokenizer = load_reward_tokenizer(recipe, spec)
    if missing := tokens_without_row(tokenizer, model):
        raise RecipeError(
            f"{where}: its tokenizer has tokens for which its embedding has no row, such as {missing[0]!r}; resize the "
            f"embedding, or use the tokenizer it was trained with"
        )
    # a decoder's classifier reads the score at the last token that is not this one
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    labels = dict(model.config.id2label)
    by_name = {str(name): index for index, name in labels.items()}
    label = next(iter(labels)) if spec.label is None and len(labels) == 1 else by_name.get(str(spec.label), spec.label)
    if not isinstance(label, int) or label not in labels:
        named = ", ".join(f"{index} ({name})" for index, name in labels.items())
        raise RecipeError(f"{where}: `label` {spec.label!r} is none of its labels: {named}")
    longest = min(spec.max_length or tokenizer.model_max_length, _readable_tokens(model))
    own = tokenizer.num_special_tokens_to_add(pair=spec.pair)
    if longest <= own:
        raise RecipeError(f"{where}: reads {longest} tokens, of which {own} are its tokenizer's own; raise `max_length`")
    model = model.requires_grad_(False).eval().to(PartialState().device)
    return ModelReward(model, tokenizer, label, spec.probability, longest, spec.pair, where)


def tokens_without_row(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """The tokens for which a model's embedding has no row, but for those that stand for images and sound, as Gemma 3 of 1B has
    one."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return []
    others = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return [token for token, number in vocabulary if number >= rows and token not in others]


def load_reward_tokenizer(recipe: Recipe, spec: RewardTerm) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward `model`.

    Raises:
        RecipeError: it cannot be loaded, or has no token to pad with.
    """
    where, sides = f"the reward's `model` {spec.model}", {"truncation_side": "left", "padding_side": "right"}  # right suits any
    with loading(where, switch="reward.trust_remote_code"):
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.path(str(spec.model)), **sides, trust_remote_code=spec.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise RecipeError(f"{where}: its tokenizer has neither a pad nor an eos token; name one in its tokenizer_config.json")
    return tokenizer


def _readable_tokens(model: PreTrainedModel) -> int:
    """How many tokens a model reads: the rows of its table of positions, less those that RoBERTa and its kin leave free up to
    the padding's and BART's and OPT's up to an offset; without a table what the config says, or any number."""
    rows = [
        module.num_embeddings - (module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name.rpartition(".")[2] or name.endswith("wpe"))
    ]
    said = getattr(model.config, "max_position_embeddings", None)
    return min([*rows, *([said] if isinstance(said, int) and said > 0 and not rows else []), 2**30])


def build_value(recipe: Recipe, backbone: PreTrainedModel, kind: str) -> ValueHead:
    """The value function of `ppo.value`: "trunk" or "adapter" (call before the policy's adapters are injected)."""
    if kind == "trunk":
        return ValueHead(hidden_width(backbone))
    model = with_new_adapter(build_classifier(backbone), recipe, "SEQ_CLS")
    use_lean_lora(model)
    trunk = model.get_base_model()
    return ValueAdapter(getattr(trunk, trunk.base_model_prefix), hidden_width(backbone))


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
    return Roles(tokenizer, policy, Reference(policy), value_role, reward, backbone, load_ends(recipe, tokenizer))


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
    with _loading_adapter(str(folder), recipe):
        shares = shares and not _holds_backbone(folder, config.get("modules_to_save") or [])
        own = shared_copy(backbone) if shares else copy.deepcopy(backbone)  # others change the backbone's weights as they load
        return _load_adapter(own, folder).eval()


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
            model = _pretrained(AutoModelForCausalLM, folder, **_loading(recipe))
        theirs, ours = (each.get_input_embeddings().num_embeddings for each in (model, roles.backbone))
        if theirs != ours:
            raise RecipeError(f"{folder}: has a vocabulary of {theirs} tokens, and {recipe.model.path} one of {ours}")
        yield model.requires_grad_(False).eval().to(roles.policy.device)


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
