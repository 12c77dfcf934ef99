"""r(x, y): each kind of reward a file, and their sum."""

from rlhf_recipes.rollouts.samples import Samples

__all__ = ["Samples"]
