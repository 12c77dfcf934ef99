"""V(s): a head on the policy's trunk, or a LoRA adapter and head of its own."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_recipes.models.adapters import with_new_adapter
from rlhf_recipes.models.backbone import hidden_width
from rlhf_recipes.models.classifier import build_classifier
from rlhf_recipes.models.lora import use_lean_lora
from rlhf_recipes.recipe.sections import LoraSection


class Score(nn.Linear):
    """A scalar in float32 from a hidden state of any precision."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype))


class ValueHead(nn.Module):
    """V(s): one linear layer on a trunk's last hidden state; it starts at zero, so the first advantages are returns."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = Score(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> [batch, tokens]"""
        return self.score(hidden).squeeze(-1)


class ValueAdapter(ValueHead):
    """V(s) with a LoRA adapter of its own over the shared frozen weights (`ppo.value: adapter`)."""

    def __init__(self, trunk: nn.Module, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.trunk = trunk

    def hidden(self, **inputs: Tensor) -> Tensor:
        return self.trunk(**inputs, use_cache=False).last_hidden_state


def build_value(kind: str, backbone: PreTrainedModel, lora: LoraSection) -> ValueHead:
    """The value function of `ppo.value`: "trunk" or "adapter" (call before the policy's adapters are injected)."""
    if kind == "trunk":
        return ValueHead(hidden_width(backbone))
    model = with_new_adapter(build_classifier(backbone), lora, "SEQ_CLS")
    use_lean_lora(model)
    trunk = model.get_base_model()
    return ValueAdapter(getattr(trunk, trunk.base_model_prefix), hidden_width(backbone))
