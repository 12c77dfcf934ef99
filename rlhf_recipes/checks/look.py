"""What --dry-run sees of a task: its data and functions, as far as they are on this machine and quick to load.

Of heavy packages only `datasets` is imported, and nothing is fetched or tokenised for good. What task.py imports is its own.
"""

import signal
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from rlhf_recipes.checks.files import backbone_vocabulary
from rlhf_recipes.data.pair_files import pairs_file, read_pairs
from rlhf_recipes.recipe.errors import RecipeError, nearest
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.recipe.stages import STAGES, Stage
from rlhf_recipes.runs.fingerprint import differences, fingerprint, names_in, recorded_fingerprint

SECONDS = 1.8  # for all of it; recipes/imdb takes 1.6 on a free core
_NOT_HERE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")  # of huggingface_hub
_LONGEST = 64  # rows, by characters, whose tokens are counted


@dataclass
class Seen:
    """lines: what to tell; longest: tokens of the longest training row of a supervised stage, None where not known."""

    lines: list[str] = field(default_factory=list)
    longest: int | None = None


class _TimeUpError(BaseException):
    """No `except Exception` of a task's catches it."""


class _ElsewhereError(Exception):
    """Data that is not on this machine."""


def look(recipe: Recipe, name: str, seconds: float = SECONDS) -> Seen:
    """Loads task.py and what the stage will ask it for, for at most `seconds`.

    Raises:
        RecipeError: what would stop the run: a function that is missing or cannot be called, a column, a row, pairs of another
            vocabulary.
    """
    stage, seen = STAGES[name], Seen()
    if not stage.data:
        return seen
    calls, at = _calls(recipe, stage), ""
    _named(recipe, stage, [function for function, _ in calls])
    looked: list[str] = []
    try:
        with _time_limit(seconds):
            if stage.sampled_pairs and recipe.preferences.path is not None:
                at = "`preferences.path`"
                looked.append(_pairs(recipe, seen))
            at = "task.py"
            from rlhf_recipes.tasks import for_rewards, load_dataset, load_task

            with _offline():
                task = _here(load_task, recipe.folder)
                functions = _reward_functions(recipe, stage)
                if (stage.judged or stage.judges) and getattr(task, "gold_reward", None) is not None:
                    functions.append("gold_reward")
                _usable(task, functions, None)
                for function, split in calls:
                    at = f"{function}({split!r})"
                    dataset = _here(load_dataset, task, function, split)
                    looked.append(f"{at} {len(dataset)} rows")
                    if function == "load_prompts":
                        _usable(task, functions, for_rewards(dataset.column_names))
                    if stage.supervised and not recipe.stages[stage.section].get("packing"):
                        at = f"the lengths of {at}"
                        seen.longest = max(filter(None, (seen.longest, _longest_row(recipe, dataset))), default=None)
                at = ""
    except _TimeUpError:
        at += f", which takes more than {seconds:g} s"
    except _ElsewhereError as elsewhere:
        at += f", whose data is not on this machine ({elsewhere})"
    if looked:
        seen.lines.append(f"# data: {', '.join(looked)}")
    if at:
        seen.lines.append(f"# not looked at: {at}; `python -m rlhf_recipes check {recipe.folder}` looks at all of it")
    return seen


