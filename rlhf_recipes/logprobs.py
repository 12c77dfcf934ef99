"""Log-probabilities, entropies and KLs of tokens, straight from hidden states.

At a real vocabulary the logits, not the trunk, are most of PPO's time and memory. Here they exist for one chunk of tokens
at a time, in training too: where the output embedding W is frozen, the gradients with respect to a hidden state h do not
depend on what comes after, so they are computed beside the values and the logits are dropped:

    d log pi(y) / dh = (W_y - E_pi[W]) / T          d KL(pi || ref) / dh = E_pi[(log pi/ref - KL) W] / T
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**21  # of logits at a time, 8 MB in float32: about what a CPU core's cache holds
CHUNKS_ON_GPU = 64  # times that: each chunk reads the whole output embedding, from a memory that caches little of it


def token_statistics(
    hidden: Tensor, targets: Tensor, head: nn.Module, temperature: float, reference_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What softmax(head(hidden) / temperature) says of `targets`.

    Args:
        hidden: last hidden states, [batch, tokens, hidden].
        targets: the token that each of them predicts, [batch, tokens].
        head: the output embedding.
        reference_hidden: the reference's hidden states of the same tokens, for the KL to it.

    Returns:
        log pi(target) [batch, tokens]; entropy in nats, without gradient; KL(pi || reference) over the whole vocabulary
        in nats, or None without `reference_hidden`. All float32.
    """
    flat = hidden.flatten(0, -2)
    reference = None if reference_hidden is None else reference_hidden.flatten(0, -2)
    weight = getattr(head, "weight", None)
    frozen = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    elements = CHUNK_ELEMENTS * (1 if hidden.device.type == "cpu" else CHUNKS_ON_GPU)
    rows = max(1, elements // (weight.shape[0] if weight is not None else 2**15))
    parts = []
    for at in range(0, len(flat), rows):
        h, y = flat[at : at + rows], targets.flatten()[at : at + rows]
        r = None if reference is None else reference[at : at + rows]
        if not (torch.is_grad_enabled() and (h.requires_grad or not frozen)):
            parts.append(_statistics(head, h, y, temperature, r))
        elif frozen:
            parts.append(_FrozenHead.apply(h, y, head, temperature, r))
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
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, reference: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk, plainly: hidden [tokens, hidden] -> log pi(target), entropy, KL, each [tokens]."""
    log_pi, pi, logprobs, entropy = _distribution(head, hidden, targets, temperature)
    if reference is None:
        return logprobs, entropy, None
    with torch.no_grad():
        log_ref = _log_softmax(head, reference, temperature)
    return logprobs, entropy, (pi * (log_pi - log_ref)).sum(-1)


def _distribution(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """log pi and pi [tokens, vocabulary], log pi(target) and entropy [tokens]."""
    log_pi = _log_softmax(head, hidden, temperature)
    pi = log_pi.exp()
    return log_pi, pi, log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(pi * log_pi).sum(-1)


def _log_softmax(head: nn.Module, hidden: Tensor, temperature: float) -> Tensor:
    logits = head(hidden).float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


class _FrozenHead(torch.autograd.Function):
    """`_statistics` with the gradients of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear, temperature: float, reference: Tensor | None):
        weight = head.weight
        log_pi, pi, logprobs, entropy = _distribution(head, hidden, targets, temperature)
        spread = pi.neg()  # one-hot less pi, formed in float32: at a confident token the two nearly cancel
        spread[torch.arange(len(targets), device=targets.device), targets] += 1
        logprob_slope = (spread.to(weight.dtype) @ weight).float() / temperature
        if reference is None:
            ctx.save_for_backward(logprob_slope)
            kl = None
        else:
            ratio = log_pi.sub_(_log_softmax(head, reference, temperature))
            kl = (pi * ratio).sum(-1)
            spread = pi.mul_(ratio.sub_(kl.unsqueeze(-1)))
            ctx.save_for_backward(logprob_slope, (spread.to(weight.dtype) @ weight).float() / temperature)
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
        return total.to(ctx.dtype), None, None, None, None
