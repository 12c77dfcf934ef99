"""Answer what UltraFeedback asks (Cui et al. 2023, arXiv 2310.01377), in TRL's binarised preparation.

Its rows hold two whole conversations, `chosen` and `rejected`, and the prompt is what they begin with alike.
"""

from datasets import Dataset, load_dataset

SOURCE = "trl-lib/ultrafeedback_binarized"  # columns chosen, rejected, score_chosen, score_rejected; splits train, test
SPLITS = {"train": "train", "eval": "test"}

Messages = list[dict[str, str]]


def load_prompts(split: str) -> Dataset:
    """Each question once."""
    prompts = [{"prompt": prompt} for prompt, _, _ in _pairs(split)]
    return Dataset.from_list(list({str(row): row for row in prompts}.values()))


def load_preferences(split: str) -> Dataset:
    """Two answers to a question, the first with the higher score by GPT-4."""
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in _pairs(split)]
    return Dataset.from_list(rows)


def _pairs(split: str) -> list[tuple[Messages, Messages, Messages]]:
    """(prompt, chosen, rejected) of the rows with two different answers and two different scores."""
    rows = load_dataset(SOURCE, split=SPLITS[split])
    found = []
    for chosen, rejected, high, low in zip(
        rows["chosen"], rows["rejected"], rows["score_chosen"], rows["score_rejected"], strict=True
    ):
        prompt, *answers = split_pair(chosen, rejected)
        if high > low and all(answers) and prompt and prompt[-1]["role"] == "user":
            found.append((prompt, *answers))
    return found


def split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """What both conversations begin with, and what follows in each; TRL's `extract_prompt`, by whole messages."""
    same = 0
    while same < min(len(chosen), len(rejected)) and _plain(chosen[same]) == _plain(rejected[same]):
        same += 1
    return tuple([_plain(message) for message in part] for part in (chosen[:same], chosen[same:], rejected[same:]))


def _plain(message: dict[str, str]) -> dict[str, str]:
    """Role and content alone, in this order."""
    return {"role": message["role"], "content": message["content"]}
