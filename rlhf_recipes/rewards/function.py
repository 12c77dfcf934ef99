"""The reward that is a python function of task.py."""

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_recipes.data.tokens import is_chat
from rlhf_recipes.recipe.sections import RewardTerm
from rlhf_recipes.rewards.reward import RewardError, Shared
from rlhf_recipes.rollouts.samples import Samples
from rlhf_recipes.tasks import reward_arguments

NO_TEMPLATE = "use a model that has one, or prompts of text"


class FunctionReward:
    """A python reward of task.py: a score, or None for "no opinion", a row; called as TRL's GRPO does, by keyword:
    `reward(prompts=..., completions=..., completion_ids=..., **columns)` with what it names.

    It may be async. Chat prompts are message lists, and so are the completions then.
    """

    def __init__(self, function: Callable[..., Any], on_error: Literal["stop", "skip"] = "stop") -> None:
        self.function, self.on_error = function, on_error

    def score(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """
        Raises:
            RewardError: with `on_error: stop`, at an exception or a value that is no score.
            RecipeError: it has a parameter that nothing gives.
        """
        self._arguments(samples[:1])
        try:
            returned = self._call(samples)
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            returned = self._one_by_one(samples, error)
        complaints = [_complaint(value) for value in returned]
        if self.on_error == "stop" and any(complaints):
            raise self._failure(samples, complaints)
        failed = [complaint is not None for complaint in complaints]
        scores = [math.nan if value is None or lost else float(value) for value, lost in zip(returned, failed, strict=True)]
        return torch.tensor(scores), torch.tensor(failed)

    def _arguments(self, samples: Samples) -> tuple[list[Any], dict[str, Any]]:
        completions: list[Any] = samples.texts
        if is_chat(samples.prompts[0]):
            completions = [[{"role": "assistant", "content": text}] for text in samples.texts]
        ids = [row[keep].tolist() for row, keep in zip(samples.responses, samples.mask, strict=True)]
        own = {"prompts": samples.prompts, "completions": completions, "completion_ids": ids}
        return reward_arguments(self.function, samples.columns | own)

    def _call(self, samples: Samples) -> list:
        arguments, named = self._arguments(samples)
        returned = self.function(*arguments, **named)
        if inspect.iscoroutine(returned):
            with ThreadPoolExecutor(1) as thread:  # which has no event loop yet: a notebook's own is running
                returned = thread.submit(asyncio.run, returned).result()
        returned = list(returned)
        if len(returned) != len(samples):
            raise ValueError(f"returned {len(returned)} scores for {len(samples)} completions")
        return returned

    def _one_by_one(self, samples: Samples, error: Exception) -> list:
        """The scores of the rows that do not raise, and what those raise that do; `error` if that is none of them."""
        returned: list[Any] = []
        for i in range(len(samples)):
            try:
                returned += self._call(samples[i : i + 1])
            except Exception as own:  # noqa: BLE001 - a user's function may raise anything
                returned.append(own)
        if not any(isinstance(value, Exception) for value in returned):
            return [error] * len(samples)
        return returned

    def _failure(self, samples: Samples, complaints: list[str | None]) -> RewardError:
        rows = [
            {"prompt": prompt, "completion": text, "what": complaint}
            for prompt, text, complaint in zip(samples.prompts, samples.texts, complaints, strict=True)
            if complaint
        ]
        return RewardError(f"{rows[0]['what']} ({len(rows)} of {len(samples)} completions)", rows)


def _complaint(value: Any) -> str | None:
    """What is wrong with a value that a reward returned; None if it is a score or None."""
    if value is None:
        return None
    if isinstance(value, Exception):
        frames = traceback.extract_tb(value.__traceback__)
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f"{type(value).__name__}: {value}{where}"
    try:
        return None if math.isfinite(value) else f"returned {value}"
    except TypeError:
        return f"returned {value!r}, which is no number"


def load(term: RewardTerm, shared: Shared) -> FunctionReward:
    return FunctionReward(shared.function(str(term.function_name)), term.on_error)
