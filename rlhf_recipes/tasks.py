"""Loads a recipe's task.py and checks what its functions return."""

import functools
import importlib.util
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from rlhf_recipes.recipe import Recipe, RecipeError

COLUMNS = {
    "load_prompts": [{"prompt"}],
    "load_preferences": [{"prompt", "chosen", "rejected"}],
    "load_demonstrations": [{"text"}, {"messages"}, {"prompt", "completion"}],
}


def load_task(recipe: Recipe) -> types.ModuleType:
    """Imports `task.py` beside the recipe.

    Raises:
        RecipeError: there is none, or importing it failed.
    """
    file = recipe.folder / "task.py"
    if not file.is_file():
        raise RecipeError(f"{file}: no such file; a recipe's task.py gives its data (see recipes/imdb/task.py)")
    return _import(file.resolve(), file.stat().st_mtime_ns)


@functools.cache
def _import(file: Path, modified: int) -> types.ModuleType:
    """The module of a file as it was `modified`, one a process: what it has read once, it need not read again."""
    spec = importlib.util.spec_from_file_location(f"task_{file.parent.name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task_function(task: types.ModuleType, name: str) -> Callable[..., Any]:
    """`task.name`, or a RecipeError that says what it should be."""
    function = getattr(task, name, None)
    if not callable(function):
        raise RecipeError(f"{task.__file__}: this stage needs a function `{name}`; recipes/README.md has its contract")
    return function


def load_dataset(task: types.ModuleType, function: str, split: str) -> Dataset:
    """`task.function(split)`, checked: a non-empty Dataset with the columns the stages read.

    Args:
        function: "load_prompts", "load_preferences" or "load_demonstrations".
        split: "train" or "eval".
    """
    dataset = task_function(task, function)(split)
    where = f"{task.__file__}: `{function}({split!r})`"
    if not isinstance(dataset, Dataset):
        raise RecipeError(f"{where} returned {type(dataset).__name__}, expected a datasets.Dataset")
    if len(dataset) == 0:
        raise RecipeError(f"{where} returned no rows")
    if not any(columns <= set(dataset.column_names) for columns in COLUMNS[function]):
        wanted = " or ".join(", ".join(sorted(c)) for c in COLUMNS[function])
        raise RecipeError(f"{where} has the columns {dataset.column_names}, expected {wanted}")
    for column in set().union(*COLUMNS[function]) & set(dataset.column_names):
        row = next((i for i, value in enumerate(dataset[column]) if value is None), None)
        if row is not None:
            raise RecipeError(f"{where}: row {row} has no `{column}` (None)")
    return dataset


def optional_gold(task: types.ModuleType) -> Callable[..., list[float]] | None:
    """The task's `gold_reward`: never trained on, only watched."""
    return getattr(task, "gold_reward", None)
