"""Sampling in this process: one way for training and evaluation alike.

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
from torch import Tensor

from rlhf_recipes.data.tokenizer import Ends
from rlhf_recipes.models.adapters import can_merge, merged_adapters
from rlhf_recipes.models.reference import Policy, Reference
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.rollouts.forward import model_inputs, trunk_and_head
from rlhf_recipes.rollouts.sampler import Sampled


@dataclass
class LeanSampler:
    """A `Sampler` in this process, over the weights that are trained.

    The same distribution as `model.generate(do_sample=True, top_k=0)`, in less time: the output embedding sees one position
    a row, and a token costs one random number a row where `torch.multinomial` draws one for every word of the vocabulary.
    A float32 LoRA policy's adapters are merged meanwhile.
    """

    ends: Ends
    length: int
    temperature: float

    @torch.no_grad()
    def __call__(self, policy: Policy, queries: Tensor, attention: Tensor, length: int | None = None) -> Sampled:
        batch, length = len(queries), min(self.length, length or self.length)
        responses = queries.new_full((batch, length), self.ends.pad)
        drawn = torch.zeros(batch, length, dtype=torch.bool, device=queries.device)
        logprobs = torch.zeros(batch, length, device=queries.device)
        mask = attention.bool()
        inputs: dict[str, Any] = model_inputs(queries, mask)
        ended = torch.zeros(batch, dtype=torch.bool, device=queries.device)
        with _speaking(policy) as model:
            trunk, head = trunk_and_head(model)
            cache = "cache_params" if "cache_params" in inspect.signature(trunk.forward).parameters else "past_key_values"
            past: dict[str, Any] = {}  # the model makes the cache that suits it
            for t in range(length):
                output = trunk(**inputs, **past, use_cache=True)
                past = {cache: getattr(output, cache, None)}
                if past[cache] is None:
                    raise RecipeError(f"{type(trunk).__name__} hands over no cache to sample with; use another backbone")
                probabilities = torch.softmax(head(output.last_hidden_state[:, -1]) / self.temperature, dim=-1)
                tokens = sample_tokens(probabilities)
                logprobs[:, t] = probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1).log().masked_fill(ended, 0)
                responses[:, t] = tokens = tokens.masked_fill(ended, self.ends.pad)
                drawn[:, t] = ~ended
                ended = ended | self.ends.reached(responses[:, : t + 1])
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


@contextmanager
def _speaking(policy: Policy) -> Iterator[Any]:
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
