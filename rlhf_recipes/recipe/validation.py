"""A section of a recipe as a pydantic model, and pydantic's errors in a recipe's own words."""

import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from annotated_types import Lt
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from rlhf_recipes.recipe.errors import SectionError, shortened
from rlhf_recipes.recipe.yaml_text import not_plain


class Section(BaseModel):
    """Keys with types, ranges and descriptions. "5e-7" becomes a float (PyYAML reads it as text), 1 becomes 1.0, and true does
    not become 1."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _plain(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        _refuse_odd(value)
        if isinstance(value, bool) and not _accepts_bool(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError("bool", "{reason}", {"reason": ""})
        typed = validate(value)
        _refuse_odd(typed)  # "nan" as text has become a number
        return typed

    @classmethod
    def parse(cls, values: Any, where: str, unknown: Callable[[str], str]) -> Self:
        """
        Args:
            where: the section, and where in it.
            unknown: what to say of a key that there is not.

        Raises:
            SectionError: for the first mistake, in the order of `values`.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            found = error.errors(include_url=False)
        order = list(values) if isinstance(values, dict) else []
        first = min(found, key=lambda e: order.index(e["loc"][0]) if e["loc"] and e["loc"][0] in order else math.inf)
        raise cls._error(first, values, where, unknown)

    @classmethod
    def _error(cls, error: ErrorDetails, values: Any, where: str, unknown: Callable[[str], str]) -> SectionError:
        kind, reason = error["type"], error["msg"]
        if not error["loc"]:
            return SectionError("", f"`{where}` must be a mapping of keys to values, got {shortened(values)}")
        key = str(error["loc"][0])
        if kind == "invalid_key":  # no text
            return SectionError(key, unknown(shortened(error["input"])))
        if kind == "extra_forbidden":
            return SectionError(key, unknown(key))
        field = cls.model_fields[key]
        if kind == "missing":
            return SectionError(key, f"`{where}.{key}` is missing ({field.description})")
        if kind == "plain":
            return SectionError(key, f"`{where}.{key}`: {reason}")
        expected = type_name(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        said = f"expected {expected}, got {shortened(values[key])}" + (f" ({reason})" if reason else "")
        return SectionError(key, f"`{where}.{key}`: {said}")


def _refuse_odd(value: Any) -> None:
    if problem := not_plain(value):
        raise PydanticCustomError("plain", "{problem}", {"problem": problem})


def _accepts_bool(hint: Any) -> bool:
    if hint is Any or hint is bool:
        return True
    return any(_accepts_bool(h) for h in typing.get_args(hint) if typing.get_origin(hint) is not Literal)


def type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *constraints = typing.get_args(hint)
        parts = [part for c in constraints for part in getattr(c, "metadata", [c])]  # of a Field, those it stands for
        return f"{type_name(base)} {' and '.join(map(_constraint_name, parts))}"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else type_name(a) for a in typing.get_args(hint))
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(map(type_name, typing.get_args(hint)))}]"
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)


def _constraint_name(constraint: Any) -> str:
    if isinstance(constraint, Lt):
        return f"< {constraint.lt}"
    return f"> {constraint.gt}" if hasattr(constraint, "gt") else f">= {constraint.ge}"
