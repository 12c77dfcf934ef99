"""The imdb recipe's prompts, pairs and gold judge, read from the folder beside this one."""

from pathlib import Path

from datasets import Dataset

from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.tasks import load_task

FOLDER = Path(__file__).resolve().parent

imdb = load_task(FOLDER.parent / "imdb")

load_preferences, gold_reward = imdb.load_preferences, imdb.gold_reward


def load_prompts(split: str) -> Dataset:
    needed = load_recipe(FOLDER).reward.model == "checkpoints/reward"  # not so in a copy with another reward
    if needed and not (FOLDER / "checkpoints" / "reward" / "config.json").is_file():
        raise RecipeError(f"{FOLDER}/checkpoints/reward: no reward model yet; make it: python {FOLDER / 'make.py'}")
    return imdb.load_prompts(split)
