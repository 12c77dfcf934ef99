"""Loads a recipe's task.py and checks what its functions return."""

import functools
import importlib.util
import inspect
import json
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, disable_caching

from rlhf_recipes.recipe.errors import RecipeError, nearest, shortened
from rlhf_recipes.recipe.sections import Recipe

COLUMNS = {
    "load_prompts": [{"prompt"}, {"input_ids"}],
    "load_preferences": [{"prompt", "chosen", "rejected"}],
    "load_demonstrations": [{"text"}, {"messages"}, {"prompt", "completion"}, {"input_ids"}],
}
_MESSAGES = ("prompt", "chosen", "rejected", "completion", "messages")
GIVEN = ("prompts", "completions", "completion_ids")  # to a python reward, under the names of TRL's GRPO
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names, which no chat template knows


def load_task(recipe: Recipe | Path) -> types.ModuleType:
    """Imports the `task.py` of a recipe, or of its folder.

    Raises:
        RecipeError: there is none, or importing it failed.
    """
    file = (recipe if isinstance(recipe, Path) else recipe.folder) / "task.py"
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

    As in TRL, messages may have ShareGPT's `from` and `value`, and a pair's prompt may be what its two sides have in common.

    Args:
        function: "load_prompts", "load_preferences" or "load_demonstrations".
        split: "train" or "eval".
    """
    where = f"{task.__file__}: `{function}({split!r})`"
    load = task_function(task, function)
    with _theirs(f"{where} failed", Path(str(task.__file__))):
        dataset = load(split)
    if not isinstance(dataset, Dataset):
        raise RecipeError(f"{where} returned {type(dataset).__name__}, expected a datasets.Dataset{_instead(dataset)}")
    if len(dataset) == 0:
        raise RecipeError(f"{where} returned no rows")
    if dataset.format["type"] == "custom":
        raise RecipeError(f"{where} has a transform (with_transform), which would run again at each reading; use map instead")
    dataset = dataset.with_format(None)
    if not all(os.access(Path(file["filename"]).parent, os.W_OK) for file in dataset.cache_files):
        disable_caching()  # else what is made of it would be written beside it
    if found := {"image", "images", "audio", "video", "videos"} & set(dataset.column_names):
        raise RecipeError(f"{where} has the column {min(found)}; only text is read here: leave it out with remove_columns")
    with _theirs(f"{where}: its rows cannot be read", Path(str(task.__file__))):
        dataset = _in_trls_form(dataset, where)
        _check_columns(dataset, function, where)
    return dataset


def _instead(returned: Any) -> str:
    """What to return in place of something that is nearly it."""
    if isinstance(returned, DatasetDict | IterableDatasetDict):
        return f"; it has the splits {', '.join(map(str, returned))}: return one of them"
    if isinstance(returned, IterableDataset):
        return "; a stream has no length: return Dataset.from_list(list(dataset.take(1000))), or load without streaming=True"
    return "; Dataset.from_list(rows) makes one" if isinstance(returned, list) else ""


def _in_trls_form(dataset: Dataset, where: str) -> Dataset:
    """With `role` and `content` in messages, and pairs with a prompt."""
    first, columns = dataset[0], dataset.column_names
    messages = [first[name] for name in (*_MESSAGES, "conversations") if name in columns]
    from_value = any(
        isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0] for value in messages
    )
    pairs = {"chosen", "rejected"} <= set(columns)
    whole = pairs and _is_chat(first["chosen"]) and first["chosen"][0]["role"] != "assistant"
    implicit = pairs and ("prompt" not in columns or (isinstance(first["prompt"], str) and whole))
    if not from_value and not implicit and "conversations" not in columns:
        return dataset
    from trl.data_utils import maybe_convert_to_chatml, maybe_extract_prompt  # takes seconds, and few datasets need it

    def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            row = maybe_convert_to_chatml(row)
            for name in _MESSAGES if from_value else ():
                for message in row[name] if isinstance(row.get(name), list) else ():
                    message["role"] = _ROLES.get(message["role"], message["role"])
            row |= maybe_extract_prompt(row) if implicit else {}
            if row.get("prompt") == []:
                raise ValueError("they begin with other messages")
        except Exception as error:  # TRL expects rows in order
            raise RecipeError(
                f"{where}: row {number} has no messages of `role` and `content`, or its `chosen` and `rejected` no prompt in "
                f"common ({type(error).__name__}: {error})"
            ) from error
        return row

    return Dataset.from_list([convert(row, number) for number, row in enumerate(dataset)])


def _check_columns(dataset: Dataset, function: str, where: str) -> None:
    if not any(columns <= set(dataset.column_names) for columns in COLUMNS[function]):
        wanted = " or ".join(", ".join(sorted(c)) for c in COLUMNS[function])
        raise RecipeError(f"{where} has the columns {dataset.column_names}, expected {wanted}")
    columns = sorted(set().union(*COLUMNS[function]) & set(dataset.column_names) - {"input_ids"})
    plain = "prompt" in columns and isinstance(dataset[0]["prompt"], str)  # then so is what follows a prompt
    for column in columns:
        text, chat = column != "messages", column == "messages" or (column != "text" and not plain)
        for row, value in enumerate(dataset[column]):
            if not (text and isinstance(value, str)) and not (chat and _is_chat(value)):
                wanted = " or ".join(["text"] * text + ["chat messages with `role` and `content`"] * chat)
                raise RecipeError(f"{where}: `{column}` of row {row}: expected {wanted}, got {shortened(value)}")
    if "prompt" in columns and not plain:
        for row, value in enumerate(dataset["prompt"]):
            if isinstance(value, str):
                raise RecipeError(f"{where}: `prompt` of row {row}: expected chat messages as in row 0, got {shortened(value)}")
    if "tools" in dataset.column_names or "chat_template_kwargs" in dataset.column_names:
        for row, values in enumerate(
            dataset.select_columns(sorted({"tools", "chat_template_kwargs"} & set(dataset.column_names)))
        ):
            _check_for_template(values, f"{where}: row {row}")


def _check_for_template(values: dict[str, Any], where: str) -> None:
    """A row's `tools` and `chat_template_kwargs`, as TRL takes them."""
    tools, variables = values.get("tools"), values.get("chat_template_kwargs")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise RecipeError(f"{where}: `tools` is not valid JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RecipeError(f"{where}: `tools`: expected a list of JSON schemas, or that as JSON, got {shortened(tools)}")
    if variables is not None and not isinstance(variables, dict):
        raise RecipeError(f"{where}: `chat_template_kwargs`: expected a mapping, got {shortened(variables)}")


def _is_chat(value: Any) -> bool:
    """Whether they are messages with a `role`, and `content` (text, or parts) or `tool_calls`."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and (isinstance(m.get("content"), str | list) or (m.get("content") is None and bool(m.get("tool_calls"))))
            for m in value
        )
    )


def for_rewards(columns: Iterable[str]) -> list[str]:
    """Of the columns of prompts, those that reach python rewards beside prompt and completion."""
    return [name for name in columns if name not in ("prompt", "input_ids")]


def optional_gold(task: types.ModuleType, prompts: Dataset | None = None) -> Callable[..., list[float]] | None:
    """The task's `gold_reward`: never trained on, only watched.

    Args:
        prompts: what it will be asked about.

    Raises:
        RecipeError: it has a parameter that nothing gives.
    """
    if getattr(task, "gold_reward", None) is None:
        return None
    gold = task_function(task, "gold_reward")
    if prompts is not None:
        columns = for_rewards(prompts.column_names)
        reward_arguments(gold, dict.fromkeys((*columns, *GIVEN)))
    return gold


def reward_arguments(function: Callable[..., Any], given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """How a python reward is called: by keyword, as TRL's GRPO does, with what its parameters name.

    One that names neither prompts nor completions gets these two as its first arguments: `lambda x, y: ...`.

    Args:
        given: `prompts`, `completions`, `completion_ids` and the dataset's other columns.

    Raises:
        RecipeError: it has a parameter without default that nothing gives.
    """
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # of code that is not Python's
        return [], given
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    arguments: list[Any] = []
    two = len(by_position) >= 2 or (not takes_all and any(p.kind is p.VAR_POSITIONAL for p in parameters))
    if two and not {p.name for p in named} & {*GIVEN} and not {p.name for p in by_position[:2]} & given.keys():
        arguments = [given["prompts"], given["completions"]]
        given = {name: value for name, value in given.items() if name not in GIVEN}
    missing = [p.name for p in named if p.default is p.empty and p.name not in given and p not in by_position[: len(arguments)]]
    if missing:
        columns = ", ".join(name for name in given if name not in GIVEN) or "none"
        raise RecipeError(
            f"the reward function `{getattr(function, '__name__', function)}` has the parameter `{missing[0]}`, which is "
            f"neither `prompts`, `completions` or `completion_ids` nor another column of load_prompts ({columns}); rename "
            f"it, or give it a default"
        )
    names = given.keys() if takes_all else given.keys() & {p.name for p in named}
    return arguments, {name: value for name, value in given.items() if name in names}
