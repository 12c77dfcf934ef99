"""Summarise a Reddit post in a sentence or two: TL;DR (Stiennon et al. 2020, arXiv 2009.01325), in TRL's preparation.

A prompt is text: `SUBREDDIT: r/...`, `TITLE: ...`, `POST: ...`, and ends with `TL;DR:`; a summary starts with a space.
"""

from datasets import Dataset, load_dataset

DEMONSTRATIONS = "trl-lib/tldr"  # columns prompt, completion; splits train, validation, test
PREFERENCES = "trl-lib/tldr-preference"  # columns prompt, chosen, rejected; splits train, validation
SPLITS = {"train": "train", "eval": "validation"}  # `test` stays unseen, for a last look


def load_demonstrations(split: str) -> Dataset:
    """Posts and the summaries that their authors wrote."""
    return load_dataset(DEMONSTRATIONS, split=SPLITS[split]).select_columns(["prompt", "completion"])


def load_prompts(split: str) -> Dataset:
    """The same posts, each once; the authors' summaries are what `author` holds, for python rewards."""
    rows = load_dataset(DEMONSTRATIONS, split=SPLITS[split])
    authors = dict(zip(rows["prompt"], rows["completion"], strict=True))
    return Dataset.from_dict({"prompt": list(authors), "author": list(authors.values())})


def load_preferences(split: str) -> Dataset:
    """Two summaries of a post, of which a person preferred one; without the news articles that `validation` has too."""
    rows = load_dataset(PREFERENCES, split=SPLITS[split])
    pairs = []
    for prompt, chosen, rejected in zip(rows["prompt"], rows["chosen"], rows["rejected"], strict=True):
        if prompt.startswith("SUBREDDIT:") and chosen.strip() != rejected.strip():
            # one space before a summary, whatever the source has: it must not tell a person's from a model's
            pairs.append({"prompt": prompt, "chosen": f" {chosen.strip()}", "rejected": f" {rejected.strip()}"})
    return Dataset.from_list(pairs)
