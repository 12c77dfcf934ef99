"""The seam between whoever needs completions and whoever draws them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf_recipes.data.tokenizer import Ends
from rlhf_recipes.models.reference import Policy


@dataclass
class Sampled:
    """Completions as they were drawn.

    sequences: token ids of prompt + completion, [batch, context + response]
    attention: which of them are tokens and not padding, [batch, context + response]
    logprobs: log pi of each token as it was drawn, zero where there is none, [batch, response]
    ended: whether a completion has an end, [batch]
    """

    sequences: Tensor
    attention: Tensor
    logprobs: Tensor
    ended: Tensor

    @classmethod
    def joined(cls, parts: "list[Sampled]") -> "Sampled":
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


class Sampler(Protocol):
    """Draws one completion a row from softmax(logits / temperature); no top-k, no top-p.

    All randomness comes from torch's global generator, so that a resumed run draws what an uninterrupted one does: a sampler
    outside this process takes a seed for each row from there. The policy is handed over at every call, since its weights may
    have changed, and it may be the reference: a sampler that keeps a copy of an adapter has to notice by itself.

    ends: where a completion ends.
    length: tokens of a completion, at most.
    temperature: pi(y|x) is defined at this one, wherever its log-probabilities are read.
    """

    ends: Ends
    length: int
    temperature: float

    def __call__(self, policy: Policy, queries: Tensor, attention: Tensor, length: int | None = None) -> Sampled:
        """
        Args:
            policy: a causal model, with or without an adapter, or the reference.
            queries: token ids padded on the left, [batch, context].
            attention: which of them are tokens, [batch, context].
            length: fewer tokens than `self.length`.
        """
