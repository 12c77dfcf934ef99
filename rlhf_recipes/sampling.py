"""Sampling completions and reading their log-probabilities: one way for training and evaluation alike."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.logprobs import token_statistics
from rlhf_recipes.roles import Reference, merged_adapters


@torch.no_grad()
def sample_completions(
    policy: PreTrainedModel | PeftModel | Reference,
    queries: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Samples one completion a row from softmax(logits / temperature); no top-k, no top-p, no scores kept.

    The same distribution as `model.generate(do_sample=True, top_k=0)`, in less time: the output embedding sees one position
    a row, and a token costs one random number a row where `torch.multinomial` draws one for every word of the vocabulary.

    Args:
        policy: a float32 LoRA policy's adapters are merged meanwhile.
        queries: token ids padded on the left, [batch, context].

    Returns:
        query_responses [batch, context + max_new_tokens]; after eos, pad. And log pi of each sampled token as it was
        drawn, [batch, max_new_tokens], zero after eos.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    responses = queries.new_full((len(queries), max_new_tokens), pad)
    logprobs = torch.zeros(len(queries), max_new_tokens, device=queries.device)
    mask = queries != pad
    inputs = model_inputs(queries, pad)
    ended = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    with _speaking(policy) as model:
        trunk, head = trunk_and_head(model)
        cache = DynamicCache(config=trunk.config)
        for t in range(max_new_tokens):
            hidden = trunk(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            probabilities = torch.softmax(head(hidden).float() / temperature, dim=-1)
            tokens = sample_tokens(probabilities)
            logprobs[:, t] = probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1).log().masked_fill(ended, 0)
            tokens = tokens.masked_fill(ended, pad)
            responses[:, t] = tokens
            ended |= tokens == eos
            if ended.all():
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            inputs = {
                "input_ids": tokens.unsqueeze(1),
                "attention_mask": mask,
                "position_ids": inputs["position_ids"][:, -1:] + 1,
            }
    return torch.cat([queries, responses], dim=1), logprobs


def sample_tokens(probabilities: Tensor) -> Tensor:
    """One draw a row by inverting the distribution function; [batch, vocabulary] -> [batch]"""
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    chance = torch.rand(len(probabilities), 1, dtype=torch.float64, device=probabilities.device) * total  # below total
    return torch.searchsorted(cumulative, chance, right=True).squeeze(1).clamp(max=probabilities.shape[1] - 1)


def trunk_and_head(model: PreTrainedModel | PeftModel) -> tuple[Any, nn.Module]:
    """The transformer below the logits, adapters included, and the output embedding."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(model, model.base_model_prefix), model.get_output_embeddings()


@contextmanager
def _speaking(policy: PreTrainedModel | PeftModel | Reference) -> Iterator[Any]:
    """Gives the model to generate with, in evaluation mode: gradient checkpointing would switch its cache off.

    Adapters are merged in float32 only; a half-precision W swallows a small BA.
    """
    if isinstance(policy, Reference):
        weights: AbstractContextManager = policy.speaking()
    elif isinstance(policy, PeftModel) and policy.dtype == torch.float32:
        weights = merged_adapters(policy)
    else:
        weights = nullcontext(policy)
    with weights as model:
        training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(training)


@dataclass
class ResponseOutput:
    """What one forward pass says of the response's tokens.

    logprobs: log pi(y_t | x, y_<t) at the sampling temperature, [batch, response]
    entropy: of pi(. | x, y_<t), [batch, response]; without gradient
    hidden: the trunk's last hidden state where y_t is predicted, [batch, response, hidden]
    kl: KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t)) over the whole vocabulary, in nats, [batch, response]; None unless
        the reference's hidden states were given
    """

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor
    kl: Tensor | None


def model_inputs(query_responses: Tensor, pad_token_id: int) -> dict[str, Tensor]:
    """Ids, mask and positions in which pads do not count, wherever they stand (as TRL's `forward`)."""
    mask = query_responses != pad_token_id
    return {
        "input_ids": query_responses.masked_fill(~mask, 0),
        "attention_mask": mask,
        "position_ids": mask.cumsum(1) - mask.long(),
    }


def predicting_inputs(query_responses: Tensor, pad_token_id: int) -> dict[str, Tensor]:
    """`model_inputs` without the last token, which predicts none of the others."""
    return {name: values[:, :-1] for name, values in model_inputs(query_responses, pad_token_id).items()}


def response_forward(
    policy: PreTrainedModel | PeftModel | Reference,
    query_responses: Tensor,
    context_length: int,
    pad_token_id: int,
    temperature: float,
    reference_hidden: Tensor | None = None,
) -> ResponseOutput:
    """Runs `policy` over [batch, context + response]; no logits outlive a chunk of the response's tokens.

    Args:
        reference_hidden: the reference's `hidden` of the same tokens; its distributions are rebuilt from that, since the
            hidden states are hundreds of times smaller than the logits.
    """
    if isinstance(policy, Reference):
        with policy.speaking() as backbone:
            return response_forward(backbone, query_responses, context_length, pad_token_id, temperature, reference_hidden)
    trunk, head = trunk_and_head(policy)
    hidden = trunk(**predicting_inputs(query_responses, pad_token_id), use_cache=False).last_hidden_state
    hidden = hidden[:, context_length - 1 :]
    targets = query_responses[:, context_length:]
    logprobs, entropy, kl = token_statistics(hidden, targets, head, temperature, reference_hidden)
    return ResponseOutput(logprobs, entropy, hidden, kl)


def response_mask(responses: Tensor, pad_token_id: int) -> Tensor:
    """True on the response's tokens, eos included, False on the padding after it; [batch, response]."""
    return (responses != pad_token_id).cummin(dim=1).values