def _calls(recipe: Recipe, stage: Stage) -> list[tuple[str, str]]:
    """What the stage will ask task.py for."""
    calls, pairs = list(stage.data), recipe.preferences
    if stage.sampled_pairs:
        samples = pairs.path is None and pairs.source == "sampled"
        if not (samples or recipe.stages[stage.section].get("rounds", 1) > 1 or recipe.reward.normalize):
            calls.remove(("load_prompts", "train"))
        if pairs.path is not None or pairs.source != "task":
            calls.remove(("load_preferences", "train"))
    return calls


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """
    Raises:
        _TimeUpError: in the main thread, where a signal can say so.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise _TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # and again, where a destructor swallowed it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _offline() -> Iterator[None]:
    """While this lasts, `datasets` takes what was downloaded before and asks no server."""
    import datasets
    import huggingface_hub

    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
    ):
        yield


def _here(load: Callable[..., Any], *args: Any) -> Any:
    """
    Raises:
        _ElsewhereError: it would have to be fetched.
    """
    try:
        return load(*args)
    except RecipeError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConnectionError) or type(cause).__name__ in (
                "OfflineModeIsEnabled",
                "LocalEntryNotFoundError",
            ):
                raise _ElsewhereError(str(cause).splitlines()[0]) from None
            cause = cause.__cause__ or cause.__context__
        raise


# --- functions ---------------------------------------------------------------------------------------------------


def _reward_functions(recipe: Recipe, stage: Stage) -> list[str]:
    """The names of task.py's functions that the stage calls on completions."""
    if not stage.samples:
        return []
    return [term.function_name for term in recipe.reward.all_terms() if term.function_name]


def _named(recipe: Recipe, stage: Stage, functions: list[str]) -> None:
    """Looks for what the stage needs in task.py's source, which takes no time.

    Raises:
        RecipeError: a function is not there.
    """
    file = recipe.folder / "task.py"
    there = names_in(file)
    if there is None:
        return
    for name in dict.fromkeys([*functions, *_reward_functions(recipe, stage)]):
        if name not in there:
            raise RecipeError(
                f"{file}: this stage needs a function `{name}`{nearest(name, there)}; recipes/README.md has its contract"
            )


def _usable(task: types.ModuleType, functions: list[str], columns: list[str] | None) -> None:
    """
    Args:
        columns: of the prompts; None where they are not known yet, which any are.

    Raises:
        RecipeError: a function is not there, or has a parameter that nothing gives.
    """
    from rlhf_recipes.tasks import GIVEN, reward_arguments, task_function

    for name in functions:
        function = task_function(task, name)
        if columns is not None:
            reward_arguments(function, dict.fromkeys((*GIVEN, *columns)))


# --- pairs and lengths -------------------------------------------------------------------------------------------


def _pairs(recipe: Recipe, seen: Seen) -> str:
    file, tokenizer = pairs_file(str(recipe.preferences.path), recipe.folder), _tokenizer(recipe)
    decode = None if tokenizer is None else lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    rows, _ = read_pairs(file, backbone_vocabulary(recipe), decode)
    seen.lines += made_for_others(recipe, file)
    return f"{file} {len(rows)} pairs"


def made_for_others(recipe: Recipe, file: Path) -> list[str]:
    """A line where a run of scripts/preferences.py made the pairs by another reward, sampling or backbone."""
    parts = ("reward", "sampling", "backbone")
    found = differences(recorded_fingerprint(file.parent), fingerprint(recipe, "preferences"), parts)
    return [f"warning: the pairs of {file} were made with {'; '.join(found.values())}"] if found else []


def _tokenizer(recipe: Recipe) -> Any:
    """The backbone's, without transformers, which would take seconds; None where its file is not here or not read so."""
    file = Path(recipe.path(recipe.model.path)) / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    with suppress(Exception):  # tokenizers raises nothing more special; the run says what is wrong with the file
        return Tokenizer.from_file(str(file))
    return None


def _longest_row(recipe: Recipe, dataset: Any) -> int | None:
    """Tokens of the longest row, from those with the most characters; None without a tokenizer."""
    if "input_ids" in dataset.column_names:
        return max(map(len, dataset["input_ids"]))
    tokenizer = _tokenizer(recipe)
    if tokenizer is None:
        return None
    sides = [("prompt", "chosen"), ("prompt", "rejected"), ("prompt", "completion"), ("text",), ("messages",)]
    texts: list[str] = []
    for side in sides:
        if set(side) <= set(dataset.column_names):
            rows = zip(*(dataset[name][:] for name in side), strict=True)
            texts += ["".join(map(_text, row)) for row in rows]
    longest = sorted(texts, key=len)[-_LONGEST:]
    return max(len(encoding.ids) for encoding in tokenizer.encode_batch(longest)) + 1  # eos


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "".join(str(message["content"]) for message in value)
