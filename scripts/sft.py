"""Supervised fine-tuning of the backbone with TRL's SFTTrainer.

    accelerate launch scripts/sft.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

With `sft.from_scratch: true` it trains a new tokenizer and a new model of `model.architecture`; otherwise it trains a
LoRA adapter on `model.path` and merges it: the result is the next stages' backbone, and so their reference.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("sft", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.algorithms.sft import train_sft

    return train_sft(recipe)


if __name__ == "__main__":
    main()
