"""r(x, y): each kind of reward a file, and their sum. What a reward reads can be had from here."""

from rlhf_recipes.rollouts.samples import Samples

__all__ = ["Samples"]
