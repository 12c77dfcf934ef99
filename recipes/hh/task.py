r"""Be a helpful and harmless assistant: Anthropic's HH (Bai et al. 2022, arXiv 2204.05862).

Its rows hold two whole dialogues as text, `chosen` and `rejected`, in the form "\n\nHuman: ...\n\nAssistant: ...", which are
meant to differ in the last answer alone. Here they become chat messages.
"""

import re

from datasets import Dataset, load_dataset

SOURCE = "Anthropic/hh-rlhf"  # columns chosen, rejected; splits train, test
PART = None  # all of it; or one folder: "helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"
SPLITS = {"train": "train", "eval": "test"}
ROLES = {"Human": "user", "Assistant": "assistant"}

Messages = list[dict[str, str]]


def load_demonstrations(split: str) -> Dataset:
    """Dialogues and the preferred answer."""
    return Dataset.from_list([{"prompt": prompt, "completion": chosen} for prompt, chosen, _ in _pairs(split)])


def load_prompts(split: str) -> Dataset:
    """Each dialogue once, up to where the assistant speaks."""
    prompts = [{"prompt": prompt} for prompt, _, _ in _pairs(split)]
    return Dataset.from_list(list({str(row): row for row in prompts}.values()))


def load_preferences(split: str) -> Dataset:
    """Two answers to a dialogue, of which a person preferred one."""
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in _pairs(split)]
    return Dataset.from_list(rows)


def _pairs(split: str) -> list[tuple[Messages, Messages, Messages]]:
    rows = load_dataset(SOURCE, data_dir=PART, split=SPLITS[split])
    pairs = [split_pair(chosen, rejected) for chosen, rejected in zip(rows["chosen"], rows["rejected"], strict=True)]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        print(f"{len(pairs) - len(found)} of {len(pairs)} rows of {SOURCE} are no dialogue with two last answers, left out")
    return found


def split_pair(chosen: str, rejected: str) -> tuple[Messages, Messages, Messages] | None:
    """(prompt, chosen, rejected) of two dialogues that differ in a last answer, else None."""
    one, other = dialogue(chosen), dialogue(rejected)
    if one is None or other is None or one[:-1] != other[:-1] or one[-1] == other[-1]:
        return None
    return one[:-1], one[-1:], other[-1:]


def dialogue(text: str) -> Messages | None:
    """The messages of a dialogue; None unless the speakers take turns, the person begins, the assistant has the last word,
    and nobody's words are empty."""
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    messages = [{"role": ROLES[name], "content": words.strip()} for name, words in zip(parts[::2], parts[1::2], strict=True)]
    in_turn = [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    return messages if messages and in_turn and not before.strip() and all(m["content"] for m in messages) else None
