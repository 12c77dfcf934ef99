"""Pairs for DPO in a file: what scripts/preferences.py writes, with token ids, or anybody's text or chat messages.

Nothing heavy is imported here: --dry-run reads them too.
"""

import json
import os.path
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.errors import RecipeError, nearest, shortened
from rlhf_recipes.recipe.sections import resolved

FILE = "pairs.jsonl"
IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "label_smoothing")
TEXTS = ("prompt", "chosen", "rejected")


def pairs_file(given: str, folder: Path) -> Path:
    """The file of `preferences.path`: a .jsonl file, or the pairs.jsonl of a folder that scripts/preferences.py made.

    Args:
        folder: the recipe's.

    Raises:
        RecipeError: there is no such file.
    """
    file = Path(resolved(given, folder))
    if file.is_dir():
        if not (file / FILE).is_file():
            raise RecipeError(f"`preferences.path` {given}: the folder {file} has no {FILE}")
        return file / FILE
    if not file.is_file():
        raise RecipeError(
            f"`preferences.path` {given}: no such folder or file of pairs, neither beside the recipe ({folder}) nor here"
        )
    return file


def read_pairs(
    file: Path, vocabulary: int | None = None, decode: Callable[[list[int]], str] | None = None
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a file, a JSON object a line: with IDS, or with TEXTS; the first one says which.

    Args:
        vocabulary: rows of the backbone's embedding.
        decode: token ids to text, without special tokens: the ids of the first rows must say what their text says.

    Returns:
        the rows with those columns alone, and whether they are token ids.

    Raises:
        RecipeError: a line is not what it should be, or there is none.
    """
    rows: list[dict[str, Any]] = []
    tokens = None
    at = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for at, line in enumerate(lines, start=1):  # noqa: B007 - the message names it
                if not line.strip():
                    continue
                row = _object(line)
                if tokens is None:
                    tokens = any(name in row for name in IDS[:3])
                rows.append(_token_row(row, vocabulary) if tokens else _text_row(row))
                if tokens and decode is not None and len(rows) <= 10:
                    _check_text(row, decode)
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = "not pairs of scripts/preferences.py" if tokens else "not a pair"
        raise RecipeError(f"{file}, line {at}: {what}: {_words(error)}") from error
    if not rows:
        raise RecipeError(
            f"{file}: no pairs; a line is a JSON object with prompt, chosen and rejected, or what scripts/preferences.py writes"
        )
    return rows, bool(tokens)


def _words(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no `{error.args[0]}`"
    if isinstance(error, UnicodeDecodeError):
        return "the file is not UTF-8"
    return f"not valid JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)


def _object(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object with prompt, chosen and rejected, got {shortened(row)}")
    return row


def _token_row(row: dict[str, Any], vocabulary: int | None) -> dict[str, Any]:
    for name in IDS:
        value = row[name]
        if name == "label_smoothing":
            if type(value) not in (int, float) or not 0 <= value <= 0.5:
                raise ValueError(f"{name} is {value!r}, expected a probability of at most 0.5")
        elif not isinstance(value, list) or any(type(token) is not int or token < 0 for token in value):
            raise ValueError(f"{name} is no list of token ids")  # of a completion an empty one: its first token was the pad
        elif value and vocabulary is not None and max(value) >= vocabulary:
            raise ValueError(f"{name} has the token {max(value)} of another vocabulary: the backbone's has {vocabulary}")
    return {name: row[name] for name in IDS}


def _check_text(row: dict[str, Any], decode: Callable[[list[int]], str]) -> None:
    """Spaces aside, which tokenizers' decoders add and drop at the ends of words."""
    for side in ("chosen", "rejected"):
        text = row.get(side)
        if isinstance(text, str):
            before, whole = decode(row["prompt_ids"]), decode(row["prompt_ids"] + row[f"{side}_ids"])
            said = whole[len(os.path.commonprefix([before, whole])) :]  # noqa: RUF071 - as data.decode_completions has it
            ours, theirs = ("".join(words.split()).rstrip("\ufffd") for words in (said, text))  # half a letter is none
            if not ours.startswith(theirs) and not theirs.startswith(ours):  # the text may end before a stop string
                raise ValueError(
                    f"{side}_ids are of another tokenizer: the backbone's reads {shortened(said)} for {shortened(text)}; make "
                    f"the pairs again with this recipe, or give them without token ids"
                )


def _text_row(row: dict[str, Any]) -> dict[str, Any]:
    row = _with_prompt(row)
    for name in TEXTS:
        if name not in row:
            raise ValueError(f"`{name}` is missing{nearest(name, row)}; a pair has prompt, chosen and rejected")
    chat = isinstance(row["prompt"], list)
    for name in TEXTS:
        value, may_be_text = row[name], not chat or name != "prompt"
        if not (may_be_text and isinstance(value, str)) and not (chat and _is_chat(value)):
            wanted = " or ".join(["text"] * may_be_text + ["chat messages with `role` and `content`"] * chat)
            raise ValueError(f"`{name}`: expected {wanted}, got {shortened(value)}")
    return {name: row[name] for name in TEXTS}


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """Whole conversations without a prompt have what they begin with in common, as TRL's "implicit prompt"."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" in row or not (isinstance(chosen, list) and isinstance(rejected, list)):
        return row
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    return row | {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content") is not None for m in value)
    )
