"""Does the reward model read the context? Held-out accuracy as it is, with contexts shuffled, and on what fits alone.

python recipes/chitchat/context.py     # after scripts/reward.py
"""

import random
from collections import defaultdict
from pathlib import Path

from datasets import Dataset

from rlhf_recipes.data.datasets import tokenize_pairs
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.evaluation.accuracy import pairwise_accuracy
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.roles import build_roles
from rlhf_recipes.tasks import load_dataset, load_task


def main() -> None:
    recipe = load_recipe(Path(__file__).parent)
    tokenizer = load_tokenizer(recipe)
    reward = build_roles(recipe, tokenizer).reward.adapter
    pairs = load_dataset(load_task(recipe), "load_preferences", "eval").to_list()
    rng = random.Random(0)  # noqa: S311

    contexts = [pair["prompt"] for pair in pairs]
    rng.shuffle(contexts)
    engaging = defaultdict(list)
    for pair in pairs:
        engaging[len(pair["chosen"].split())].append(pair["chosen"])

    def another(reply: str) -> str:
        return rng.choice([other for other in engaging[len(reply.split())] if other != reply] or [""])

    for name, rows in {
        "as it is": pairs,
        "contexts shuffled": [{**pair, "prompt": context} for pair, context in zip(pairs, contexts, strict=True)],
        "the real reply over another one that got a long answer": [
            {**pair, "rejected": another(pair["chosen"])} for pair in pairs
        ],
    }.items():
        tokens = tokenize_pairs(Dataset.from_list(rows), tokenizer, recipe.reward.adapter_reads_eos)
        print(f"{name}: {pairwise_accuracy(reward, tokens, recipe.evaluate.batch_size)['all']:.3f}")


if __name__ == "__main__":
    main()
