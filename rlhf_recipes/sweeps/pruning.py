"""`early_terminate` of a sweep file: wandb's hyperband as Optuna's."""

from dataclasses import dataclass
from typing import Any

from rlhf_recipes.recipe.errors import RecipeError, nearest, shortened
from rlhf_recipes.recipe.stages import STAGES


@dataclass(frozen=True)
class Pruning:
    """`early_terminate` in the numbers of Optuna's HyperbandPruner; a resource is one held-out evaluation during training."""

    min_resource: int
    max_resource: int | str  # or "auto"
    reduction_factor: int


def pruning_of(stop: Any, stage: str, section: dict[str, Any]) -> Pruning:
    """Reads `early_terminate`.

    Args:
        section: the recipe's, of the stage.

    Raises:
        RecipeError: it is not what Optuna can do, or the stage measures nothing before its end.
    """
    keys = ("type", "min_iter", "max_iter", "s", "eta", "strict")
    if not isinstance(stop, dict) or stop.get("type") != "hyperband":
        raise RecipeError("`early_terminate.type` must be hyperband, with `min_iter`, or with `max_iter` and `s`")
    for key, value in stop.items():
        if key not in keys:
            raise RecipeError(f"unknown key `early_terminate.{key}`{nearest(str(key), keys)}")
        least = {"min_iter": 1, "max_iter": 1, "s": 1, "eta": 2}.get(key)
        if least is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise RecipeError(f"`early_terminate.{key}`: Optuna takes whole numbers from {least} on, got {shortened(value)}")
    if stop.get("strict", True) is not True:
        raise RecipeError("`early_terminate.strict`: Optuna's successive halving is the strict one; leave it out")
    if ("min_iter" in stop) == ("max_iter" in stop) or ("max_iter" in stop) != ("s" in stop):
        raise RecipeError("`early_terminate` needs `min_iter`, or `max_iter` and `s`")
    if section.get("eval_strategy", "no") != "steps":
        give = f"give `{stage}.eval_strategy: {{value: steps}}` and `{stage}.eval_steps`"
        where = give if STAGES[stage].online else "leave it out"
        raise RecipeError(f"`early_terminate`: this {stage} measures no held-out metric before its end; {where}")
    eta = stop.get("eta", 3)
    if "min_iter" in stop:
        return Pruning(stop["min_iter"], "auto", eta)
    return Pruning(max(1, stop["max_iter"] // eta ** stop["s"]), stop["max_iter"], eta)
