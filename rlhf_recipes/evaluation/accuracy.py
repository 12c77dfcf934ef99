"""How often a reward adapter scores the better of two texts higher."""

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_recipes.data.tokens import pad_left
from rlhf_recipes.process import progress_bar
from rlhf_recipes.rewards.adapter import AdapterReward


@torch.no_grad()
def pairwise_accuracy(reward: AdapterReward, pairs: Dataset, batch_size: int) -> dict[str, float]:
    """The share of held-out pairs whose chosen text scores higher: over all, and by `words` where the pairs have it.

    Args:
        reward: token ids [batch, tokens] -> scores [batch].
        pairs: as `tokenize_pairs` makes them, perhaps with `words`.
    """

    def scores(rows: list[list[int]]) -> Tensor:
        return reward(*(tensor.to(reward.model.device) for tensor in pad_left(rows, 0)))

    correct: dict[str, list[bool]] = {"all": []}
    pairs = pairs.sort("length")
    for start in progress_bar(range(0, len(pairs), batch_size), desc="held-out pairs", leave=False):
        batch = pairs[start : start + batch_size]
        right = (scores(batch["chosen_ids"]) > scores(batch["rejected_ids"])).tolist()
        correct["all"] += right
        for words, is_right in zip(batch.get("words", []), right, strict=False):
            correct.setdefault(f"{words} words", []).append(is_right)
    return {name: sum(values) / len(values) for name, values in correct.items()}
