"""The reward that is a LoRA adapter and a score head on the shared backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.models.adapters import loading_adapter, with_saved_adapter
from rlhf_recipes.models.classifier import build_classifier
from rlhf_recipes.models.lora import use_lean_lora
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import RewardTerm
from rlhf_recipes.rewards.reward import Shared
from rlhf_recipes.rollouts.samples import Samples


class AdapterReward(nn.Module):
    """A LoRA adapter and score head on the shared backbone, read at the last real token.

    Args:
        model: a PEFT sequence classifier with one label.
        ends: the end tokens, eos first.
        read_eos: whether the model was trained to read the end of a finished text; else end tokens are passed over.
    """

    model: Any

    def __init__(self, model: nn.Module, ends: Sequence[int] = (), read_eos: bool = True) -> None:
        super().__init__()
        self.model, self.ends, self.read_eos = model, tuple(ends), read_eos

    def score(self, samples: Samples) -> tuple[Tensor, None]:
        return self(*self._finished(samples)), None

    def prefix_score(self, samples: Samples) -> tuple[Tensor, Tensor]:
        scores = self.prefix_scores(*self._finished(samples))
        return scores[:, -1], scores[:, : samples.sequences.shape[1]]

    def _finished(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are tokens; a completion that ended with a text of `sampling.stop` gets the eos that the
        model was trained to read."""
        after = samples.context_length + samples.mask.sum(1)
        last = samples.sequences.gather(1, after.unsqueeze(1) - 1).squeeze(1)
        rows = (samples.ended & ~torch.isin(last, torch.tensor(self.ends, device=last.device))).nonzero().squeeze(1)
        if not self.read_eos or not self.ends or not len(rows):
            return samples.sequences, samples.attention
        ids, attention = (nn.functional.pad(tensor, (0, 1)) for tensor in (samples.sequences, samples.attention))
        ids[rows, after[rows]], attention[rows, after[rows]] = self.ends[0], True
        return ids, attention

    def forward(self, input_ids: Tensor, attention: Tensor | None = None) -> Tensor:
        """Scores prompt + completion; returns float32 [batch].

        Args:
            input_ids: padded anyhow, [batch, tokens].
            attention: which of them are tokens, [batch, tokens]; all of them by default.
        """
        hidden, last = self._read(input_ids, attention)
        return self._score(hidden[torch.arange(len(last)), last[:, -1]])

    def prefix_scores(self, input_ids: Tensor, attention: Tensor | None = None) -> Tensor:
        """r of the text up to and with each position, [batch, tokens] -> float32 [batch, tokens]; the last one is r."""
        hidden, last = self._read(input_ids, attention)
        return self._score(hidden).gather(1, last)

    def _read(self, input_ids: Tensor, attention: Tensor | None) -> tuple[Tensor, Tensor]:
        """The trunk's hidden states [batch, tokens, hidden], and the last real token up to each position [batch, tokens]."""
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention is None else attention.bool()
        if not self.read_eos:
            mask = mask & ~torch.isin(input_ids, torch.tensor(self.ends, device=input_ids.device))
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


def load(term: RewardTerm, shared: Shared) -> AdapterReward:
    """The adapter of `term`, over the backbone's own tensors.

    Raises:
        RecipeError: it cannot be loaded, does not fit the backbone, or would change its weights.
    """
    where, own = f"the reward's `adapter` {term.adapter}", list(shared.backbone.parameters())
    before = [(parameter.data_ptr(), parameter._version) for parameter in own]
    with loading_adapter(where, shared.backbone):
        model = with_saved_adapter(build_classifier(shared.backbone), shared.path(str(term.adapter)))
    if [(parameter.data_ptr(), parameter._version) for parameter in own] != before:
        raise RecipeError(
            f"{where}: it holds weights of the backbone's own (PEFT's `bias`, `save_embedding_layers` and such), which "
            f"every role shares; train it without"
        )
    use_lean_lora(model)
    return AdapterReward(model.requires_grad_(False).eval(), shared.ends, term.read_eos)
