"""Advantage actor-critic of a LoRA policy: PPO with one epoch and one minibatch (arXiv 2205.09123).

    accelerate launch scripts/a2c.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

One gradient step on each rollout, at which every probability ratio is 1: no clipping takes effect, and the gradient is that
of -A log pi + vf_coef * (V - return)^2 / 2. Leaves the same files as scripts/ppo.py, in outputs/<task>/a2c/<run>/.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("a2c", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.algorithms.online import train_online

    return train_online(recipe, "a2c")


if __name__ == "__main__":
    main()
