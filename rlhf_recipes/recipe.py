"""recipe.yaml and dotted overrides -> a typed, validated `Recipe`.

Nothing heavy is imported here: a wrong key is answered in well under a second.
"""

import dataclasses
import difflib
import functools
import os.path
import re
import reprlib
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlhf_recipes.keys import NO_SECRETS, OWNER_OF, SECRET, refused_keys, without_effect
from rlhf_recipes.names import meant
from rlhf_recipes.schema import CONFIG_SOURCES, stage_fields

LATEST = "latest"  # beside the runs of a stage: a link to the newest
DEFAULT_RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "imdb"

Positive = Annotated[int, Gt(0)]


class RecipeError(Exception):
    """A mistake in a recipe, an override, a task or a file it names; the message says where and what to do."""

    exit_code = 2

    def __init__(self, message: object) -> None:
        """One printable line, whatever words of a library or of a file are in it."""
        line = re.sub(r"\s*[\r\n]\s*", " ", str(message)).strip()
        line = re.sub(r"\S{400,}", lambda word: f"{word[0][:200]}...{word[0][-100:]}", line)
        line = line if len(line) <= 2000 else f"{line[:1500]} ... {line[-400:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


class StoppedError(RecipeError):
    """A run cannot go on, for a reason that is not the recipe's text: a full disk, losses that are not finite."""

    exit_code = 3


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
    def function_name(self) -> str | None:
        """None without one."""
        return "reward" if self.function is True else self.function or None

    @property
    def title(self) -> str:
        path = self.adapter or self.model or self.function_name or ""
        return self.name or path.rstrip("/").rsplit("/", 1)[-1]


_ONLY_OF = {  # which kind of reward reads a key; `read_eos` is also what scripts/reward.py trains an adapter to read
    **dict.fromkeys(("label", "probability", "pair", "trust_remote_code", "max_length"), "model"),
    "on_error": "function",
}


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
            sources = [key for key in ("adapter", "model", "function") if getattr(term, key)]
            if len(sources) != 1:
                named = " and ".join(sources) or "none"
                raise RecipeError(f"{where} needs one of adapter, model and function, and names {named}")
            for key, kind in _ONLY_OF.items():
                if getattr(term, key) != RewardTerm.__dataclass_fields__[key].default and kind not in sources:
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
    return RewardTerm(**{key: _coerce(value, hints[key], f"`{where}.{key}`") for key, value in values.items()})


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
    exact: bool = _key("scripts/evaluate.py also enumerates every completion: for laboratories like recipes/lab", False)
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
STAGES = tuple(CONFIG_SOURCES)


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

    def path(self, value: str) -> str:
        """`value` if it is a folder here or beside the recipe (in that order reversed), else `value` as a Hub id."""
        for base in (self.folder, Path.cwd()):
            found = followed(base / value)
            if os.path.exists(found):  # false, not an error, for what can be no file's name
                return str(found.resolve())
        return value

    def said(self, value: str) -> str:
        """A path of the recipe for a message, which says what it was taken for."""
        return value if os.path.exists(self.path(value)) else f"{value} (no folder beside the recipe or here, so a Hub id)"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `load_recipe` reads back to an equal recipe."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        return {"folder": str(self.folder), **sections, **self.stages}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def followed(path: Path) -> Path:
    """`path`, where a `latest` in it that is a file, for want of symbolic links, stands for the run that it names."""
    for link in (*reversed(path.parents), path):
        if link.name == LATEST and os.path.isfile(link):
            return followed(link.with_name(link.read_text(encoding="utf-8").strip()) / path.relative_to(link))
    return path


