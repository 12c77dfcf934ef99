"""Reward models: token ids in, one score a row out."""

from typing import Any

import torch
from torch import Tensor, nn


class AdapterReward(nn.Module):
    """r(x, y): a LoRA adapter and score head on the shared backbone, read at the last real token.

    Args:
        model: a PEFT sequence classifier with one label.
        pad_token_id: ignored wherever it stands, so padding side and amount do not matter.
        ignore_token_id: a token the model was not trained to read (eos, with `reward.read_eos: false`).
    """

    model: Any

    def __init__(self, model: nn.Module, pad_token_id: int, ignore_token_id: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = pad_token_id
        self.ignore_token_id = ignore_token_id

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores `input_ids` [batch, tokens] (prompt + completion, padded anyhow); returns float32 [batch]."""
        hidden, last = self._read(input_ids)
        return self._score(hidden[torch.arange(len(last)), last[:, -1]])

    def prefix_scores(self, input_ids: Tensor) -> Tensor:
        """r of the text up to and with each position, [batch, tokens] -> float32 [batch, tokens]; the last one is r."""
        hidden, last = self._read(input_ids)
        return self._score(hidden).gather(1, last)

    def _read(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's hidden states [batch, tokens, hidden], and the last real token up to each position [batch, tokens]."""
        mask = input_ids != self.pad_token_id
        if self.ignore_token_id is not None:
            mask &= input_ids != self.ignore_token_id
        classifier = self.model.get_base_model()
        trunk = getattr(classifier, classifier.base_model_prefix)
        hidden = trunk(
            input_ids=input_ids.masked_fill(~mask, 0),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        position = torch.arange(mask.shape[1], device=mask.device)
        return hidden, torch.where(mask, position, 0).cummax(1).values

    def _score(self, hidden: Tensor) -> Tensor:
        return self.model.get_base_model().score(hidden.float()).squeeze(-1)
