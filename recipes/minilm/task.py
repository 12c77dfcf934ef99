"""The imdb recipe's prompts, pairs and gold judge, read from the folder beside this one."""

import importlib.util
from pathlib import Path

from datasets import Dataset

from rlhf_recipes.recipe import RecipeError

FOLDER = Path(__file__).resolve().parent

spec = importlib.util.spec_from_file_location("task_imdb", FOLDER.parent / "imdb" / "task.py")
imdb = importlib.util.module_from_spec(spec)
spec.loader.exec_module(imdb)

load_preferences, gold_reward = imdb.load_preferences, imdb.gold_reward


def load_prompts(split: str) -> Dataset:
    if not (FOLDER / "checkpoints" / "reward" / "config.json").is_file():
        raise RecipeError(f"{FOLDER}/checkpoints/reward: no reward model yet; make it: python {FOLDER / 'make.py'}")
    return imdb.load_prompts(split)
