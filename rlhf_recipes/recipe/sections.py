"""The shared sections of a recipe: their keys, types and defaults."""

import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf_recipes.recipe.errors import RecipeError, SectionError
from rlhf_recipes.recipe.validation import Section
from rlhf_recipes.recipe.yaml_text import write_yaml

LATEST = "latest"  # beside the runs of a stage: a link to the newest
Positive = Annotated[int, Field(gt=0)]


# --- the shared sections -----------------------------------------------------------------------------------------


class ModelSection(Section):
    """The frozen backbone under every role."""

    path: str = Field(description="a Hub id, or a folder relative to the recipe")
    trust_remote_code: bool = Field(
        False, description="execute the Python code that the model brings along (`auto_map` in its config)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the backbone in memory; adapters are float32"
    )
    quantization: Literal["4bit"] | None = Field(
        None,
        description="the backbone's linear layers in 4 bits (NF4), as QLoRA has them; needs bitsandbytes, and `dtype` bfloat16",
    )
    attention: str | None = Field(
        None,
        description="transformers' `attn_implementation`: sdpa, eager (faster for short texts on a CPU), flash_attention_2, "
        "...",
    )
    pad_token: str | None = Field(
        None,
        description="a token of the vocabulary to pad with, where the tokenizer has none, or its eos, as Pythia's and Llama's "
        "have",
    )
    eos_token: str | None = Field(
        None,
        description="the token that ends a text or an answer, where it isn't the tokenizer's eos: <end_of_turn> of "
        "Gemma, <|end|> of Phi",
    )
    chat_template: str | None = Field(
        None, description="a Jinja file relative to the recipe, in place of the tokenizer's own template"
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="in which scripts/sft.py writes a backbone"
    )
    architecture: dict[str, Any] | None = Field(
        None, description="a transformers config (`model_type`, `vocab_size`, ...) for `sft.from_scratch`"
    )

    def check_pad(self, pad: str | None, eos: str | None) -> None:
        """
        Raises:
            RecipeError: the tokenizer has no pad token of its own. Whoever has token ids alone would take an end for padding.
        """
        if pad is None or pad == eos:
            raise RecipeError(
                f"the tokenizer of `model.path` {self.path} has the pad token {pad!r} and the eos token {eos!r}; pad must "
                f"exist and differ from eos, or an end is taken for padding. Name another token of its vocabulary with "
                f"`model.pad_token`"
            )


