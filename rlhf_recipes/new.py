"""A recipe of one's own, copied from recipes/template or from another recipe.

    python -m rlhf_recipes new recipes/mytask [--from imdb]

What makes the task is copied; what came of it (checkpoints, results, pictures, READMEs) is left behind. Paths that led to
something left behind lead to the original, and sweeps name the copy.
"""

import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.command_line import parse_command_line
from rlhf_recipes.recipe.errors import RecipeError, nearest
from rlhf_recipes.recipe.loading import DEFAULT_RECIPE, load_recipe
from rlhf_recipes.recipe.yaml_text import read_yaml

RECIPES = DEFAULT_RECIPE.parent
_LEFT_BEHIND = shutil.ignore_patterns(
    "checkpoints", "outputs", "results", "wandb", "__pycache__", ".git",
    "results.*", "*.md", "*.html", "*.png", "*.jpg", "*.svg",
)  # fmt: skip
_SECTIONS = ("model", "reward", "preferences", "merge", "report")
_PLACES = ("path", "adapter", "model", "chat_template", "evaluation")  # their keys whose value may be a file or a folder


def main(words: list[str]) -> int:
    """Answers the command line; returns the exit code."""
    try:
        target, source = _arguments(words)
        notes = new(target, source)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join([f"{_shown(target)}: made from {_shown(source)}", *notes, "", "next:", *_next(target)]))
    return 0


def _arguments(words: list[str]) -> tuple[Path, Path]:
    """The folder to make and the recipe to make it from."""
    rest = [part for word in words for part in (word.split("=", 1) if word.startswith("--from=") else [word])]
    name = "template"
    if "--from" in rest:
        at = rest.index("--from")
        if at + 1 == len(rest):
            raise RecipeError("--from: a value is missing; write --from=imdb, or another recipe's folder")
        name = rest[at + 1]
        del rest[at : at + 2]
    for word in rest:
        if word.startswith("-"):
            raise RecipeError(f"{word}: unknown option{nearest(word, ['--from'])}")
    if len(rest) != 1:
        raise RecipeError("expected one folder to make: python -m rlhf_recipes new recipes/mytask [--from imdb]")
    source = next((f for f in (RECIPES / name, Path(name)) if os.path.isfile(f / "recipe.yaml")), None)
    if source is None:
        known = sorted(file.parent.name for file in RECIPES.glob("*/recipe.yaml"))
        raise RecipeError(f"--from {name}: no such recipe{nearest(name, known)}; recipes here: {', '.join(known)}")
    return Path(rest[0]), source


