"""What in this data says that a reply is good? Each candidate, told from the reply's words alone.

    python recipes/chitchat/signals.py

TF-IDF + logistic regression, fitted on the replies of the part `backbone` and asked about pairs of two replies of one length,
a good and a bad one, of the part `reward`; 0.5 is chance.
"""

from collections import defaultdict
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf_recipes.tasks import load_task

task = load_task(Path(__file__).parent)
Labelled = list[tuple[str, bool]]


def by_answer(part: str, long: float, short: float, questions: bool | None = None) -> Labelled:
    """A long answer followed it, or a short one."""
    return [
        (reply.text, reply.answer >= long)
        for reply in task.replies(part)
        if not short < reply.answer < long and (questions is None or questions == ("?" in reply.text))
    ]


def by_rating(part: str, name: str) -> Labelled:
    """The conversation was rated 9 or 10, or 1 to 5; one with all three sliders where they start, at 5, has not been rated."""
    found = []
    for reply in task.replies(part):
        rating = task.ratings(reply.conversation)
        if rating and set(rating.values()) != {5} and not 5 < rating[name] < 9:
            found.append((reply.text, rating[name] >= 9))
    return found


def accuracy(train: Labelled, test: Labelled) -> tuple[float, int]:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=task.WORDS)
    texts, labels = zip(*train, strict=True)
    classifier = LogisticRegression(class_weight="balanced", max_iter=300).fit(vectorizer.fit_transform(texts), labels)
    scores = classifier.decision_function(vectorizer.transform([text for text, _ in test]))
    sides: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for (text, good), score in zip(test, scores, strict=True):
        sides[len(text.split())][good].append(score)
    right: list[float] = []
    for bad, good in sides.values():
        right += [(a > b) + (a == b) / 2 for a, b in zip(good, bad, strict=False)]
    return sum(right) / len(right), len(right)


def main() -> None:
    candidates = {
        "answer 1.4 times as long as usual or more, or 0.6 or less": lambda part: by_answer(part, 1.4, 0.6),
        "1.7 or more, 0.5 or less (the recipe's)": lambda part: by_answer(part, task.LONG, task.SHORT),
        "the same, replies with a question mark": lambda part: by_answer(part, task.LONG, task.SHORT, questions=True),
        "the same, replies without one": lambda part: by_answer(part, task.LONG, task.SHORT, questions=False),
        "2 or more, 0.4 or less": lambda part: by_answer(part, 2.0, 0.4),
    } | {f"rated {name}": lambda part, name=name: by_rating(part, name) for name in ("interesting", "witty", "upbeat")}
    for name, labelled in candidates.items():
        print("| {} | {:.3f} | {:,} |".format(name, *accuracy(labelled("backbone"), labelled("reward"))))


if __name__ == "__main__":
    main()
