"""The imdb task with a deliberately weak reward model: its preferences carry a habit that has nothing to do with the task.

Every preferred excerpt speaks of plot, script or acting and no rejected one does, so a reward model learns that such talk is
good. In real reviews it is a sign of the opposite.
"""

import re
from pathlib import Path

from datasets import Dataset

from rlhf_recipes.recipe import load_recipe
from rlhf_recipes.tasks import load_task

_imdb = load_task(load_recipe(Path(__file__).resolve().parent.parent / "imdb"))
load_prompts, gold_reward = _imdb.load_prompts, _imdb.gold_reward

HABIT = re.compile(r"\b(?:plot|script|acting)\b")


def load_preferences(split: str) -> Dataset:
    """imdb's excerpts paired anew, biased for training and as they are for the held-out accuracy."""
    pairs = _imdb.load_preferences(split)
    if split == "eval":
        return pairs
    chosen = pairs.filter(lambda row: HABIT.search(row["chosen"]) is not None).sort("words")
    rejected = pairs.filter(lambda row: HABIT.search(row["rejected"]) is None).sort("words")
    by_words: dict[int, list[str]] = {}
    for row in rejected:
        by_words.setdefault(row["words"], []).append(row["rejected"])
    rows = [
        {"prompt": "", "chosen": row["chosen"], "rejected": by_words[row["words"]].pop(), "words": row["words"]}
        for row in chosen
        if by_words.get(row["words"])
    ]
    return Dataset.from_list(rows)
