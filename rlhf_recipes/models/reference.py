"""pi_ref: the policy with its adapters off, or as it was some updates ago."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


class Reference(nn.Module):
    """pi_ref: the policy with its adapters off, hence bit for bit the backbone.

    It holds the policy without registering it, so it has no parameters of its own, and DDP, optimizers and `.to()` see
    nothing twice.
    """

    def __init__(self, policy: PeftModel) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple: nn.Module would register a plain attribute

    @contextmanager
    def speaking(self) -> Iterator[PeftModel]:
        """The policy, speaking as the reference while this lasts."""
        (policy,) = self._policy
        with policy.disable_adapter():
            yield policy

    def forward(self, **inputs: Tensor):
        with self.speaking() as policy:
            return policy(**inputs)


class SyncedReference(Reference):
    """The policy as it was when `sync` was last called; at first, as it is now. Costs a copy of the adapter."""

    def __init__(self, policy: PeftModel) -> None:
        super().__init__(policy)
        self.sync()

    def sync(self) -> None:
        """Follows the policy."""
        (policy,) = self._policy
        self.adapter = [(p, p.detach().clone()) for p in policy.parameters() if p.requires_grad]

    @contextmanager
    def speaking(self) -> Iterator[PeftModel]:
        (policy,) = self._policy
        now = [parameter.data for parameter, _ in self.adapter]
        try:
            for parameter, then in self.adapter:
                parameter.data = then
            yield policy
        finally:
            for (parameter, _), data in zip(self.adapter, now, strict=True):
                parameter.data = data


Policy = PreTrainedModel | PeftModel | Reference  # whoever gives a distribution over completions
