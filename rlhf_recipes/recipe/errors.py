"""What is said of a mistake: one printable line, the nearest valid name, and an exit code."""

import difflib
import re
import reprlib
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def loading(what: str, problem: str = "cannot be loaded", switch: str = "model.trust_remote_code") -> Iterator[None]:
    """While this lasts, whatever goes wrong is a file that is not what it should be.

    Args:
        switch: the key that allows a model's own code.

    Raises:
        RecipeError: `what`, and why.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # transformers, PEFT, tokenizers and safetensors have no class of errors in common
        if "trust_remote_code" in str(error):
            problem = f"it brings Python code along, which is executed only with `{switch}: true`; read that code first"
        else:
            problem = f"{problem}: {type(error).__name__}: {error}"
        raise RecipeError(f"{what}: {problem}") from error


class RecipeError(Exception):
    """A mistake in a recipe, an override, a task or a file it names; the message says where and what to do."""

    exit_code = 2

    def __init__(self, message: object) -> None:
        """One printable line, whatever words of a library or of a file are in it."""
        line = re.sub(r"\s*[\r\n]\s*", " ", str(message)).strip()
        line = re.sub(r"\S{400,}", lambda word: f"{word[0][:200]}...{word[0][-100:]}", line)
        line = line if len(line) <= 2000 else f"{line[:1500]} ... {line[-400:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


class SectionError(Exception):
    """What is wrong with a section of a recipe, for whoever knows which file or option said it.

    key: the key of the section; None where it is about several of them, "" where about the section itself.
    """

    def __init__(self, key: str | None, text: str) -> None:
        super().__init__(text)
        self.key = key


class StoppedError(RecipeError):
    """A run cannot continue, for a reason that is not the recipe's text: a full disk, losses that are not finite."""

    exit_code = 3


def nearest(name: str, names: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean `{match[0]}`?" if match else ""


_SHORTENER = reprlib.Repr()
_SHORTENER.maxstring = _SHORTENER.maxother = 80


def shortened(value: Any) -> str:
    """`value` as Python writes it, or its beginning and end; never more than a line."""
    try:
        return _SHORTENER.repr(value)
    except ValueError:  # Python's own limit on the digits of a number
        return "an enormous number"
