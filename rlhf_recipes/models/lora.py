"""LoRA layers that do less: the same function as PEFT's, in six matrix products and no pass over the activations besides.

PEFT computes W x + s B (A x) as separate products, a scaling, an addition and, beside a half-precision backbone, conversions
of whole activations to float32 and back. Those passes cost more than the products of small rank do. Here the adapter's
product is accumulated into W x, forward and backward; beside a half-precision backbone A and B, kept in float32, are rounded
to its precision for the product, as autocast does.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn


def use_lean_lora(model: nn.Module) -> None:
    """Makes every plain LoRA linear layer of `model` a `LeanLoraLinear`, in place."""
    for module in model.modules():
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LeanLoraLinear


def is_plain(layer: nn.Module, adapters: list[str]) -> bool:
    """Whether a layer with these adapters computes W x + s B A x with a frozen W: no DoRA, no bias in B, no parameter."""
    return (
        isinstance(layer, lora.Linear)
        and not any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in adapters)
        and not any(parameter.requires_grad for parameter in layer.get_base_layer().parameters())
    )


class LeanLoraLinear(lora.Linear):
    """PEFT's LoRA layer; what it does beyond one plain adapter (merging, variants, several, dropout) stays PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged and not self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or len(adapters) != 1:
            return super().forward(x, *args, **kwargs)
        [name] = adapters
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        base = self.get_base_layer()
        plain = is_plain(self, adapters)
        autocast = x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)
        same_dtype = x.dtype == base.weight.dtype and not autocast
        if not plain or not same_dtype or (self.training and not isinstance(dropout, nn.Identity)):
            return super().forward(x)
        return _LoraLinear.apply(x, base.weight, base.bias, a.weight, b.weight, self.scaling[name])


class _LoraLinear(torch.autograd.Function):
    """y = W x + bias + s B A x; x [..., in], W [out, in], A [r, in], B [out, r]; W and bias get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.flatten(0, -2)
        down = flat @ a.to(x.dtype).t()
        y = nn.functional.linear(flat, weight, bias)
        y.addmm_(down, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(flat, down, weight, a, b)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, down, weight, a, b = ctx.saved_tensors
        g = gradients[0].flatten(0, -2)
        g_down = (g @ b.to(g.dtype)).mul_(ctx.scale)
        g_a, g_b = (g_down.t() @ flat).to(a.dtype), (g.t() @ down).to(b.dtype).mul_(ctx.scale)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = (g @ weight).addmm_(g_down, a.to(g.dtype)).view(*gradients[0].shape[:-1], -1)
        return g_x, None, None, g_a, g_b, None