# --- reading and checking ----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, which PyYAML silently overwrites, and reads only true and false as booleans.

    YAML 1.1 also reads yes, no, on and off so, which turns `save_strategy: no` into False. A date is text, as a run may be
    named after one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                problem = "`<<` merges other mappings into one, which is not done here; write its keys out"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key}` appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in _PLAIN_TAGS  # None: whatever has no constructor is refused
}
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag != "tag:yaml.org,2002:timestamp" and (tag != "tag:yaml.org,2002:bool" or first in "tTfF")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, where: str) -> Any:
    """
    Raises:
        RecipeError: it is no YAML, or more than text, numbers, true, false, null, lists and mappings.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error}{at}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not valid YAML: too deeply nested") from None
    except (yaml.YAMLError, TypeError, ValueError, LookupError) as error:  # the last three of !!int x, "\UFFFFFFFF" and such
        raise RecipeError(f"{where}: not valid YAML: {error}") from None


def nearest(name: str, names: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean `{match[0]}`?" if match else ""


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True))


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint`: "5e-7" becomes a float (PyYAML reads it as text), 1 becomes 1.0, "yes" does not become 3."""
    _check_plain(value, where)
    if isinstance(value, bool) and not _accepts_bool(hint):
        raise RecipeError(f"{where}: expected {_type_name(hint)}, got {value!r}")
    try:
        typed = _adapter(hint).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise RecipeError(f"{where}: expected {_type_name(hint)}, got {shortened(value)} ({reason})") from None
    _check_plain(typed, where)  # "nan" as text has become a number
    return typed


_MOST_VALUES, _DEEPEST, _LARGEST = 10_000, 32, 3.4e38
_SHORTENER = reprlib.Repr()
_SHORTENER.maxstring = _SHORTENER.maxother = 80


def _check_plain(value: Any, where: str) -> None:
    """Values that can be written down and read back as they are; with aliases, a few lines of YAML can hold billions."""
    pending, count = [(value, 0)], 0
    while pending:
        item, depth = pending.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise RecipeError(
                f"{where}: expected at most {_MOST_VALUES:,} values, nested at most {_DEEPEST} deep; aliases (& and *) multiply"
            )
        if isinstance(item, dict):
            pending += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, list | tuple):
            pending += [(inner, depth + 1) for inner in item]
        elif isinstance(item, str):
            if odd := re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", item):
                raise RecipeError(f"{where}: the character {odd[0]!a} cannot be part of it")
        elif isinstance(item, float):
            if not abs(item) <= _LARGEST:
                raise RecipeError(f"{where}: expected a finite number that float32 holds, got {item}")
        elif isinstance(item, int):
            if abs(item) >= 2**63:
                raise RecipeError(f"{where}: expected a number of at most 64 bits, got one of {item.bit_length()}")
        elif item is not None:
            raise RecipeError(
                f"{where}: expected text, a number, true, false, null, a list or a mapping, got {shortened(item)}"
            )


def shortened(value: Any) -> str:
    """`value` as Python writes it, or its beginning and end; never more than a line, however much aliases make of it."""
    try:
        return _SHORTENER.repr(value)
    except ValueError:  # Python's own limit on the digits of a number
        return "an enormous number"


def _accepts_bool(hint: Any) -> bool:
    if hint is Any or hint is bool:
        return True
    return any(_accepts_bool(h) for h in typing.get_args(hint) if typing.get_origin(hint) is not Literal)


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *constraints = typing.get_args(hint)
        return f"{_type_name(base)} {' and '.join(map(_constraint_name, constraints))}"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)


def _constraint_name(constraint: Any) -> str:
    if isinstance(constraint, Lt):
        return f"< {constraint.lt}"
    return f"> {constraint.gt}" if isinstance(constraint, Gt) else f">= {constraint.ge}"


def _build_section(name: str, values: Any, file: str) -> Any:
    cls = SECTIONS[name]
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in values if name == "lora" and isinstance(values, dict) else ():
        if key in LORA_REFUSED:
            raise RecipeError(f"{file}: `lora.{key}` is not taken: {LORA_REFUSED[key]}; leave it out")
    _check_keys(name, values, hints, file)
    given = {key: _coerce(value, hints[key], f"{file}: `{name}.{key}`") for key, value in values.items()}
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.name not in given:
            raise RecipeError(f"{file}: `{name}.{f.name}` is missing ({f.metadata['doc']})")
    return cls(**given)


def _refuse_secrets(section: str, values: Any, file: str) -> None:
    """Names the key of a secret anywhere in `values`, and never the value."""
    pending, seen = [(section, values)], set()
    while pending:
        where, item = pending.pop()
        if id(item) in seen:  # YAML's aliases can make cycles
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            for key in item:
                if isinstance(key, str) and SECRET.search(key):
                    raise RecipeError(f"{file}: `{where}.{key}`: {NO_SECRETS}")
            pending += [(f"{where}.{key}", inner) for key, inner in item.items()]
        elif isinstance(item, list):
            pending += [(f"{where}[{i}]", inner) for i, inner in enumerate(item)]


def _build_stage(name: str, values: Any, file: str, given: Collection[str]) -> dict[str, Any]:
    """`given`: the keys that the command line sets."""
    fields = stage_fields(name)
    for key in values if isinstance(values, dict) else ():
        if key in OWNER_OF and key in fields:
            raise RecipeError(f"{file}: `{name}.{key}` belongs to `{OWNER_OF[key]}`, which every stage shares; set it there")
        if key in refused_keys(name):
            raise RecipeError(f"{file}: `{name}.{key}` has no effect here: {refused_keys(name)[key]}; leave it out")
    _check_keys(name, values, fields, file)
    typed = {key: _coerce(value, fields[key].type, f"{file}: `{name}.{key}`") for key, value in values.items()}
    problem = without_effect(name, typed, given)
    if problem is not None:
        raise RecipeError(f"{file}: {problem}")
    return typed


def _check_keys(section: str, values: Any, known: typing.Iterable[str], file: str) -> None:
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: `{section}` must be a mapping of keys to values, got {shortened(values)}")
    for key in values:
        if key not in known:
            raise RecipeError(f"{file}: unknown key `{section}.{_key_name(key)}`{instead_of(_key_name(key), known, section)}")


def instead_of(name: str, known: typing.Iterable[str], section: str | None = None, stage: str | None = None) -> str:
    """The end of a message on an unknown key: what people mean by this name, or the nearest of those there are."""
    advice = meant(name, section, keys_of_sections(), stage)
    return f"; {advice}" if advice else nearest(name, known)


@functools.cache
def keys_of_sections() -> dict[str, tuple[str, ...]]:
    """The keys that each section of a recipe takes."""
    shared = {name: tuple(f.name for f in dataclasses.fields(cls)) for name, cls in SECTIONS.items()}
    stages = {name: tuple(k for k in stage_fields(name) if k not in OWNER_OF | refused_keys(name)) for name in STAGES}
    return shared | stages


def _key_name(key: Any) -> str:
    return key if isinstance(key, str) else shortened(key)


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe folder (or its recipe.yaml, or a run's recipe.resolved.yaml) with dotted `overrides` applied.

    Raises:
        RecipeError: naming the file, the key and the nearest valid name.
    """
    file = Path(path)
    if os.path.isdir(file):
        file = file / "recipe.yaml"
    if not os.path.isfile(file):  # false, not an error, for what can be no file's name
        raise RecipeError(f"{file}: no such recipe; {_known_recipes()}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{file}: not a text file in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from None
    content = read_yaml(text, str(file))
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of sections, got {type(content).__name__}")
    folder = Path(_coerce(content.pop("folder", str(file.parent)), str, f"{file}: `folder`")).resolve()

    _replace_reward(content, overrides or {})
    origin = {}  # (section, key) -> where it was said, so that an error blames the override and not the file
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            raise RecipeError(f"--{dotted}: an override is --section.key; sections: {', '.join(_section_names())}")
        if content.get(section) is None:
            content[section] = {}
        if isinstance(content[section], dict):
            content[section][key] = value
        origin[section, key] = f"--{dotted}"

    for section in content:
        if section not in _section_names():
            blame = next((o for (s, _), o in origin.items() if s == section), str(file))
            near = nearest(_key_name(section), _section_names())
            first = next(iter(content[section] or ()), None) if isinstance(content[section], dict) else _key_name(section)
            advice = "" if near else instead_of(_key_name(first), (), stage=None)
            raise RecipeError(f"{blame}: unknown section `{_key_name(section)}`{near or advice}")

    def build(section: str, builder: Callable[[str, Any, str], Any]) -> Any:
        values = {} if content.get(section) is None else content[section]
        try:
            _refuse_secrets(section, values, str(file))
            return builder(section, values, str(file))
        except RecipeError as error:  # blame the override, where one set the key
            message = str(error)
            for (s, key), flag in origin.items():
                if s == section and f"`{section}.{key}`" in message:
                    message = message.replace(f"{file}:", f"{flag}:", 1)
            raise RecipeError(message) from None

    sections = {name: build(name, _build_section) for name in SECTIONS}
    try:
        sections["reward"].all_terms()
    except RecipeError as error:
        blame = next((o for (s, _), o in origin.items() if s == "reward"), str(file))
        raise RecipeError(f"{blame}: {error}") from None
    if "reward.normalize_prompts" in (overrides or {}) and not sections["reward"].normalize:
        raise RecipeError("--reward.normalize_prompts: `reward.normalize_prompts` needs `reward.normalize` true")
    given = {name: {key for section, key in origin if section == name} for name in STAGES}
    stages = {name: build(name, functools.partial(_build_stage, given=given[name])) for name in STAGES}
    return Recipe(folder=folder, stages=stages, **sections)


def _replace_reward(content: dict[str, Any], overrides: dict[str, Any]) -> None:
    """An override that names another kind of reward than the file's takes its place, with all that the file says of the old.

    What only a reward adapter can (`reward_baseline`) goes with it.
    """
    kinds = ("adapter", "model", "function", "terms")
    named = {kind for kind in kinds if overrides.get(f"reward.{kind}")}
    reward = content.get("reward")
    if not isinstance(reward, dict) or named <= {kind for kind in kinds if reward.get(kind)}:  # also where none is named
        return
    for key in ("terms", *(f.name for f in dataclasses.fields(RewardTerm))):
        reward.pop(key, None)
    terms = overrides.get("reward.terms")
    parts = terms if isinstance(terms, list) else []
    if "adapter" not in named and not any(isinstance(term, dict) and term.get("adapter") for term in parts):
        for stage in ("ppo", "a2c"):
            if isinstance(content.get(stage), dict) and content[stage].get("reward_baseline"):
                content[stage]["reward_baseline"] = False


def _section_names() -> list[str]:
    return [*SECTIONS, *STAGES]


def _known_recipes() -> str:
    names = sorted(str(p.parent) for p in Path("recipes").glob("*/recipe.yaml"))
    return f"recipes here: {', '.join(names)}" if names else "give a folder that holds a recipe.yaml"


def section_of(stage: str) -> str:
    """The recipe section of a stage: `reward` the stage has `reward_training`, since `reward` is the model itself."""
    return "reward_training" if stage == "reward" else stage
