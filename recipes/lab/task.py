"""A contextual bandit with a known answer: the prompt is one letter, the completion up to three."""

from datasets import Dataset

LETTERS = "abcdefgh"


def load_prompts(split: str) -> Dataset:
    """The eight letters; for training many times over, so that a batch holds each of them equally often."""
    return Dataset.from_dict({"prompt": list(LETTERS) * (128 if split == "train" else 1)})
