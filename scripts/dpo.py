"""Direct preference optimisation of a LoRA policy, with TRL's DPOTrainer.

    accelerate launch scripts/dpo.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

Trains on `preferences.path` (a folder of scripts/preferences.py, or a .jsonl file of prompt, chosen and rejected), on the
task's own pairs (`preferences.source: task`), or on pairs that it samples first; with `dpo.rounds` above 1 it samples again
from the policy before each further round. Leaves adapter, metrics, samples and summary in outputs/<task>/dpo/<run>/.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("dpo", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.algorithms.dpo import train_dpo

    return train_dpo(recipe)


if __name__ == "__main__":
    main()
