"""Log-probabilities, entropies and KLs of tokens, straight from hidden states.

At a real vocabulary the logits, not the trunk, are most of PPO's time and memory. Here they exist for one chunk of tokens
at a time, in training too: where the output embedding W is frozen, the gradients with respect to a hidden state h do not
depend on what comes after, so they are computed beside the values and the logits are dropped:

    d log pi(y) / dh = (W_y - E_pi[W]) / T          d KL(pi || ref) / dh = E_pi[(log pi/ref - KL) W] / T

Where a model changes its logits z = W h after the output embedding (`Head`), the rows of W are stretched by dz'/dz.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**19  # of logits at a time, 2 MB in float32: what a CPU core's cache holds
CHUNK_TOKENS = 64  # at least: fewer would read the whole output embedding too often
CHUNKS_ON_GPU = 256  # times the elements: a GPU's cache holds little of the output embedding
# What transformers' models do to their logits, by the key of the config that says so.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2 and later, RecurrentGemma, xLSTM
_FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
_DIVISOR = "logits_scaling"  # Granite; HyperCLOVA X multiplies by it
_MULTIPLIES = ("hyperclovax",)


@dataclass(frozen=True)
class Head:
    """From a trunk's last hidden state to logits: z' = cap tanh(scale W h / cap), or scale W h without a cap."""

    embedding: nn.Module  # the output embedding, with whatever stands before it
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, embedding: nn.Module, config: Any) -> "Head":
        """The head of a model with this config (its text part)."""
        scale = 1.0
        for key in _FACTORS:
            scale *= getattr(config, key, None) or 1.0
        divisor = getattr(config, _DIVISOR, None) or 1.0
        scale *= divisor if config.model_type in _MULTIPLIES else 1 / divisor
        cap = next((cap for key in _CAPS if (cap := getattr(config, key, None))), None)
        return cls(embedding, scale, cap)

    @property
    def frozen(self) -> bool:
        """One matrix that nobody trains, so that its gradients can be written down."""
        return type(self.embedding) is nn.Linear and not any(p.requires_grad for p in self.embedding.parameters())

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> logits [..., vocabulary], float32"""
        logits = self.embedding(hidden).float()
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def token_statistics(
    hidden: Tensor, targets: Tensor, head: Head, temperature: float, reference_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The statistics of `targets` under softmax(head(hidden) / temperature).

    Args:
        hidden: last hidden states, [batch, tokens, hidden].
        targets: the token that each of them predicts, [batch, tokens].
        reference_hidden: the reference's hidden states of the same tokens, for the KL to it.

    Returns:
        log pi(target) [batch, tokens]; entropy in nats, without gradient; KL(pi || reference) over the whole vocabulary
        in nats, or None without `reference_hidden`. All float32.
    """
    flat = hidden.flatten(0, -2)
    reference = None if reference_hidden is None else reference_hidden.flatten(0, -2)
    vocabulary = getattr(head.embedding, "out_features", 2**15)
    elements = CHUNK_ELEMENTS * (1 if hidden.device.type == "cpu" else CHUNKS_ON_GPU)
    rows = max(CHUNK_TOKENS, elements // vocabulary)
    scratch = _Scratch(min(rows, len(flat)), head) if head.frozen else None
    parts = []
    for at in range(0, len(flat), rows):
        h, y = flat[at : at + rows], targets.flatten()[at : at + rows]
        r = None if reference is None else reference[at : at + rows]
        if scratch is not None:
            parts.append(_FrozenHead.apply(h, y, temperature, r, scratch))
        else:
            parts.append(checkpoint(_statistics, head, h, y, temperature, r, use_reentrant=False))
    logprobs, entropy, kl = zip(*parts, strict=True)
    shape = targets.shape
    return (
        torch.cat(logprobs).view(shape),
        torch.cat(entropy).detach().view(shape),
        None if reference is None else torch.cat(kl).view(shape),
    )


def _statistics(
    head: Head, hidden: Tensor, targets: Tensor, temperature: float, reference: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk, plainly, for a head that is trained or more than one matrix.

    Args:
        hidden, reference: [tokens, hidden]

    Returns:
        log pi(target), entropy, KL, each [tokens].
    """
    log_pi = torch.log_softmax(head(hidden) / temperature, dim=-1)
    pi = log_pi.exp()
    logprobs, entropy = log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(pi * log_pi).sum(-1)
    if reference is None:
        return logprobs, entropy, None
    with torch.no_grad():
        log_ref = torch.log_softmax(head(reference) / temperature, dim=-1)
    return logprobs, entropy, (pi * (log_pi - log_ref)).sum(-1)


class _Scratch:
    """Memory for one chunk of logits, used again for the next one: fresh pages would cost more than the arithmetic."""

    def __init__(self, rows: int, head: Head) -> None:
        linear: Any = head.embedding
        self.weight, self.bias, self.scale, self.cap = linear.weight, linear.bias, head.scale, head.cap
        self.buffers: dict[str, Tensor] = {}
        self.rows = rows

    def of(self, name: str, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, vocabulary]"""
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.rows, len(self.weight), dtype=dtype, device=self.weight.device)
        return self.buffers[name][:rows]

    def distribution(self, hidden: Tensor, temperature: float, name: str) -> tuple[Tensor, Tensor]:
        """log pi and pi, [tokens, vocabulary] in float32."""
        rows, weight = len(hidden), self.weight
        log_pi, pi = self.of(f"log {name}", rows), self.of(name, rows)
        if weight.dtype == torch.float32:
            torch.mm(hidden.to(weight.dtype), weight.t(), out=log_pi)
        else:
            log_pi.copy_(torch.mm(hidden.to(weight.dtype), weight.t(), out=self.of("half", rows, weight.dtype)))
        if self.bias is not None:
            log_pi.add_(self.bias)
        if self.scale != 1:
            log_pi.mul_(self.scale)
        if self.cap is not None:
            self._cap(log_pi, name)
        if temperature != 1:
            log_pi.div_(temperature)
        log_pi.sub_(log_pi.amax(-1, keepdim=True))
        torch.exp(log_pi, out=pi)
        total = pi.sum(-1, keepdim=True)
        return log_pi.sub_(total.log()), pi.div_(total)

    def _cap(self, logits: Tensor, name: str) -> None:
        """Caps them in place, and keeps 1 - tanh^2, by which gradients are stretched there; [tokens, vocabulary]"""
        assert self.cap is not None
        logits.div_(self.cap).tanh_()
        torch.square(logits, out=self.of(f"slope {name}", len(logits))).neg_().add_(1)
        logits.mul_(self.cap)

    def times_embedding(self, spread: Tensor) -> Tensor:
        """d logits / dh: what [tokens, vocabulary] is worth per hidden state, [tokens, hidden] in float32; changes `spread`."""
        if self.scale != 1:
            spread = spread.mul_(self.scale)
        if self.cap is not None:
            spread = spread.mul_(self.of("slope pi", len(spread)))
        if self.weight.dtype != torch.float32:
            spread = self.of("half", len(spread), self.weight.dtype).copy_(spread)
        return torch.mm(spread, self.weight).float()


class _FrozenHead(torch.autograd.Function):
    """The statistics of one chunk, with the gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        reference: Tensor | None,
        scratch: _Scratch,
    ):
        gradient = ctx.needs_input_grad[0]
        log_pi, pi = scratch.distribution(hidden, temperature, "pi")
        logprobs = log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        entropy = -torch.linalg.vecdot(pi, log_pi)
        kl, slopes = None, []
        if reference is not None:
            log_ref, _ = scratch.distribution(reference, temperature, "ref")
            ratio = log_pi.sub_(log_ref)
            kl = torch.linalg.vecdot(pi, ratio)
            if gradient:
                slopes.append(scratch.times_embedding(ratio.sub_(kl.unsqueeze(-1)).mul_(pi)) / temperature)
        if gradient:
            spread = pi.neg_()  # one-hot less pi, formed in float32: at a confident token the two nearly cancel
            spread[torch.arange(len(targets), device=targets.device), targets] += 1
            slopes.insert(0, scratch.times_embedding(spread) / temperature)
        ctx.save_for_backward(*slopes)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Any):
        by_logprob, _, by_kl = gradients
        logprob_slope, *kl_slope = ctx.saved_tensors
        total = by_logprob.unsqueeze(-1) * logprob_slope
        if kl_slope:
            total += by_kl.unsqueeze(-1) * kl_slope[0]
        return (total.to(ctx.dtype), *[None] * 4)
