"""Token statistics without logits: the same values and gradients as the plain formulas, a chunk at a time."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_recipes.models import logprobs
from rlhf_recipes.models.logprobs import Head, token_statistics


def example(bias=True, frozen=True, vocabulary=37):
    torch.manual_seed(0)
    head = nn.Linear(8, vocabulary, bias=bias).requires_grad_(not frozen)
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    return head, hidden, torch.randint(vocabulary, (3, 5)), torch.randn(3, 5, 8)


def plainly(head, hidden, targets, temperature, reference, scale=1.0, cap=None):
    """The definitions, with every logit in memory."""

    def logits(h):
        z = scale * head(h)
        return (z if cap is None else cap * torch.tanh(z / cap)) / temperature

    log_pi = logits(hidden).log_softmax(-1)
    log_ref = logits(reference).log_softmax(-1).detach()
    logprob = log_pi.gather(-1, targets[..., None])[..., 0]
    return logprob, -(log_pi.exp() * log_pi).sum(-1), (log_pi.exp() * (log_pi - log_ref)).sum(-1)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (1.0, 0.8), (2.0, 1.5)])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_plain_ones(frozen, bias, scale, cap, monkeypatch):
    head, hidden, targets, reference = example(bias, frozen)
    weights = torch.randn(2, 3, 5)
    expected = plainly(head, hidden, targets, 0.7, reference, scale, cap)
    parameters = [hidden, *([] if frozen else head.parameters())]
    slopes = torch.autograd.grad((weights[0] * expected[0] + weights[1] * expected[2]).sum(), parameters)
    for elements in (37 * 4, 10**6):  # four tokens a chunk, and all at once
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", elements)
        monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 1)
        logprob, entropy, kl = token_statistics(hidden, targets, Head(head, scale, cap), 0.7, reference)
        for mine, plain in zip((logprob, entropy, kl), expected, strict=True):
            torch.testing.assert_close(mine, plain)
        assert not entropy.requires_grad
        mine = torch.autograd.grad((weights[0] * logprob + weights[1] * kl).sum(), parameters)
        for slope, plain in zip(mine, slopes, strict=True):
            torch.testing.assert_close(slope, plain)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_more_logits_than_a_chunk_are_ever_made(frozen, monkeypatch):
    head, hidden, targets, reference = example(frozen=frozen)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 37 * 4)
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 1)
    rows = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.shape[-1:] == (37,)]
            rows.extend(t.shape[0] for t in tensors if t.shape not in ((8, 37), (37,)))  # the output embedding and its bias
            return output

    with Watch():
        logprob, _, kl = token_statistics(hidden, targets, Head(head), 1.0, reference)
        (logprob.sum() + kl.sum()).backward()
    assert max(rows) == 4


def test_bfloat16_hidden_states_get_bfloat16_gradients():
    head, hidden, targets, reference = example()
    expected = plainly(head, hidden, targets, 1.0, reference)[0]
    low = hidden.detach().bfloat16().requires_grad_()
    logprob, entropy, _ = token_statistics(low, targets, Head(copy.deepcopy(head).bfloat16()), 1.0)
    assert logprob.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprob, expected, atol=0.05, rtol=0.05)
    logprob.sum().backward()
    assert low.grad.dtype == torch.bfloat16
    slope = torch.autograd.grad(expected.sum(), hidden)[0]
    torch.testing.assert_close(low.grad.float(), slope, atol=0.05, rtol=0.05)
