"""Proximal policy optimisation of a LoRA policy, with TRL's PPOTrainer.

    accelerate launch scripts/ppo.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

Policy, reference, value and reward share one frozen backbone. Ends with held-out prompts, reference and policy side by
side, and leaves adapter, metrics, samples and summary in outputs/<task>/ppo/<run>/.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("ppo", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.algorithms.online import train_online

    return train_online(recipe, "ppo")


if __name__ == "__main__":
    main()