class LoraSection(Section):
    """The adapter of every trained role; names as in PEFT's LoraConfig (`alpha` and `dropout` are its lora_alpha and
    lora_dropout)."""

    r: int = Field(16, gt=0, description="rank")
    alpha: float = Field(32, gt=0, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input while training SFT and rewards")
    target_modules: str | list[str] = Field(
        "all-linear", description="the layers with an adapter: names, a pattern, or all-linear"
    )
    exclude_modules: str | list[str] | None = Field(None, description="layers of those that get none")
    target_parameters: list[str] | None = Field(
        None, description="parameters with an adapter that are no layer's, as a mixture's experts"
    )
    layers_to_transform: int | list[int] | None = Field(None, description="the numbers of the only layers that get one")
    layers_pattern: str | list[str] | None = Field(
        None, description="the name of the list of layers, for `layers_to_transform`"
    )
    rank_pattern: dict[str, Positive] | None = Field(None, description="other ranks, by layer")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = Field(None, description="other alphas, by layer")
    modules_to_save: list[str] | None = Field(None, description="modules trained and saved whole beside the adapter")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = Field(
        None, description="tokens whose embeddings are trained"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r): arXiv 2312.03732")
    use_dora: bool = Field(False, description="train the weights' magnitudes apart from their directions: arXiv 2402.09353")
    lora_bias: bool = Field(False, description="a bias in the adapter's second matrix")
    init_lora_weights: bool | Literal["gaussian"] = Field(
        True, description="how A starts; B starts at 0, and so the policy as the reference"
    )


REWARD_KINDS = {  # each a key of RewardTerm and a module of rewards/; and the keys that this kind alone reads
    "adapter": (),  # `read_eos` is also what scripts/reward.py trains an adapter to read
    "model": ("label", "probability", "pair", "trust_remote_code", "max_length"),
    "function": ("on_error",),
}


class RewardTerm(Section):
    """One reward: an adapter on the backbone, a model of its own, or a function of task.py."""

    adapter: str | None = Field(None, description="a LoRA adapter and score head trained by scripts/reward.py on this backbone")
    model: str | None = Field(None, description="any sequence classifier with its own tokenizer: a Hub id, or a folder")
    function: bool | str | None = Field(None, description="a function of task.py by its name; true means `reward`")
    name: str | None = Field(None, description="in the metrics; default: the last part of the path, or the function's name")
    weight: float = Field(1.0, description="in the sum of several rewards")
    read_eos: bool = Field(True, description="the adapter sees the end-of-sequence token of a finished text")
    label: int | str | None = Field(None, description="the column of the model's output; needed where it has several")
    probability: bool = Field(False, description="the model's softmax (of one label: sigmoid) instead of its logit")
    pair: bool = Field(False, description="the model's tokenizer gets prompt and completion as two segments")
    trust_remote_code: bool = Field(False, description="execute the Python code that the `model` brings along")
    max_length: Positive | None = Field(None, description="tokens the model reads; a longer text loses its beginning")
    on_error: Literal["stop", "skip"] = Field("stop", description="where a function fails: stop the run, or leave the row out")

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

    def _is_default(self, key: str) -> bool:
        return getattr(self, key) == RewardTerm.model_fields[key].default


class RewardSection(RewardTerm):
    """What is maximised: one reward, or a weighted sum."""

    terms: list[dict[str, Any]] | None = Field(
        None, description="several rewards, each a mapping of the keys above, in place of those"
    )
    normalize: bool = Field(
        False, description="each reward less its mean, over its standard deviation, both of the reference on training prompts"
    )
    normalize_prompts: int = Field(
        256, gt=0, description="training prompts that `normalize` samples a completion of, the first of them"
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(None, description="limits the sum to -clip and clip, after normalising")
    length_penalty: float = Field(0.0, description="taken off for each token of the completion")
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = Field(None, description="taken off a completion without an end")

    @property
    def adapter_reads_eos(self) -> bool:
        """What scripts/reward.py trains the adapter to read."""
        return next((term.read_eos for term in self.all_terms() if term.adapter), self.read_eos)

    def all_terms(self) -> list[RewardTerm]:
        """The rewards of the sum."""
        terms: list[RewardTerm] = [self]
        return terms if self.terms is None else [RewardTerm(**values) for values in self.terms]

    def check(self) -> None:
        """
        Raises:
            SectionError: there is no reward, one names no or several sources, or two have one name.
        """
        terms = self.all_terms()
        changed = [] if self.terms is None else [key for key in RewardTerm.model_fields if not self._is_default(key)]
        if changed:
            raise SectionError(None, f"`reward.terms`: then `reward.{changed[0]}` belongs in one of them")
        for i, term in enumerate(terms):
            where = "reward" if self.terms is None else f"reward.terms[{i}]"
            sources = [kind for kind in REWARD_KINDS if getattr(term, kind)]
            if len(sources) != 1:
                (*others, last), named = REWARD_KINDS, " and ".join(sources) or "none"
                raise SectionError(None, f"`{where}` needs one of {', '.join(others)} and {last}, and names {named}")
            for kind, key in ((kind, key) for kind, keys in REWARD_KINDS.items() for key in keys if kind not in sources):
                if not term._is_default(key):
                    said = f"has no effect on {sources[0]}: it is of a reward `{kind}`; leave it out"
                    raise SectionError(None, f"`{where}.{key}` {said}")
        titles = [term.title for term in terms]
        for title in titles:
            if titles.count(title) > 1:
                raise SectionError(None, f"`reward.terms`: two are named {title}; give one a `name`")
        if not terms:
            raise SectionError(None, "`reward.terms` is empty; give at least one reward")


class ObjectiveSection(Section):
    """J = E[r] - beta * KL(policy || reference)."""

    beta: float = Field(0.1, ge=0, description="the leash: nats of KL are priced at beta units of reward")


class DataSection(Section):
    """Lengths every stage shares."""

    max_prompt_tokens: int = Field(512, gt=0, description="longer prompts are left out, and counted")
    max_completion_tokens: int = Field(128, gt=0, description="how long a sampled completion may get")


class SamplingSection(Section):
    """pi(y|x) is defined at this temperature, for policy and reference alike."""

    temperature: float = Field(1.0, gt=0, description="1.0 is the model itself, and what DPO assumes")
    stop: list[str] | None = Field(None, description="texts with any of which a completion ends, as it does with an end token")


class RunSection(Section):
    """Where a run goes and who watches it."""

    seed: int = Field(0, ge=0, lt=2**32, description="of sampling, data order and initial weights")
    tracker: Literal["wandb", "none"] = Field(
        "wandb", description="wandb runs go offline by themselves without login or network"
    )
    project: str = Field("rlhf-recipes", description="the wandb project")
    group: str | None = Field(None, description="the wandb group; default: the task")
    name: str | None = Field(None, description="the run folder's name; default: time and seed")
    trial: bool = Field(
        False, description="one of a sweep's runs: `latest` does not point to it, and it is judged or merged only by name"
    )
    resume: str | None = Field(None, description="a run's folder to resume, or `latest`; --resume says the same")
    max_skipped_steps: int = Field(
        10,
        gt=0,
        description="optimizer steps in a row whose gradient is not finite, and which are left out, after which a run stops",
    )
    output: str = Field("outputs", description="runs are written to <output>/<task>/<stage>/<run>, relative to where you are")


class PreferencesSection(Section):
    """The pairs that scripts/dpo.py trains on."""

    source: Literal["sampled", "task"] = Field(
        "sampled",
        description="`sampled` from the reference and judged by the reward model, or the `task`'s own load_preferences",
    )
    label: Literal["bradley_terry", "expected", "argmax"] = Field(
        "bradley_terry",
        description="which of two is chosen: drawn with P = sigmoid(r1 - r2), as DPO assumes; `expected`: both orders, "
        "weighted by their P, the same optimum without the draw's noise; `argmax`: the higher reward, another optimum",
    )
    pairs_per_prompt: int = Field(4, gt=0, description="pairs sampled for each training prompt")
    prompts: Positive | None = Field(None, description="training prompts to use, the first of them; default all")
    batch_size: int = Field(64, gt=0, description="completions sampled at a time")
    path: str | None = Field(
        None,
        description="pairs to train on: a folder that scripts/preferences.py made, or a .jsonl file of `prompt`, `chosen` "
        "and `rejected`, text or chat messages; without one scripts/dpo.py makes its pairs first",
    )


class EvaluateSection(Section):
    """Held-out evaluation: scripts/evaluate.py, and the end of every policy stage."""

    prompts: int = Field(256, gt=0, description="held-out prompts, the first of the evaluation split")
    batch_size: int = Field(64, gt=0, description="sequences in one forward pass")
    samples: int = Field(10, gt=0, description="side-by-side samples in the closing table")
    completions: int = Field(8, gt=0, description="completions of each prompt by each policy (scripts/evaluate.py)")
    reference_completions: int = Field(
        64, gt=0, description="of the reference: they also give best-of-n and the estimate of the optimum"
    )
    policies: list[str] | None = Field(
        None,
        description="what scripts/evaluate.py judges: `reference`, `best-of-N`, and [NAME=]FOLDER of an adapter or a full "
        "model; default: the reference, best-of-4, 16 and 64, and the latest run of each policy stage",
    )


class WatchSection(Section):
    """What PPO and A2C look at while they train, with `eval_strategy: steps`, and what over-optimisation leads to."""

    prompts: int = Field(128, ge=2, description="held-out prompts judged every `eval_steps`, the first of the evaluation split")
    on_over_optimisation: Literal["warn", "stop", "rollback"] = Field(
        "warn",
        description="where the reward rises and gold falls: say so, stop there, or stop and end with the best policy by gold",
    )


class ReportSection(Section):
    """The page that scripts/report.py makes."""

    evaluation: str | None = Field(None, description="a run's folder of scripts/evaluate.py; default: the latest of the task")


class MergeSection(Section):
    """The model of its own that scripts/merge.py makes."""

    adapter: str | None = Field(
        None, description="a run of a policy stage, or any folder of an adapter; default: the latest PPO run"
    )
    push: str | None = Field(
        None, description="upload it to this repository of the Hub, ORG/NAME; needs HF_TOKEN or `hf auth login`"
    )
    private: bool = Field(True, description="a repository that `push` creates is private")


SECTIONS: dict[str, type[Section]] = {
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
        sections = {name: getattr(self, name).model_dump() for name in SECTIONS}
        return {"folder": str(self.folder), **sections, **self.stages}

    def to_yaml(self) -> str:
        return write_yaml(self.to_dict())


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
