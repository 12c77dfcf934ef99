"""A sequence classifier on the shared backbone, which scores every position."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_recipes.models.backbone import hidden_width, shared_copy


class SequenceClassifier:
    """A head with one label on a family's trunk, before which `build_classifier` puts the family's PreTrainedModel.

    Its weights have the names that transformers' own classifiers of that family give theirs. It reads the score where the mask
    says that a text ends; theirs look for the last token that is not the pad, and not every family has one.
    """

    def __init__(self, config: Any, trunk: nn.Module, width: int) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.post_init()  # type: ignore[attr-defined] # before there are weights, which it would draw
        setattr(self, self.base_model_prefix, trunk)  # type: ignore[attr-defined]
        self.score = nn.Linear(width, 1, bias=False, dtype=torch.float32, device=trunk.device)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """[batch, tokens], padded on the right -> logits [batch, 1]"""
        trunk = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        hidden = trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return SequenceClassifierOutput(logits=self.score(hidden.float())[torch.arange(len(last), device=mask.device), last])


def build_classifier(backbone: PreTrainedModel) -> PreTrainedModel:
    """A sequence classifier with one label over the very tensors of `backbone` (call before adapters are injected)."""
    trunk = shared_copy(getattr(backbone, backbone.base_model_prefix))
    family = next(cls for cls in type(trunk).__mro__ if PreTrainedModel in cls.__bases__)
    name = f"{type(backbone).__name__.partition('For')[0]}ForSequenceClassification"
    config = type(backbone.config)(**{**backbone.config.to_dict(), "num_labels": 1})
    made: Any = type(name, (SequenceClassifier, family), {"base_model_prefix": backbone.base_model_prefix})
    classifier = made(config, trunk, hidden_width(backbone))
    classifier.name_or_path = backbone.name_or_path
    return classifier.requires_grad_(False)
