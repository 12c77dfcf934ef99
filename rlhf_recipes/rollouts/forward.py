"""One forward pass over given completions: log-probabilities, entropy and KL of their tokens."""

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_recipes.models.logprobs import Head, token_statistics
from rlhf_recipes.models.reference import Policy, Reference


def trunk_and_head(model: PreTrainedModel | PeftModel) -> tuple[Any, Head]:
    """The transformer below the logits, adapters included, and the head that turns its last hidden state into logits."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config, embedding = model.config.get_text_config(), model.get_output_embeddings()
    if config.model_type == "modernbert-decoder":  # the one causal model with layers of its own between trunk and embedding
        embedding = nn.Sequential(model.lm_head, embedding)
    return getattr(model, model.base_model_prefix), Head.of(embedding, config)


@dataclass
class ResponseOutput:
    """The response's tokens in one forward pass.

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
    policy: Policy,
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