def new(target: Path, source: Path) -> list[str]:
    """Copies the recipe `source` to the new folder `target`, which appears whole or not at all.

    Returns:
        a line for everything that the copy still has of the original, or that has to be made first.

    Raises:
        RecipeError: `target` exists or is no name for a recipe, or `source` is no recipe.
    """
    load_recipe(source)
    _check(target, source)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        shutil.copytree(source, temporary, ignore=_LEFT_BEHIND, ignore_dangling_symlinks=True)
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)  # the original's may be read-only
        notes = dict.fromkeys(note for file in _yaml_files(temporary) for note in _rewrite(file, temporary, target, source))
        (temporary / "README.md").write_text(_readme(target, source, list(notes)), encoding="utf-8")
        temporary.rename(target)
    except OSError as error:
        raise RecipeError(f"{target}: cannot be made ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return list(notes)


def _check(target: Path, source: Path) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", target.name):
        raise RecipeError(
            f"{target}: expected the name of a new folder, of at most 64 letters, digits, `_`, `.` and `-`: it also names the "
            f"task in outputs/"
        )
    if os.path.lexists(target):
        raise RecipeError(f"{target}: it exists already, and nothing is overwritten; choose another name")
    if not target.parent.is_dir():
        raise RecipeError(f"{target}: there is no folder {target.parent} here; run this from the repository's root")
    if target.resolve().is_relative_to(source.resolve()):
        raise RecipeError(f"{target}: it would lie in what it is a copy of; choose a place outside of {_shown(source)}")
    if odd := re.search(r"[^\w /.+~-]", _shown(target)):
        raise RecipeError(f"{target}: sweeps and commands name this folder, and cannot with {odd[0]!r} in it")


def _yaml_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.yaml"), *folder.glob("sweeps/*.yaml")])


def _rewrite(file: Path, temporary: Path, target: Path, source: Path) -> list[str]:
    """A recipe's paths and a sweep's recipe, as seen from `target`; returns what is to be said about them."""
    text, original = file.read_text(encoding="utf-8"), source / file.relative_to(temporary)
    content = read_yaml(text, str(original))
    if not isinstance(content, dict):
        return []
    if "parameters" in content and "command" in content:
        file.write_text(_sweep_of(text, content, target, source.resolve().name), encoding="utf-8")
        return []
    notes = []
    for where, section, key in list(_places({name: content.get(name) for name in _SECTIONS})):
        old = section[key]
        section[key] = path = _seen_from(target, old, source, temporary)
        if path != old:
            text = re.sub(rf"(\b{key}:\s*)(['\"]?){re.escape(old)}\2(?=[\s,}}\]]|$)", lambda m: m[1] + path, text)  # noqa: B023
        if path != old and key == "adapter":
            notes.append(
                f"`{where}` is the adapter of {_shown(source)}: scripts/reward.py trains this task's own "
                f"(docs/your-own-task.md)"
            )
        if old.startswith("checkpoints/") and path == old:
            notes.append(f"`{where}` {old} has still to be made: {_shown(source)}/README.md has the commands")
    if read_yaml(text, str(original)) != content:
        raise RecipeError(f"{original}: a path in it cannot be rewritten for a copy; write it plainly, as `path: FOLDER`")
    file.write_text("".join(f"# {note}\n" for note in notes) + text, encoding="utf-8")
    return notes


def _places(content: dict[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """(dotted name, the mapping it is in, its key) of every path of a recipe."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _places(value, f"{at}{key}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from _places(item, f"{at}{key}[{i}].") if isinstance(item, dict) else ()
        elif key in _PLACES and isinstance(value, str):
            yield f"{at}{key}", content, key


def _seen_from(target: Path, path: str, source: Path, temporary: Path) -> str:
    """What `path` in the recipe `source` is in the recipe `target`; of what was copied, the copy."""
    copied = ".." not in Path(path).parts and os.path.exists(temporary / path)
    if copied or os.path.isabs(path) or not os.path.exists(source / path):  # the last: a Hub id, or not made yet
        return path
    return Path(os.path.relpath((source / path).resolve(), target.resolve())).as_posix()


def _sweep_of(text: str, content: dict[str, Any], target: Path, task: str) -> str:
    """A sweep of `task` as one of the copy: the recipe in its command and comments, and its name."""
    words = [str(word) for word in content["command"]]
    programs = [i for i, word in enumerate(words) if word in ("${program}", content.get("program"))]
    if programs:
        recipe = parse_command_line([word for word in words[programs[0] + 1 :] if not word.startswith("${")]).recipe
        folder = recipe.parent if recipe.suffix == ".yaml" else recipe
        old = rf"(?<![\w./-]){re.escape(str(folder))}(?![\w.-]|/\w+\.md)"
        text = re.sub(old, lambda _: _shown(target), text)
    return re.sub(rf"^(name:\s*['\"]?){re.escape(task)}(?![^\W_])", rf"\g<1>{target.name}", text, flags=re.MULTILINE)


def _shown(folder: Path) -> str:
    """As commands name it, which are run from the repository's root."""
    folder = folder.resolve()
    root = RECIPES.parent
    return (folder.relative_to(root) if folder.is_relative_to(root) else folder).as_posix()


def _next(target: Path) -> list[str]:
    recipe = shlex.quote(_shown(target))
    return [
        f"python -m rlhf_recipes check {recipe}",
        f"accelerate launch scripts/ppo.py --recipe {recipe} --dry-run",
        f"accelerate launch scripts/ppo.py --recipe {recipe}",
    ]


def _readme(target: Path, source: Path, notes: list[str]) -> str:
    return "\n".join([
        f"# {target.name}", "",
        f"Made from {_shown(source)} by `python -m rlhf_recipes new`; nothing has been run yet.", "",
        *(f"- {note}." for note in notes), *([""] if notes else []),
        "```bash", *_next(target), "```", "",
    ])  # fmt: skip
