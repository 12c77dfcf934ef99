"""Sampling completions and reading their log-probabilities: one way for training and evaluation alike."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.logprobs import token_statistics
from rlhf_recipes.roles import Reference, merged_adapters


@torch.no_grad()
def sample_completions(
    policy: PreTrainedModel | PeftModel | Reference,
    queries: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
) -> Tensor:
    """Samples one completion a row from softmax(logits / temperature); no top-k, no top-p, no scores kept.

    Args:
        policy: a LoRA policy's adapters are merged meanwhile.
        queries: token ids padded on the left, [batch, context].

    Returns:
        query_responses: [batch, context + max_new_tokens]; after eos, pad.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    mask = queries != tokenizer.pad_token_id
    with _speaking(policy) as model:
        sequences = model.generate(input_ids=queries.masked_fill(~mask, 0), attention_mask=mask, generation_config=config)
    responses = sequences[:, queries.shape[1] :]
    missing = max_new_tokens - responses.shape[1]  # generation stops when every row has ended
    responses = nn.functional.pad(responses, (0, missing), value=tokenizer.pad_token_id)
    return torch.cat([queries, responses], dim=1)


def _speaking(policy: PreTrainedModel | PeftModel | Reference) -> AbstractContextManager[Any]:
    """Gives the model to generate with."""
    if isinstance(policy, Reference):
        return policy.adapters_off()
    if isinstance(policy, PeftModel):
        return merged_adapters(policy)
    return nullcontext(policy)


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
        with policy.adapters_off() as backbone:
            return response_forward(backbone, query_responses, context_length, pad_token_id, temperature, reference_hidden)
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    trunk = getattr(model, model.base_model_prefix)
    hidden = trunk(**model_inputs(query_responses, pad_token_id), use_cache=False).last_hidden_state
    hidden = hidden[:, context_length - 1 : -1]
    targets = query_responses[:, context_length:]
    logprobs, entropy, kl = token_statistics(hidden, targets, model.get_output_embeddings(), temperature, reference_hidden)
    return ResponseOutput(logprobs, entropy, hidden, kl)


def response_mask(responses: Tensor, pad_token_id: int) -> Tensor:
    """True on the response's tokens, eos included, False on the padding after it; [batch, response]."""
    return (responses != pad_token_id).cummin(dim=1).values
