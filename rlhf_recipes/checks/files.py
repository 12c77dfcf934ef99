"""Checks of the files that a recipe names: no weights are loaded."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jinja2

from rlhf_recipes.checks.sizes import sizes_of, text_part
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import LATEST, Recipe

_JINJA = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 - compiles, and renders nothing
_LEAST_VOCABULARY = 259  # of data.train_tokenizer


def check_run_folder(recipe: Recipe, stage: str) -> None:
    """The folder of the run can be made, and only there."""
    name, output = recipe.run.name, recipe.run.output
    if name == LATEST:
        raise RecipeError("`run.name` latest: the link to the newest run has this name; choose another")
    if name and ("/" in name or "\\" in name or name.startswith(".") or not name.isprintable() or len(os.fsencode(name)) > 200):
        raise RecipeError(
            f"`run.name` {name}: expected the name of one folder: at most 200 bytes, no slashes, not a leading dot; where it "
            f"is made says `run.output`"
        )
    folder = Path(output).absolute() / recipe.task / stage
    if name and recipe.run.resume is None and os.path.lexists(folder / name):
        raise RecipeError(f"{folder / name}: this run exists; choose another `--run.name`, nothing is overwritten")
    try:
        folder.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a part of the path is a file, may not be entered, or is too long
        raise RecipeError(f"`run.output` {output}: no folder can be made there ({error.strerror})") from None
    if (folder / LATEST).is_dir() and not (folder / LATEST).is_symlink():  # as some copies make of a link
        raise RecipeError(f"{folder / LATEST}: this folder has the name of the link to the newest run; rename or remove it")
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise RecipeError(f"`run.output` {output}: {folder} is no folder; choose another place with --run.output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecipeError(f"`run.output` {output}: {folder} may not be written to; choose another place with --run.output")


def check_architecture(recipe: Recipe) -> None:
    architecture = recipe.model.architecture or {}
    missing = {"model_type", "vocab_size"} - set(architecture)
    if missing:
        raise RecipeError(f"`sft.from_scratch` needs `model.architecture` with {', '.join(sorted(missing))}")
    if not isinstance(architecture["vocab_size"], int) or architecture["vocab_size"] < _LEAST_VOCABULARY:
        raise RecipeError(
            f"`model.architecture` has the vocab_size {architecture['vocab_size']!r}: expected a whole number of at least "
            f"{_LEAST_VOCABULARY}, for every byte and the tokens pad, bos and eos"
        )


def check_folder(recipe: Recipe, key: str, value: str, file: str, weights: str | None = None) -> None:
    """A path whose first part is a folder beside the recipe, or that starts with . or /, is meant as a folder.

    Args:
        file: what must be in it; of a .json file also its content is looked at.
        weights: the pattern of its safetensors files, which must be there and whole.
    """
    resolved = Path(recipe.path(value))
    first = value.split("/")[0]
    local = value.startswith((".", "/", "~")) or value.count("/") > 1 or os.path.exists(recipe.folder / first)
    if not os.path.exists(resolved):
        if local or os.path.exists(first):
            raise RecipeError(f"`{key}` {value}: no such folder, neither beside the recipe ({recipe.folder}) nor here")
        return  # a Hub id
    if not resolved.is_dir():
        raise RecipeError(f"`{key}` {value}: {resolved} is a file, expected a folder with {file}")
    if not (resolved / file).is_file():
        raise RecipeError(f"`{key}` {value}: the folder {resolved} has no {file}")
    if file.endswith(".json"):
        read_json(resolved / file, key)
    if weights is None:
        return
    files = sorted(resolved.glob(weights))
    if not files:
        raise RecipeError(
            f"`{key}` {value}: the folder {resolved} has no {weights}; weights are read from safetensors alone, as a pickle "
            f"(.bin, .pt) can run any code"
        )
    for found in files:
        if not os.access(found, os.R_OK):  # safetensors saves them for their owner alone
            raise RecipeError(f"`{key}` {value}: {found} may not be read by you; its owner can `chmod a+r` it")
        if safetensors_header(found) is None:
            raise RecipeError(f"`{key}` {value}: {found} is cut short, or no safetensors file; copy or make it again")


def read_json(file: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a UnicodeDecodeError
        raise RecipeError(f"`{key}`: {file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"`{key}`: {file} holds a {type(content).__name__}, expected an object")
    return content


def safetensors_header(file: Path) -> dict[str, dict[str, Any]] | None:
    """Each tensor's dtype, shape and place; None where the file is not whole, or none of safetensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > size:
            return None
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            whole = all(isinstance(n, int) for entry in header.values() for n in entry["shape"]) and 8 + length + end == size
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
    return header if whole else None


def local_json(recipe: Recipe, name: str) -> dict[str, Any]:
    file = Path(recipe.path(recipe.model.path)) / name
    return read_json(file, "model.path") if os.path.isfile(file) else {}


def check_lengths(recipe: Recipe) -> None:
    room = sizes_of(local_json(recipe, "config.json")).positions
    prompt, completion = recipe.data.max_prompt_tokens, recipe.data.max_completion_tokens
    if room is not None and prompt + completion > room:
        raise RecipeError(
            f"`data.max_prompt_tokens` {prompt} + `data.max_completion_tokens` {completion} exceed the {room} tokens "
            f"that {recipe.model.path} reads; lower one of them"
        )


def check_pad(recipe: Recipe) -> None:
    config = local_json(recipe, "tokenizer_config.json")
    if config and "added_tokens_decoder" not in config:  # as older ones are read
        config |= local_json(recipe, "special_tokens_map.json")
    template = recipe.model.chat_template
    if template is not None and not (recipe.folder / template).is_file():
        raise RecipeError(f"`model.chat_template` {template}: no such file beside the recipe ({recipe.folder})")
    if template is not None and (slip := _slip_of(recipe.folder / template)):
        raise RecipeError(f"`model.chat_template` {template}: {slip}")
    own = {
        name: token["content"] if isinstance(token, dict) and "content" in token else token for name, token in config.items()
    }
    pad, eos = (getattr(recipe.model, name) or own.get(name) for name in ("pad_token", "eos_token"))
    if config:
        recipe.model.check_pad(pad, eos)


def _slip_of(template: Path) -> str | None:
    """What is wrong with a chat template that cannot even be read; what it does with messages only a run can tell."""
    try:
        text = template.read_text(encoding="utf-8-sig")
        _JINJA.from_string(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text))  # transformers' own tag
    except UnicodeDecodeError as error:
        return f"is not UTF-8 ({error.reason})"
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def backbone_vocabulary(recipe: Recipe) -> int | None:
    """Rows of the backbone's embedding, where its config is on this machine and says so: Gemma 3's of 4B and more does not."""
    size = text_part(local_json(recipe, "config.json")).get("vocab_size")
    return size if isinstance(size, int) else None


def backbone_of(recipe: Recipe) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The config and the shapes of all weights; ({}, {}) where they are not on this machine, or broken: `check` says so."""
    shapes = shapes_of(recipe, recipe.model.path)
    try:
        return local_json(recipe, "config.json"), shapes
    except RecipeError:
        return {}, {}


def shapes_of(recipe: Recipe, path: str) -> dict[str, list[int]]:
    """Of all weights of a model on this machine, by name."""
    folder = Path(recipe.path(path))
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")) if os.path.isdir(folder) else ():
        shapes |= {name: entry["shape"] for name, entry in (safetensors_header(file) or {}).items()}
    return shapes
