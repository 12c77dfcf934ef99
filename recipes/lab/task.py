"""A contextual bandit with a known answer: the prompt is one letter, the completion up to three."""

from datasets import Dataset

LETTERS = "abcdefgh"


def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """A python reward: a point for every letter that is the prompt's next one, less half a point for every other."""
    following = [LETTERS[(LETTERS.index(prompt) + 1) % len(LETTERS)] for prompt in prompts]
    return [1.5 * c.count(letter) - 0.5 * len(c) for c, letter in zip(completions, following, strict=True)]


def load_prompts(split: str) -> Dataset:
    """The eight letters; for training many times over, so that a batch holds each of them equally often."""
    return Dataset.from_dict({"prompt": list(LETTERS) * (128 if split == "train" else 1)})
