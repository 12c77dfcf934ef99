"""The seam of rewards. A kind is a key of `RewardTerm`, listed in `REWARD_KINDS`, and a module here of the same name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.rollouts.samples import Samples


class RewardError(RecipeError):
    """A reward failed on single completions. `rows`: their `prompt`, `completion` and `what` is wrong."""

    def __init__(self, message: object, rows: list[dict[str, Any]] | None = None) -> None:
        super().__init__(message)  # alone: `pickle` brings the rows to another process by itself
        self.rows = rows or []


class Reward(Protocol):
    """r(x, y), one number a completion.

    One that is an `nn.Module` is given a few rows at a time, one after the other. Others, which wait for somebody else's code,
    are asked all at once, each for the whole batch and in a thread of its own.
    """

    def score(self, samples: Samples) -> tuple[Tensor, Tensor | None]:
        """The scores, NaN for "no opinion", and which rows failed, both [batch]; of an `nn.Module` none is NaN and none failed.

        Raises:
            RewardError: rows failed, and the recipe does not say to skip such rows.
        """


@runtime_checkable
class PrefixReward(Reward, Protocol):
    """A reward that also says what the text so far is worth, for `ppo.reward_baseline`."""

    def prefix_score(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """The scores [batch], and r of the text up to and with each position [batch, context + response]."""


@dataclass
class Shared:
    """What a recipe's rewards are loaded with; each kind's `load(term, shared)` takes what it needs.

    path: from a path in the recipe to where it lies, or to a Hub id.
    dtype: `model.dtype`.
    ends: the backbone's end tokens, eos first.
    function: the function of task.py with this name.
    """

    path: Callable[[str], str]
    dtype: torch.dtype
    backbone: PreTrainedModel
    ends: Sequence[int]
    function: Callable[[str], Callable[..., Any]]
