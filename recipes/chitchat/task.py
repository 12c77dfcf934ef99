"""Chat: give the reply after which the other person writes a lot.

Data: the 7,168 conversations of the Chit-Chat Challenge (BYU, 2018), as the PyPI package `chitchat-dataset` ships them. Two
strangers talk; nobody rated single replies, but everybody answered them. A reply is engaging if the answer to it is long for
the person who wrote it. Every conversation belongs to exactly one part, chosen by a hash of its id.
"""

import functools
import hashlib
import importlib.util
import json
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

# part -> share of the conversations; the gold judge never saw what the reward was fitted to
PARTS = {"backbone": 0.36, "reward": 0.34, "gold": 0.18, "prompts": 0.06, "evaluation": 0.06}
CONTEXT_WORDS = 24  # a prompt is the last message, or the last three where they have no more words than this together
REPLY_WORDS = (3, 24)
LONG, SHORT = 1.7, 0.5  # an answer's words over the mean of all messages its writer has in the conversation
ONE_PROMPT_IN = 4  # replies of a conversation
WORDS = r"\w+|[?!]"  # what the gold judge counts, alone and in pairs
LENGTHS = (4, 8, 16, 24)  # groups of words in which held-out accuracy is told

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Reply:
    """One reply in its context; `answer` is how long the answer to it is, over its writer's mean."""

    conversation: str
    context: Messages
    text: str
    answer: float

    @property
    def words(self) -> int:
        return len(self.text.split())


def load_demonstrations(split: str) -> Dataset:
    """Conversations in pieces of two or four messages, for the backbone."""
    pieces = []
    for _, messages in conversations("backbone" if split == "train" else "evaluation"):
        texts = [text for _, text in messages]
        pieces += [_chat(texts[at : at + 4]) for at in range(0, len(texts), 4)]
    pieces = pieces if split == "train" else pieces[::4]
    return Dataset.from_dict({"messages": [piece[: len(piece) // 2 * 2] for piece in pieces if len(piece) > 1]})


def load_preferences(split: str) -> Dataset:
    """Pairs for the reward model: of two replies of one length, the one that was given here and got a long answer, over one
    that was given in another conversation and got a short answer."""
    rng = random.Random(0)
    short: dict[int, list[Reply]] = defaultdict(list)
    part = replies("reward" if split == "train" else "evaluation")
    for reply in part:
        if reply.answer <= SHORT:
            short[reply.words].append(reply)
    pairs = []
    for reply in part * (3 if split == "train" else 2):
        if reply.answer >= LONG and short[reply.words]:
            other = rng.choice(short[reply.words])
            if other.conversation != reply.conversation:
                words = next(n for n in LENGTHS if reply.words <= n)
                pairs.append({"prompt": reply.context, "chosen": reply.text, "rejected": other.text, "words": words})
    rng.shuffle(pairs)
    return Dataset.from_list(pairs)


def load_prompts(split: str) -> Dataset:
    """Contexts of real replies, in random order."""
    contexts = [reply.context for reply in replies("prompts" if split == "train" else "evaluation")][::ONE_PROMPT_IN]
    random.Random(0).shuffle(contexts)
    return Dataset.from_dict({"prompt": contexts})


def gold_reward(prompts: list[Messages], completions: list[Messages], **columns: list) -> list[float]:
    """P(a long answer) of the reply's words by TF-IDF + logistic regression, fitted on conversations that no training saw."""
    vectorizer, classifier = gold_judge()
    texts = [completion[-1]["content"] for completion in completions]
    return classifier.predict_proba(vectorizer.transform(texts))[:, 1].tolist()


@functools.cache
def gold_judge():
    """The fitted (vectorizer, classifier), once a process; as many long answers as short ones, so 0.5 says nothing."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    labelled = [(reply.text, reply.answer >= LONG) for reply in replies("gold") if not SHORT < reply.answer < LONG]
    texts, labels = zip(*labelled, strict=True)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=WORDS)
    return vectorizer, LogisticRegression(class_weight="balanced").fit(vectorizer.fit_transform(texts), labels)


@functools.cache
def replies(part: str) -> list[Reply]:
    """Every reply of `part` whose context and length fit, and that got an answer."""
    found = []
    for name, messages in conversations(part):
        lengths = defaultdict(list)
        for sender, text in messages:
            lengths[sender].append(len(text.split()))
        for at in range(1, len(messages) - 1):
            text, (sender, answer) = messages[at][1], messages[at + 1]
            mean = sum(lengths[sender]) / len(lengths[sender])
            context = _context([text for _, text in messages[max(0, at - 3) : at]])
            if context and REPLY_WORDS[0] <= len(text.split()) <= REPLY_WORDS[1]:
                found.append(Reply(name, context, text, len(answer.split()) / mean))
    return found


@functools.cache
def conversations(part: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(id, [(sender, text)]) of every conversation in `part` in which two people say eight things or more, in turn."""
    found = [(name, _turns(conversation["messages"])) for name, conversation in _dataset().items() if _part(name) == part]
    return [(name, turns) for name, turns in found if len(turns) >= 8 and len({sender for sender, _ in turns}) == 2]


def ratings(conversation: str) -> dict[str, int]:
    """`interesting`, `witty` and `upbeat`, each 1 to 10, where there are any."""
    return {name: int(value) for name, value in _dataset()[conversation].get("ratings", {}).items()}


@functools.cache
def _dataset() -> dict:
    spec = importlib.util.find_spec("chitchat_dataset")  # found, not imported: the file is all we need
    if spec is None or spec.origin is None:
        sys.exit("the chitchat recipe reads its conversations from a package: pip install chitchat-dataset==0.9.0")
    return json.loads((Path(spec.origin).parent / "dataset.json").read_text(encoding="utf-8"))


def _turns(messages: list[list[dict]]) -> list[tuple[str, str]]:
    """One text a turn: what somebody sends in a row is joined."""
    turns: list[tuple[str, str]] = []
    for utterances in messages:
        sender, text = utterances[0]["sender"], " ".join(" ".join(u["text"] for u in utterances).split())
        if turns and turns[-1][0] == sender:
            turns[-1] = (sender, f"{turns[-1][1]} {text}")
        elif text:
            turns.append((sender, text))
    return turns


def _context(texts: list[str]) -> Messages:
    """The messages before a reply, first and last by the user: three or one of `texts`, or none where the last is long."""
    for n in (3, 1):
        if len(texts) >= n and len(" ".join(texts[-n:]).split()) <= CONTEXT_WORDS:
            return _chat(texts[-n:])
    return []


def _chat(texts: list[str]) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _part(name: str) -> str:
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for part, share in PARTS.items():
        at -= share
        if at < 0:
            return part
    return next(reversed(PARTS))
