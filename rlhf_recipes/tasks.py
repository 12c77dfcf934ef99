"""Loads a recipe's task.py and checks what its functions return."""

import functools
import importlib.util
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from pathlib import Path
from typing import Any

from datasets import Dataset

from rlhf_recipes.recipe import Recipe, RecipeError, nearest, shortened

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
    with _theirs(f"{file}: cannot be imported", file.resolve()):
        return _import(file.resolve(), file.stat().st_mtime_ns)


@contextmanager
def _theirs(what: str, file: Path) -> Iterator[None]:
    """Whatever code of a task raises becomes one line that says what failed and at which line of its `file`."""
    try:
        yield
    except RecipeError:  # a task's own words
        raise
    except SyntaxError as error:
        raise RecipeError(f"{what}: {error.msg} at {Path(error.filename or file).name}:{error.lineno or 1}") from error
    except SystemExit as error:  # sys.exit("what is missing")
        raise RecipeError(f"{what}: {error}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        at = f" at {file.name}:{lines[-1]}" if lines else ""
        raise RecipeError(f"{what}: {type(error).__name__}: {error}{at}") from error


@functools.cache
def _import(file: Path, modified: int) -> types.ModuleType:
    """The module of a file as it was `modified`, one a process: what it has read once, it need not read again.

    A recipe's folder may be read-only, and a run that is refused writes nothing: no `__pycache__` is left there.
    """
    sys.path_hooks.insert(0, functools.partial(_uncached, file.parent))
    sys.path_importer_cache.pop(str(file.parent), None)
    name = f"task_{file.parent.name}"
    spec = importlib.util.spec_from_file_location(name, file, loader=_UncachedLoader(name, str(file)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _UncachedLoader(SourceFileLoader):
    """Compiles the source each time: a cache of it is neither read nor written."""

    def path_stats(self, path: Any) -> Any:
        raise OSError("without a modification time Python passes over the cache")


def _uncached(folder: Path, path: str) -> FileFinder:
    """Finds what task.py imports from its own `folder`; an environment that lies in there keeps its caches."""
    found = Path(path).resolve()
    if not found.is_relative_to(folder) or found.is_relative_to(Path(sys.prefix).resolve()):
        raise ImportError
    return FileFinder(path, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_UncachedLoader, SOURCE_SUFFIXES))


def task_function(task: types.ModuleType, name: str) -> Callable[..., Any]:
    """`task.name`, or a RecipeError that says what it should be."""
    function = getattr(task, name, None)
    if not callable(function):
        own = [key for key, value in vars(task).items() if callable(value) and key not in (*COLUMNS, "gold_reward")]
        raise RecipeError(
            f"{task.__file__}: this stage needs a function `{name}`{nearest(name, own)}; recipes/README.md has its contract"
        )
    return function


def load_dataset(task: types.ModuleType, function: str, split: str) -> Dataset:
    """`task.function(split)`, checked: a non-empty Dataset with the columns the stages read.

    Args:
        function: "load_prompts", "load_preferences" or "load_demonstrations".
        split: "train" or "eval".
    """
    where = f"{task.__file__}: `{function}({split!r})`"
    load = task_function(task, function)
    with _theirs(f"{where} failed", Path(str(task.__file__))):
        dataset = load(split)
    if not isinstance(dataset, Dataset):
        raise RecipeError(f"{where} returned {type(dataset).__name__}, expected a datasets.Dataset")
    if len(dataset) == 0:
        raise RecipeError(f"{where} returned no rows")
    if not any(columns <= set(dataset.column_names) for columns in COLUMNS[function]):
        wanted = " or ".join(", ".join(sorted(c)) for c in COLUMNS[function])
        raise RecipeError(f"{where} has the columns {dataset.column_names}, expected {wanted}")
    columns = sorted(set().union(*COLUMNS[function]) & set(dataset.column_names))
    plain = "prompt" in columns and isinstance(dataset[0]["prompt"], str)  # then so is what follows a prompt
    for column in columns:
        text, chat = column != "messages", column == "messages" or (column != "text" and not plain)
        for row, value in enumerate(dataset[column]):
            if not (text and isinstance(value, str)) and not (chat and _is_chat(value)):
                wanted = " or ".join(["text"] * text + ["chat messages with `role` and `content`"] * chat)
                raise RecipeError(f"{where}: `{column}` of row {row}: expected {wanted}, got {shortened(value)}")
    return dataset


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and m.get("role") is not None and m.get("content") is not None for m in value)
    )


def optional_gold(task: types.ModuleType) -> Callable[..., list[float]] | None:
    """The task's `gold_reward`: never trained on, only watched."""
    return task_function(task, "gold_reward") if getattr(task, "gold_reward", None) is not None else None
