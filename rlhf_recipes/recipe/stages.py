"""Every stage as a row of facts: whoever treats stages differently asks the row, and nobody asks for a stage's name.

Nothing heavy is imported here.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_recipes.recipe.keys import EVERYWHERE, NO_SECRETS, OWNER_OF, REFUSED, SECRET
from rlhf_recipes.recipe.trl_fields import Field, Source, fields_of


@dataclass(frozen=True)
class Style:
    """How a report draws the policies of a stage."""

    label: str
    colour: str
    marker: str  # matplotlib's
    label_side: str  # where the label of a beta or an n stands


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is true of a stage. A new trainer of TRL's is one row here, its file in algorithms/ and its script."""

    name: str
    section: str  # of a recipe: the keys that are the stage's own
    config: tuple[Source, ...] = ()  # the dataclasses whose fields are the section's keys, base first; none: it trains nothing
    refused: Mapping[str, str] = field(default_factory=dict)  # fields that it would accept and ignore, and why
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of fields, where they are not TRL's
    data: tuple[
        tuple[str, str], ...
    ] = ()  # (function of task.py, split) that it may ask for, held-out data first, as a rule the smaller
    # what it does
    loads_weights: bool = True
    online: bool = False  # samples from the policy as it learns
    pairs: bool = False  # trains on pairs
    samples: str | None = None  # completions, for the rewards to judge: the section that says how many at a time
    judged: bool = False  # ends with its policy judged on held-out prompts
    judges: bool = False  # any policies: `evaluate.policies`
    merges: bool = False  # an adapter into its backbone
    writes_model: bool = False  # a whole one
    resumable: bool = False
    shardable: bool = False  # by FSDP 2 and DeepSpeed
    held_out_loss: bool = False  # measured while it trains, with `eval_strategy`
    logits: Literal["chunk", "batch", "none"] = "chunk"  # over the vocabulary: of how much at once
    # what it shows
    shown: tuple[str, ...] = ()  # metrics in the progress bar
    curves: tuple[str, ...] = ()  # metrics in a report
    style: Style | None = None

    @property
    def trains(self) -> bool:
        return bool(self.config)

    @property
    def supervised(self) -> bool:
        """Whether it trains on rows of the task's own."""
        return self.trains and self.samples is None

    @property
    def sampled_pairs(self) -> bool:
        """Whether it trains on the pairs of `preferences`: sampled, or given in their place."""
        return self.pairs and self.samples is not None

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        return fields_of(self.config)

    @functools.cached_property
    def refused_keys(self) -> dict[str, str]:
        """Fields that the stage would accept and ignore, or that are secrets, with the reason."""
        secrets = dict.fromkeys(filter(SECRET.search, self.fields), NO_SECRETS)
        return {**secrets, **EVERYWHERE, **self.refused}

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """The fields that its section takes."""
        return tuple(key for key in self.fields if key not in OWNER_OF | self.refused_keys)


_TRAINING_ARGUMENTS = (
    Source("transformers", "training_args.py", "TrainingArguments"),
    Source("trl", "trainer/base_config.py", "_BaseConfig"),
)
_SFT_CONFIG = (
    *_TRAINING_ARGUMENTS,
    Source("trl", "trainer/sft_config.py", "SFTConfig"),
    Source("rlhf_recipes", "algorithms/sft.py", "SFTConfig"),
)
_REWARD_CONFIG = (*_TRAINING_ARGUMENTS, Source("trl", "trainer/reward_config.py", "RewardConfig"))
_A2C_SETTINGS = Source("rlhf_recipes", "recipe/online_settings.py", "A2CSettings")
_PPO_SETTINGS = Source("rlhf_recipes", "recipe/online_settings.py", "PPOSettings")
_DPO_CONFIG = (
    *_TRAINING_ARGUMENTS,
    Source("trl", "trainer/dpo_config.py", "DPOConfig"),
    Source("rlhf_recipes", "algorithms/dpo.py", "DPOConfig"),
)
_PROMPTS = (("load_prompts", "eval"), ("load_prompts", "train"))
_ONLINE_SHOWN = ("objective/scores", "objective/kl")
_ONLINE_CURVES = ("objective/scores", "objective/kl", "objective/rlhf_reward", "policy/entropy_avg")

# Colours of Okabe and Ito, told apart under every common colour blindness; the marker says the same again.
_ROWS = (
    Stage(
        name="sft", section="sft", config=_SFT_CONFIG, refused=REFUSED["sft"],
        data=(("load_demonstrations", "eval"), ("load_demonstrations", "train")),
        writes_model=True, resumable=True, shardable=True, held_out_loss=True,
        shown=("loss", "eval_loss"),
    ),
    Stage(
        name="reward", section="reward_training",  # `reward` is the model itself
        config=_REWARD_CONFIG, refused=REFUSED["reward_training"],
        data=(("load_preferences", "eval"), ("load_preferences", "train")),
        pairs=True, resumable=True, shardable=True, logits="none",
        shown=("loss", "accuracy", "eval_accuracy"),
    ),
    Stage(
        name="preferences", section="preferences", data=(("load_prompts", "train"),), samples="preferences", resumable=True,
    ),
    Stage(
        name="ppo", section="ppo", config=(_A2C_SETTINGS, _PPO_SETTINGS), refused=REFUSED["ppo"], data=_PROMPTS,
        online=True, samples="ppo", judged=True, resumable=True,
        shown=_ONLINE_SHOWN, curves=_ONLINE_CURVES, style=Style("PPO", "#0072B2", "o", "top left"),
    ),
    Stage(
        name="a2c", section="a2c", config=(_A2C_SETTINGS,), refused=REFUSED["a2c"], data=_PROMPTS,
        defaults={"num_ppo_epochs": 1, "num_mini_batches": 1},  # Huang et al. 2022, arXiv 2205.09123
        online=True, samples="a2c", judged=True, resumable=True,
        shown=_ONLINE_SHOWN, curves=_ONLINE_CURVES, style=Style("A2C", "#E69F00", "s", "bottom right"),
    ),
    Stage(
        name="dpo", section="dpo", config=_DPO_CONFIG, refused=REFUSED["dpo"],
        data=(*_PROMPTS, ("load_preferences", "train")),
        defaults={"max_length": None, "precompute_ref_log_probs": True},  # pairs keep to `data`'s lengths; TRL would cut them
        pairs=True, samples="preferences", judged=True, resumable=True, shardable=True, logits="batch",
        shown=("loss", "rewards/accuracies", "rewards/margins"),
        curves=("loss", "rewards/margins", "rewards/accuracies"),
        style=Style("DPO", "#009E73", "D", "bottom left"),
    ),
    Stage(name="evaluate", section="evaluate", data=(("load_prompts", "eval"),), samples="evaluate", judges=True),
    Stage(name="merge", section="merge", data=(("load_prompts", "eval"),), merges=True, writes_model=True),
    Stage(name="report", section="report", loads_weights=False),
)  # fmt: skip
STAGES = {stage.name: stage for stage in _ROWS}
TRAINED = {stage.section: stage for stage in _ROWS if stage.trains}  # by section, in a recipe's order
JUDGED = {stage.name: stage for stage in _ROWS if stage.judged}
