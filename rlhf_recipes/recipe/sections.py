"""The shared sections of a recipe: their keys, types and defaults."""

import dataclasses
import os.path
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Lt

from rlhf_recipes.recipe.errors import RecipeError, nearest
from rlhf_recipes.recipe.values import coerce

LATEST = "latest"  # beside the runs of a stage: a link to the newest
Positive = Annotated[int, Gt(0)]


# --- the shared sections -----------------------------------------------------------------------------------------


def _key(doc: str, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    return field(default=default, metadata={"doc": doc}, **kwargs)


@dataclass(frozen=True)
class ModelSection:
    """The frozen backbone under every role."""

    path: str = _key("a Hub id, or a folder relative to the recipe")
    trust_remote_code: bool = _key("execute the Python code that the model brings along (`auto_map` in its config)", False)
    dtype: Literal["float32", "bfloat16", "float16"] = _key("of the backbone in memory; adapters are float32", "float32")
    quantization: Literal["4bit"] | None = _key(
        "the backbone's linear layers in 4 bits (NF4), as QLoRA has them; needs bitsandbytes, and `dtype` bfloat16", None
    )
    attention: str | None = _key(
        "transformers' `attn_implementation`: sdpa, eager (faster for short texts on a CPU), flash_attention_2, ...", None
    )
    pad_token: str | None = _key(
        "a token of the vocabulary to pad with, where the tokenizer has none, or its eos, as Pythia's and Llama's have", None
    )
    eos_token: str | None = _key(
        "the token that ends a text or an answer, where it isn't the tokenizer's eos: <end_of_turn> of Gemma, <|end|> of Phi",
        None,
    )
    chat_template: str | None = _key("a Jinja file relative to the recipe, in place of the tokenizer's own template", None)
    save_dtype: Literal["float32", "bfloat16", "float16"] = _key("in which scripts/sft.py writes a backbone", "float32")
    architecture: dict[str, Any] | None = _key(
        "a transformers config (`model_type`, `vocab_size`, ...) for `sft.from_scratch`", None
    )


@dataclass(frozen=True)
class LoraSection:
    """The adapter of every trained role; names as in PEFT's LoraConfig (`alpha` and `dropout` are its lora_alpha and
    lora_dropout)."""

    r: Positive = _key("rank", 16)
    alpha: Annotated[float, Gt(0)] = _key("the update is scaled by alpha / r", 32)
    dropout: Annotated[float, Ge(0), Lt(1)] = _key("on the adapter's input while training SFT and rewards", 0.0)
    target_modules: str | list[str] = _key("the layers with an adapter: names, a pattern, or all-linear", "all-linear")
    exclude_modules: str | list[str] | None = _key("layers of those that get none", None)
    target_parameters: list[str] | None = _key("parameters with an adapter that are no layer's, as a mixture's experts", None)
    layers_to_transform: int | list[int] | None = _key("the numbers of the only layers that get one", None)
    layers_pattern: str | list[str] | None = _key("the name of the list of layers, for `layers_to_transform`", None)
    rank_pattern: dict[str, Positive] | None = _key("other ranks, by layer", None)
    alpha_pattern: dict[str, Annotated[float, Gt(0)]] | None = _key("other alphas, by layer", None)
    modules_to_save: list[str] | None = _key("modules trained and saved whole beside the adapter", None)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _key("tokens whose embeddings are trained", None)
    use_rslora: bool = _key("scale by alpha / sqrt(r): arXiv 2312.03732", False)
    use_dora: bool = _key("train the weights' magnitudes apart from their directions: arXiv 2402.09353", False)
    lora_bias: bool = _key("a bias in the adapter's second matrix", False)
    init_lora_weights: bool | Literal["gaussian"] = _key(
        "how A starts; B starts at 0, and so the policy as the reference", True
    )


# PEFT's other fields.
_CHANGES_BACKBONE = "it changes the backbone's own weights, which every role shares"
_UNPROVEN = "a variant of LoRA that the shared roles have not been checked with"
_BY_STAGE = "each stage sets it"
LORA_REFUSED = {
    "bias": _CHANGES_BACKBONE,
    "layer_replication": _CHANGES_BACKBONE,
    **dict.fromkeys(("loftq_config", "corda_config", "eva_config", "lora_ga_config"), _CHANGES_BACKBONE),
    **dict.fromkeys(("use_qalora", "qalora_group_size", "use_bdlora", "velora_config", "monteclora_config"), _UNPROVEN),
    **dict.fromkeys(("arrow_config", "kasa_config", "ensure_weight_tying", "runtime_config"), _UNPROVEN),
    "alora_invocation_tokens": "it adapts a part of each text, which weights with a merged adapter cannot",
    "megatron_config": "it is for Megatron's layers",
    "megatron_core": "it is for Megatron's layers",
    "fan_in_fan_out": "PEFT sees by itself how a layer stores its weights",
    **dict.fromkeys(("task_type", "inference_mode", "base_model_name_or_path", "revision"), _BY_STAGE),
    **dict.fromkeys(("peft_type", "peft_version", "auto_mapping"), _BY_STAGE),
}


REWARD_KINDS = {  # each a key of RewardTerm and a module of rewards/; and the keys that this kind alone reads
    "adapter": (),  # `read_eos` is also what scripts/reward.py trains an adapter to read
    "model": ("label", "probability", "pair", "trust_remote_code", "max_length"),
    "function": ("on_error",),
}


@dataclass(frozen=True)
class RewardTerm:
    """One reward: an adapter on the backbone, a model of its own, or a function of task.py."""

    adapter: str | None = _key("a LoRA adapter and score head trained by scripts/reward.py on this backbone", None)
    model: str | None = _key("any sequence classifier with its own tokenizer: a Hub id, or a folder", None)
    function: bool | str | None = _key("a function of task.py by its name; true means `reward`", None)
    name: str | None = _key("in the metrics; default: the last part of the path, or the function's name", None)
    weight: float = _key("in the sum of several rewards", 1.0)
    read_eos: bool = _key("the adapter sees the end-of-sequence token of a finished text", True)
    label: int | str | None = _key("the column of the model's output; needed where it has several", None)
    probability: bool = _key("the model's softmax (of one label: sigmoid) instead of its logit", False)
    pair: bool = _key("the model's tokenizer gets prompt and completion as two segments", False)
    trust_remote_code: bool = _key("execute the Python code that the `model` brings along", False)
    max_length: Positive | None = _key("tokens the model reads; a longer text loses its beginning", None)
    on_error: Literal["stop", "skip"] = _key("where a function fails: stop the run, or leave the row out", "stop")

    @property
    def kind(self) -> str:
        """The kind that a term names; see `RewardSection.all_terms` for those that name none or several."""
        return next(kind for kind in REWARD_KINDS if getattr(self, kind))

    @property
    def function_name(self) -> str | None:
        """None without one."""
        return "reward" if self.function is True else self.function or None

    @property
    def title(self) -> str:
        path = self.function_name or str(getattr(self, self.kind))
        return self.name or path.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class RewardSection(RewardTerm):
    """What is maximised: one reward, or a weighted sum."""

    terms: list[dict[str, Any]] | None = _key("several rewards, each a mapping of the keys above, in place of those", None)
    normalize: bool = _key("each reward less its mean over its deviation, of the reference on training prompts", False)
    normalize_prompts: Positive = _key("training prompts that `normalize` samples a completion of, the first of them", 256)
    clip: Annotated[float, Gt(0)] | None = _key("limits the sum to -clip and clip, after normalising", None)
    length_penalty: float = _key("taken off for each token of the completion", 0.0)
    missing_eos_penalty: Annotated[float, Ge(0)] | None = _key("taken off a completion without an end", None)

    @property
    def adapter_reads_eos(self) -> bool:
        """What scripts/reward.py trains the adapter to read."""
        return next((term.read_eos for term in self.all_terms() if term.adapter), self.read_eos)

    def all_terms(self) -> list[RewardTerm]:
        """The rewards of the sum.

        Raises:
            RecipeError: there are none, one names no or several sources, or two have one name.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(RewardTerm)}
        if self.terms is None:
            terms = [RewardTerm(**own)]
        else:
            changed = [f.name for f in dataclasses.fields(RewardTerm) if own[f.name] != f.default]
            if changed:
                raise RecipeError(f"`reward.terms`: then `reward.{changed[0]}` belongs into one of them")
            terms = [_build_term(i, values) for i, values in enumerate(self.terms)]
        for i, term in enumerate(terms):
            where = "`reward`" if self.terms is None else f"`reward.terms[{i}]`"
            sources = [kind for kind in REWARD_KINDS if getattr(term, kind)]
            if len(sources) != 1:
                (*others, last), named = REWARD_KINDS, " and ".join(sources) or "none"
                raise RecipeError(f"{where} needs one of {', '.join(others)} and {last}, and names {named}")
            for kind, key in ((kind, key) for kind, keys in REWARD_KINDS.items() for key in keys if kind not in sources):
                if getattr(term, key) != RewardTerm.__dataclass_fields__[key].default:
                    raise RecipeError(
                        f"{where[:-1]}.{key}` has no effect on {sources[0]}: it is of a reward `{kind}`; leave it out"
                    )
        titles = [term.title for term in terms]
        for title in titles:
            if titles.count(title) > 1:
                raise RecipeError(f"`reward.terms`: two are named {title}; give one a `name`")
        if not terms:
            raise RecipeError("`reward.terms` is empty; give at least one reward")
        return terms


def _build_term(i: int, values: dict[str, Any]) -> RewardTerm:
    hints, where = typing.get_type_hints(RewardTerm, include_extras=True), f"reward.terms[{i}]"
    for key in values:
        if key not in hints:
            raise RecipeError(f"unknown key `{where}.{key}`{nearest(key, hints)}")
    return RewardTerm(**{key: coerce(value, hints[key], f"`{where}.{key}`") for key, value in values.items()})


@dataclass(frozen=True)
class ObjectiveSection:
    """J = E[r] - beta * KL(policy || reference)."""

    beta: Annotated[float, Ge(0)] = _key("the leash: nats of KL are priced at beta units of reward", 0.1)


@dataclass(frozen=True)
class DataSection:
    """Lengths every stage shares."""

    max_prompt_tokens: Positive = _key("longer prompts are left out, and counted", 512)
    max_completion_tokens: Positive = _key("how long a sampled completion may get", 128)


@dataclass(frozen=True)
class SamplingSection:
    """pi(y|x) is defined at this temperature, for policy and reference alike."""

    temperature: Annotated[float, Gt(0)] = _key("1.0 is the model itself, and what DPO assumes", 1.0)
    stop: list[str] | None = _key("texts with any of which a completion ends, as it does with an end token", None)


@dataclass(frozen=True)
class RunSection:
    """Where a run goes and who watches it."""

    seed: Annotated[int, Ge(0), Lt(2**32)] = _key("of sampling, data order and initial weights", 0)
    tracker: Literal["wandb", "none"] = _key("wandb runs go offline by themselves without login or network", "wandb")
    project: str = _key("the wandb project", "rlhf-recipes")
    group: str | None = _key("the wandb group; default: the task", None)
    name: str | None = _key("the run folder's name; default: time and seed", None)
    trial: bool = _key("one of a sweep's runs: `latest` does not point to it, and it is judged or merged only by name", False)
    resume: str | None = _key("a run's folder to go on with, or `latest`; --resume says the same", None)
    max_skipped_steps: Positive = _key(
        "optimizer steps in a row whose gradient is not finite, and which are left out, after which a run stops", 10
    )
    output: str = _key("runs are written to <output>/<task>/<stage>/<run>, relative to where you are", "outputs")


@dataclass(frozen=True)
class PreferencesSection:
    """The pairs that scripts/dpo.py trains on."""

    source: Literal["sampled", "task"] = _key(
        "`sampled` from the reference and judged by the reward model, or the `task`'s own load_preferences", "sampled"
    )
    label: Literal["bradley_terry", "expected", "argmax"] = _key(
        "which of two is chosen: drawn with P = sigmoid(r1 - r2), as DPO assumes; `expected`: both orders, weighted by their "
        "P, the same optimum without the draw's noise; `argmax`: the higher reward, another optimum",
        "bradley_terry",
    )
    pairs_per_prompt: Positive = _key("pairs sampled for each training prompt", 4)
    prompts: Positive | None = _key("training prompts to use, the first of them; default all", None)
    batch_size: Positive = _key("completions sampled at a time", 64)
    path: str | None = _key(
        "pairs to train on: a folder that scripts/preferences.py made, or a .jsonl file of `prompt`, `chosen` and `rejected`, "
        "text or chat messages; without one scripts/dpo.py makes its pairs first",
        None,
    )


@dataclass(frozen=True)
class EvaluateSection:
    """Held-out evaluation: scripts/evaluate.py, and the end of every policy stage."""

    prompts: Positive = _key("held-out prompts, the first of the evaluation split", 256)
    batch_size: Positive = _key("sequences in one forward pass", 64)
    samples: Positive = _key("side-by-side samples in the closing table", 10)
    completions: Positive = _key("completions of each prompt by each policy (scripts/evaluate.py)", 8)
    reference_completions: Positive = _key("of the reference: they also give best-of-n and the estimate of the optimum", 64)
    policies: list[str] | None = _key(
        "what scripts/evaluate.py judges: `reference`, `best-of-N`, and [NAME=]FOLDER of an adapter or a full model; "
        "default: the reference, best-of-4, 16 and 64, and the latest run of each policy stage",
        None,
    )


@dataclass(frozen=True)
class WatchSection:
    """What PPO and A2C look at while they train, with `eval_strategy: steps`, and what over-optimisation leads to."""

    prompts: Annotated[int, Ge(2)] = _key("held-out prompts judged every `eval_steps`, the first of the evaluation split", 128)
    on_over_optimisation: Literal["warn", "stop", "rollback"] = _key(
        "where the reward rises and gold falls: say so, stop there, or stop and end with the best policy by gold", "warn"
    )


@dataclass(frozen=True)
class ReportSection:
    """The page that scripts/report.py makes."""

    evaluation: str | None = _key("a run's folder of scripts/evaluate.py; default: the latest of the task", None)


@dataclass(frozen=True)
class MergeSection:
    """The model of its own that scripts/merge.py makes."""

    adapter: str | None = _key("a run of a policy stage, or any folder of an adapter; default: the latest PPO run", None)
    push: str | None = _key("upload it to this repository of the Hub, ORG/NAME; needs HF_TOKEN or `hf auth login`", None)
    private: bool = _key("a repository that `push` creates is private", True)


SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "lora": LoraSection,
    "reward": RewardSection,
    "objective": ObjectiveSection,
    "data": DataSection,
    "sampling": SamplingSection,
    "run": RunSection,
    "preferences": PreferencesSection,
    "evaluate": EvaluateSection,
    "watch": WatchSection,
    "report": ReportSection,
    "merge": MergeSection,
}


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: the shared sections typed, the stage sections as TRL's own field names and values."""

    folder: Path
    model: ModelSection
    lora: LoraSection
    reward: RewardSection
    objective: ObjectiveSection
    data: DataSection
    sampling: SamplingSection
    run: RunSection
    preferences: PreferencesSection
    evaluate: EvaluateSection
    watch: WatchSection
    report: ReportSection
    merge: MergeSection
    stages: dict[str, dict[str, Any]]

    @property
    def task(self) -> str:
        return self.folder.name

    @property
    def runs(self) -> Path:
        """The folder of the task's runs, which has a folder for each stage."""
        return Path(self.run.output) / self.task

    def path(self, value: str) -> str:
        """See `resolved`."""
        return resolved(value, self.folder)

    def said(self, value: str) -> str:
        """See `said`."""
        return said(value, self.folder)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `load_recipe` reads back to an equal recipe."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        return {"folder": str(self.folder), **sections, **self.stages}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def resolved(value: str, folder: Path) -> str:
    """A path that a recipe in `folder` names: `value` beside the recipe, else from here, else `value` itself as a Hub id."""
    for base in (folder, Path.cwd()):
        found = followed(base / value)
        if os.path.exists(found):  # false, not an error, for what can be no file's name
            return str(found.resolve())
    return value


def said(value: str, folder: Path) -> str:
    """A path of the recipe in `folder` for a message, which says what it was taken for."""
    found = os.path.exists(resolved(value, folder))
    return value if found else f"{value} (no folder beside the recipe or here, so a Hub id)"


def followed(path: Path) -> Path:
    """`path`, where a `latest` in it that is a file, for want of symbolic links, stands for the run that it names."""
    for link in (*reversed(path.parents), path):
        if link.name == LATEST and os.path.isfile(link):
            return followed(link.with_name(link.read_text(encoding="utf-8").strip()) / path.relative_to(link))
    return path
