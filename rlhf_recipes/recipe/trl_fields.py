"""The fields of TRL's configuration classes, read from their source.

Importing a TRL config costs seconds (torch, transformers, peft). A misspelt key or `--help` should be answered at once,
so the field names, types and defaults are read with `ast` from the installed packages' own files. The config class
itself is still built, and so checked by TRL, before a stage starts; a test compares this reading with the real classes.
"""

import ast
import builtins
import functools
import importlib.util
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# stage -> the chain of dataclasses that make up its config, base first: (package, file, class)
_TRAINING_ARGUMENTS = [
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
]
_PPO = [
    *_TRAINING_ARGUMENTS,
    ("trl", "experimental/ppo/ppo_config.py", "PPOConfig"),
    ("rlhf_recipes", "algorithms/trainer.py", "PPOConfig"),
]
CONFIG_SOURCES = {
    "sft": [
        *_TRAINING_ARGUMENTS,
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("rlhf_recipes", "algorithms/sft.py", "SFTConfig"),
    ],
    "reward_training": [*_TRAINING_ARGUMENTS, ("trl", "trainer/reward_config.py", "RewardConfig")],
    "ppo": _PPO,
    "a2c": _PPO,
    "dpo": [
        *_TRAINING_ARGUMENTS,
        ("trl", "trainer/dpo_config.py", "DPOConfig"),
        ("rlhf_recipes", "algorithms/dpo.py", "DPOConfig"),
    ],
}


@dataclass(frozen=True)
class Field:
    """One configuration field: its type annotation, and its default as source text (None: it has no simple one)."""

    type: Any
    default: str | None


def _evaluate_annotation(node: ast.expr) -> Any:
    """The annotation as a type; names that only exist at run time (enums, classes of transformers) become Any."""
    names = {**vars(builtins), **vars(typing), "Callable": Callable}
    used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= dict.fromkeys(used - names.keys(), Any)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted annotation
        node = ast.parse(node.value, mode="eval").body
    return eval(compile(ast.Expression(node), "<annotation>", "eval"), names)  # noqa: S307 - our own packages


def _default_source(node: ast.expr | None) -> str | None:
    """`x: int = 3` and `x: int = field(default=3, ...)` both give "3"."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "field":
        node = next((k.value for k in node.keywords if k.arg == "default"), None)
    return None if node is None else ast.unparse(node)


@functools.cache
def stage_fields(stage: str) -> dict[str, Field]:
    """Field name -> `Field` of the config class behind a stage section of a recipe ("sft", "ppo", ...)."""
    fields: dict[str, Field] = {}
    for package, file, class_name in CONFIG_SOURCES[stage]:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
        tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
        body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                annotation = ast.unparse(node.annotation)
                if "ClassVar" not in annotation and "init=False" not in ast.unparse(node):
                    fields[node.target.id] = Field(_evaluate_annotation(node.annotation), _default_source(node.value))
    return fields
