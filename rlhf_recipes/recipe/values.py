"""A value of a recipe as the type its key has."""

import functools
import types
import typing
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlhf_recipes.recipe.errors import RecipeError, shortened
from rlhf_recipes.recipe.yaml_text import check_plain


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True))


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint`: "5e-7" becomes a float (PyYAML reads it as text), 1 becomes 1.0, "yes" does not become 3."""
    check_plain(value, where)
    if isinstance(value, bool) and not accepts_bool(hint):
        raise RecipeError(f"{where}: expected {type_name(hint)}, got {value!r}")
    try:
        typed = _adapter(hint).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise RecipeError(f"{where}: expected {type_name(hint)}, got {shortened(value)} ({reason})") from None
    check_plain(typed, where)  # "nan" as text has become a number
    return typed


def accepts_bool(hint: Any) -> bool:
    if hint is Any or hint is bool:
        return True
    return any(accepts_bool(h) for h in typing.get_args(hint) if typing.get_origin(hint) is not Literal)


def type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *constraints = typing.get_args(hint)
        return f"{type_name(base)} {' and '.join(map(constraint_name, constraints))}"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else type_name(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)


def constraint_name(constraint: Any) -> str:
    if isinstance(constraint, Lt):
        return f"< {constraint.lt}"
    return f"> {constraint.gt}" if isinstance(constraint, Gt) else f">= {constraint.ge}"
