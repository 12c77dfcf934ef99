"""The distributions of a sweep file, and what Optuna draws from them."""

import itertools
import math
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rlhf_recipes.recipe.errors import RecipeError, nearest, shortened

# wandb's distributions: those that Optuna has, with the keys each may have, and for each of the others the nearest of them
DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "uniform": ("min", "max"),
    "int_uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max", "q"),
}
LIMITS = "`log_uniform_values`, whose min and max are the values themselves and not their logarithms"
NEAREST = {
    "categorical_w_probabilities": "`categorical`: `values` without `probabilities`",
    "normal": "`uniform`",
    "q_normal": "`q_uniform`",
    "log_normal": "`log_uniform_values`",
    "q_log_normal": "`log_uniform_values`",
    "beta": "`uniform`",
    "q_beta": "`q_uniform`",
    "log_uniform": LIMITS,
    "q_log_uniform": LIMITS,
    "inv_log_uniform": "`log_uniform_values`",
    "inv_log_uniform_values": "`log_uniform_values`",
}


def distribution(name: str, spec: Any, grid: bool) -> BaseDistribution | list[Any]:
    """A constant as a list of its one value, anything else as Optuna's distribution."""
    where = f"`parameters.{name}`"
    if not isinstance(spec, dict):
        raise RecipeError(f"{where}: expected `value`, `values`, or `min` and `max`, got {shortened(spec)}")
    kind = spec.get("distribution") or implied(spec)
    if kind == "nested":
        raise RecipeError(f"{where}: nested `parameters` reach a script as one text; write `{name}.KEY` as a parameter")
    if kind in NEAREST:
        raise RecipeError(f"{where}: Optuna has no distribution `{kind}`; the nearest is {NEAREST[kind]}")
    if kind not in DISTRIBUTIONS:
        near = nearest(str(kind), DISTRIBUTIONS) if kind else ""
        said = f"unknown distribution `{kind}`{near}" if kind else "expected `value`, `values`, or `min` and `max`"
        raise RecipeError(f"{where}: {said}")
    keys = DISTRIBUTIONS[kind]
    for key in spec:
        if key != "distribution" and key not in keys:
            raise RecipeError(f"{where}: `{key}` is not a key of the distribution {kind}{nearest(str(key), keys)}")
    for key in keys:
        if key not in spec and key != "q":
            raise RecipeError(f"{where}: `{key}` is missing, which the distribution {kind} needs")
    if kind == "constant":
        return [passable(spec["value"], where)]
    if kind == "categorical":
        return CategoricalDistribution(choices(spec["values"], where))
    return _range(kind, spec, where, grid)


def implied(spec: dict[str, Any]) -> str | None:
    """The distribution that wandb takes where none is named."""
    if "parameters" in spec:
        return "nested"
    if "probabilities" in spec:
        return "categorical_w_probabilities"
    if "value" in spec or "values" in spec:
        return "constant" if "value" in spec else "categorical"
    if "min" in spec and "max" in spec:
        return "int_uniform" if isinstance(spec["min"], int) and isinstance(spec["max"], int) else "uniform"
    return None


def choices(values: Any, where: str) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise RecipeError(f"{where}: `values` must be a list of at least one value, got {shortened(values)}")
    passed = [passable(value, where) for value in values]
    for text in map(str, passed):
        if [str(value) for value in passed].count(text) > 1:
            raise RecipeError(f"{where}: the value {text} appears twice")
    return passed


def passable(value: Any, where: str) -> Any:
    """A value as wandb's agent and scripts/sweep.py pass it to the script: as Python writes it."""
    if value is None:
        raise RecipeError(f"{where}: wandb passes null as the text `None`; write it in quotes, as 'null'")
    return value if isinstance(value, str | bool | int | float) else str(value)


def _range(kind: str, spec: dict[str, Any], where: str, grid: bool) -> BaseDistribution:
    low, high, q = spec["min"], spec["max"], spec.get("q", 1)
    for key, number in (("min", low), ("max", high), ("q", q)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            hint = "; YAML 1.1 wants 1.0e-4 for 1e-4" if isinstance(number, str) else ""
            raise RecipeError(f"{where}: `{key}` must be a number, got {shortened(number)}{hint}")
    if not low < high:
        raise RecipeError(f"{where}: min {low} is not below max {high}")
    if not q > 0 or (kind.endswith("log_uniform_values") and not low > 0):
        raise RecipeError(f"{where}: {'q' if not q > 0 else f'min of {kind}'} must be above 0")
    whole = all(float(number).is_integer() for number in (low, high, q))
    if kind == "int_uniform" and not whole:
        raise RecipeError(
            f"{where}: int_uniform lies between whole numbers; the nearest is `uniform`, or `q_uniform` with its q"
        )
    if grid:  # as wandb takes them
        if kind not in ("int_uniform", "q_uniform"):
            raise RecipeError(f"{where}: a grid cannot go through {kind}; give its `values`, or int_uniform or q_uniform")
        count = int(high) - int(low) + 1 if kind == "int_uniform" else math.ceil((high - low) / q)
        return CategoricalDistribution([low + i * q for i in range(count)])
    if kind == "q_log_uniform_values":
        if not (whole and q == 1):
            raise RecipeError(
                f"{where}: Optuna has q_log_uniform_values in steps of 1 between whole numbers alone; the nearest are "
                f"`log_uniform_values`, or `values`"
            )
        return IntDistribution(int(low), int(high), log=True)
    if kind == "int_uniform":
        return IntDistribution(int(low), int(high))
    if kind == "q_uniform":
        first, last = math.ceil(low / q) * q, math.floor(high / q) * q
        if not first < last:
            raise RecipeError(f"{where}: there is at most one multiple of q {q} between min {low} and max {high}")
        if whole:
            return IntDistribution(int(first), int(last), step=int(q))
        return FloatDistribution(first, last, step=q)
    return FloatDistribution(float(low), float(high), log=kind == "log_uniform_values")


def combinations(values: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def range_ends(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]
