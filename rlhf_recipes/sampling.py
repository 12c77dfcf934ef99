"""Sampling completions and reading their log-probabilities: one way for training and evaluation alike.

Rows of prompt + completion are padded on both sides. A mask says which positions are tokens, never a token's id: a
text may hold the pad token, and a model may draw it.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_recipes.data import Ends
from rlhf_recipes.logprobs import Head, token_statistics
from rlhf_recipes.recipe import RecipeError
from rlhf_recipes.roles import Reference, can_merge, merged_adapters


@dataclass
class Sampled:
    """Completions as they were drawn.

    sequences: token ids of prompt + completion, [batch, context + response]
    attention: which of them are tokens and not padding, [batch, context + response]
    logprobs: log pi of each token as it was drawn, zero where there is none, [batch, response]
    ended: whether a completion has an end, [batch]
    """

    sequences: Tensor
    attention: Tensor
    logprobs: Tensor
    ended: Tensor

    @classmethod
    def joined(cls, parts: "list[Sampled]") -> "Sampled":
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@torch.no_grad()
def sample_completions(
    policy: PreTrainedModel | PeftModel | Reference,
    queries: Tensor,
    attention: Tensor,
    ends: Ends,
    max_new_tokens: int,
    temperature: float,
) -> Sampled:
    """Samples one completion a row from softmax(logits / temperature); no top-k, no top-p, no scores kept.

    The same distribution as `model.generate(do_sample=True, top_k=0)`, in less time: the output embedding sees one position
    a row, and a token costs one random number a row where `torch.multinomial` draws one for every word of the vocabulary.

    Args:
        policy: a float32 LoRA policy's adapters are merged meanwhile.
        queries: token ids padded on the left, [batch, context].
        attention: which of them are tokens, [batch, context].
    """
    batch = len(queries)
    responses = queries.new_full((batch, max_new_tokens), ends.pad)
    drawn = torch.zeros(batch, max_new_tokens, dtype=torch.bool, device=queries.device)
    logprobs = torch.zeros(batch, max_new_tokens, device=queries.device)
    mask = attention.bool()
    inputs: dict[str, Any] = model_inputs(queries, mask)
    ended = torch.zeros(batch, dtype=torch.bool, device=queries.device)
    with _speaking(policy) as model:
        trunk, head = trunk_and_head(model)
        cache = "cache_params" if "cache_params" in inspect.signature(trunk.forward).parameters else "past_key_values"
        past: dict[str, Any] = {}  # the model makes the cache that suits it
        for t in range(max_new_tokens):
            output = trunk(**inputs, **past, use_cache=True)
            past = {cache: getattr(output, cache, None)}
            if past[cache] is None:
                raise RecipeError(f"{type(trunk).__name__} hands over no cache to sample with; use another backbone")
            probabilities = torch.softmax(head(output.last_hidden_state[:, -1]) / temperature, dim=-1)
            tokens = sample_tokens(probabilities)
            logprobs[:, t] = probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1).log().masked_fill(ended, 0)
            responses[:, t] = tokens = tokens.masked_fill(ended, ends.pad)
            drawn[:, t] = ~ended
            ended = ended | ends.reached(responses[:, : t + 1])
            if ended.all():
                break
            mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
            inputs = {
                "input_ids": tokens.unsqueeze(1),
                "attention_mask": mask if cache == "past_key_values" else None,  # a recurrent state holds no padding
                "position_ids": inputs["position_ids"][:, -1:] + 1,
            }
    return Sampled(torch.cat([queries, responses], 1), torch.cat([attention.bool(), drawn], 1), logprobs, ended)


def sample_tokens(probabilities: Tensor) -> Tensor:
    """One draw a row by inverting the distribution function; [batch, vocabulary] -> [batch]"""
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    chance = torch.rand(len(probabilities), 1, dtype=torch.float64, device=probabilities.device) * total  # below total
    return torch.searchsorted(cumulative, chance, right=True).squeeze(1).clamp(max=probabilities.shape[1] - 1)


def trunk_and_head(model: PreTrainedModel | PeftModel) -> tuple[Any, Head]:
    """The transformer below the logits, adapters included, and what makes logits of its last hidden state."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config, embedding = model.config.get_text_config(), model.get_output_embeddings()
    if config.model_type == "modernbert-decoder":  # the one causal model with layers of its own between trunk and embedding
        embedding = nn.Sequential(model.lm_head, embedding)
    return getattr(model, model.base_model_prefix), Head.of(embedding, config)


@contextmanager
def _speaking(policy: PreTrainedModel | PeftModel | Reference) -> Iterator[Any]:
    """Gives the model to generate with, in evaluation mode: gradient checkpointing would switch its cache off.

    Adapters are merged in float32 only; a half-precision W swallows a small BA.
    """
    if isinstance(policy, Reference):
        weights: AbstractContextManager = policy.speaking()
    elif isinstance(policy, PeftModel) and policy.dtype == torch.float32 and can_merge(policy):
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


def model_inputs(sequences: Tensor, attention: Tensor) -> dict[str, Tensor]:
    """Ids, mask and positions in which padding does not count, wherever it stands (as TRL's `forward`); all [batch, tokens]"""
    mask = attention.bool()
    return {
        "input_ids": sequences.masked_fill(~mask, 0),
        "attention_mask": mask,
        "position_ids": mask.cumsum(1) - mask.long(),
    }


def predicting_inputs(sequences: Tensor, attention: Tensor) -> dict[str, Tensor]:
    """`model_inputs` without the last token, which predicts none of the others."""
    return {name: values[:, :-1] for name, values in model_inputs(sequences, attention).items()}


def response_forward(
    policy: PreTrainedModel | PeftModel | Reference,
    sequences: Tensor,
    attention: Tensor,
    context_length: int,
    temperature: float,
    reference_hidden: Tensor | None = None,
) -> ResponseOutput:
    """Runs `policy` over [batch, context + response]; no logits outlive a chunk of the response's tokens.

    Args:
        attention: which of `sequences` are tokens, [batch, context + response].
        reference_hidden: the reference's `hidden` of the same tokens; its distributions are rebuilt from that, since the
            hidden states are hundreds of times smaller than the logits.
    """
    if isinstance(policy, Reference):
        with policy.speaking() as backbone:
            return response_forward(backbone, sequences, attention, context_length, temperature, reference_hidden)
    trunk, head = trunk_and_head(policy)
    hidden = trunk(**predicting_inputs(sequences, attention), use_cache=False).last_hidden_state
    hidden = hidden[:, context_length - 1 :]
    targets = sequences[:, context_length:]
    logprobs, entropy, kl = token_statistics(hidden, targets, head, temperature, reference_hidden)
    return ResponseOutput(logprobs, entropy, hidden, kl)
