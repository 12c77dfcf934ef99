"""A batch of completions, as rewards read it."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.tokens import Prompt, decode_completions


@dataclass
class Samples:
    """Completions to be scored.

    sequences: prompt + completion as token ids, padded on both sides, [batch, context + response]
    prompts: as the task gave them
    columns: the dataset's other columns, a list of `batch` values each
    attention: which of `sequences` are tokens, [batch, context + response]; all of them by default
    ended: whether a completion has an end, [batch]; by default whether it has an eos
    """

    sequences: Tensor
    context_length: int
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    columns: dict[str, list] = field(default_factory=dict)
    attention: Tensor = None  # type: ignore[assignment]
    ended: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.attention is None:
            self.attention = torch.ones_like(self.sequences, dtype=torch.bool)
        if self.ended is None:
            self.ended = ((self.responses == self.tokenizer.eos_token_id) & self.mask).any(1)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, rows: slice) -> "Samples":
        columns = {name: values[rows] for name, values in self.columns.items()}
        tensors = {name: getattr(self, name)[rows] for name in ("sequences", "attention", "ended")}
        part = replace(self, prompts=self.prompts[rows], columns=columns, **tensors)
        if "texts" in vars(self):  # decoded once, and only for those who read text
            part.texts = self.texts[rows]
        return part

    @property
    def responses(self) -> Tensor:
        return self.sequences[:, self.context_length :]

    @property
    def mask(self) -> Tensor:
        """True on the completion's tokens, its end included; [batch, response]"""
        return self.attention[:, self.context_length :]

    @cached_property
    def texts(self) -> list[str]:
        """What the completions add to the texts of their prompts, without special tokens."""
        prompts, completions = (
            [row[keep].tolist() for row, keep in zip(ids, kept, strict=True)]
            for ids, kept in (
                (self.sequences[:, : self.context_length], self.attention[:, : self.context_length]),
                (self.responses, self.mask),
            )
        )
        return decode_completions(self.tokenizer, prompts, completions)
