"""The imdb task with a proxy in its reward that turns against it: reviews that speak of plot and script are mostly bad ones."""

import re
from pathlib import Path

from rlhf_recipes.tasks import load_task

_imdb = load_task(Path(__file__).resolve().parent.parent / "imdb")
load_prompts, gold_reward = _imdb.load_prompts, _imdb.gold_reward


def talk_of_the_plot(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """How often a completion says plot, script or acting: meant to reward substance."""
    return [float(len(re.findall(r"\b(?:plot|script|acting)\b", completion))) for completion in completions]
