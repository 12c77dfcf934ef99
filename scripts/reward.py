"""Trains the reward model with TRL's RewardTrainer: a LoRA adapter and score head on the recipe's backbone.

    accelerate launch scripts/reward.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

Pairs come from the task's `load_preferences`; the loss is -log sigmoid(r(chosen) - r(rejected)). Ends with the held-out
pairwise accuracy, by length where the pairs name one in a column `words`.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("reward", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.algorithms.reward import train_reward

    return train_reward(recipe)


if __name__ == "__main__":
    main()
