"""Experience: completions that the policy samples, and what every role says of them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_recipes.algorithms.leash import Leash
from rlhf_recipes.algorithms.ppo_config import PPOConfig
from rlhf_recipes.models.value import ValueAdapter, ValueHead
from rlhf_recipes.process import stop_together
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.rewards.total import Rewards, Scores
from rlhf_recipes.roles import Roles
from rlhf_recipes.rollouts.forward import ResponseOutput, predicting_inputs, response_forward
from rlhf_recipes.rollouts.sampler import Sampled
from rlhf_recipes.rollouts.samples import Samples
from rlhf_recipes.tasks import for_rewards


class PolicyAndValue(nn.Module):
    """What is trained, as one module, so that one `accelerator.prepare` and one DDP wrapper hold it."""

    def __init__(self, policy: nn.Module, value: ValueHead) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    def forward(
        self,
        sequences: Tensor,
        attention: Tensor,
        context_length: int,
        temperature: float,
        reference_hidden: Tensor | None = None,
    ) -> tuple[ResponseOutput, Tensor]:
        """Returns the policy's view of the response and V before each of its tokens, [batch, response]."""
        output = response_forward(self.policy, sequences, attention, context_length, temperature, reference_hidden)
        if isinstance(self.value, ValueAdapter):
            hidden = self.value.hidden(**predicting_inputs(sequences, attention))
            return output, self.value(hidden[:, context_length - 1 :])
        return output, self.value(output.hidden)


@dataclass
class Rollout:
    """One batch of experience; all but the first three, `scores` and `ended` are [batch, response].

    `mask` marks the response's tokens, eos included, of rows that have a score. `value_mask` marks one position more where
    there is room: the state after the last token, where TRL puts the score.
    """

    query_responses: Tensor  # [batch, context + response]
    attention: Tensor  # which of them are tokens, [batch, context + response]
    context_length: int
    mask: Tensor
    logprobs: Tensor  # as the training pass computes them; the ratio starts at exactly 1
    sampling_logprobs: Tensor  # as the tokens were drawn, with a cache and merged adapters
    values: Tensor
    baseline: Tensor | None  # the reward model's score of the text so far, with `reward_baseline`; part of `values`
    kl: Tensor
    reference_logprobs: Tensor
    reference_hidden: Tensor | None  # [batch, response, hidden], with `kl: full`
    scores: Scores
    ended: Tensor  # whether a response has an end, [batch]

    @property
    def responses(self) -> Tensor:
        return self.query_responses[:, self.context_length :]

    @property
    def value_mask(self) -> Tensor:
        return after_mask(self.mask, self.scores.valid)


def after_mask(mask: Tensor, valid: Tensor) -> Tensor:
    """`mask` and one position more where there is room, of the rows that are `valid` [batch]; [batch, response]"""
    return torch.cat([valid.unsqueeze(1), mask[:, :-1]], dim=1)


@torch.no_grad()
def roll_out(
    model: PolicyAndValue,
    leash: Leash,
    roles: Roles,
    args: PPOConfig,
    queries: Tensor,
    attention: Tensor,
    rows: dict[str, list],
) -> Rollout:
    """Samples a response to each query and reads what every role says of it.

    Args:
        queries: padded on the left, [batch, context].
        attention: which of them are tokens, [batch, context].
        rows: the dataset's columns of the same prompts.

    Raises:
        RecipeError: a reward failed, on this process or another.
    """
    size, context = args.local_rollout_forward_batch_size, queries.shape[1]
    sampled = Sampled.joined([
        roles.sampler(model.policy, *chunk) for chunk in zip(queries.split(size), attention.split(size), strict=True)
    ])  # fmt: skip
    parts, reference_hidden = [], []
    for chunk in zip(sampled.sequences.split(size), sampled.attention.split(size), strict=True):
        if leash.reference is None:
            output, values = model(*chunk, context, args.temperature)
            reference = output
        else:
            reference = response_forward(leash.reference, *chunk, context, args.temperature)
            hidden = reference.hidden if args.kl == "full" else None
            reference_hidden += [] if hidden is None else [hidden]
            output, values = model(*chunk, context, args.temperature, hidden)
        parts.append((output.logprobs, leash.kl(output, reference.logprobs), reference.logprobs, values))
    logprobs, kl, reference_logprobs, values = (torch.cat(part) for part in zip(*parts, strict=True))
    columns = {name: rows[name] for name in for_rewards(rows)}
    samples = Samples(sampled.sequences, context, roles.tokenizer, rows["prompt"], columns, sampled.attention, sampled.ended)
    scores = _scores_of(samples, roles.reward, args)
    baseline = torch.zeros_like(values) if scores.prefix is None else scores.prefix[:, context - 1 : -1]
    mask = samples.mask & scores.valid.unsqueeze(1)
    return Rollout(
        query_responses=sampled.sequences,
        attention=sampled.attention,
        context_length=context,
        mask=mask,
        logprobs=logprobs,
        sampling_logprobs=sampled.logprobs,
        kl=kl * mask,
        reference_logprobs=reference_logprobs,
        reference_hidden=torch.cat(reference_hidden) if reference_hidden else None,
        values=(values + baseline) * after_mask(mask, scores.valid),
        baseline=None if scores.prefix is None else baseline,
        scores=scores,
        ended=sampled.ended,
    )


def _scores_of(samples: Samples, reward: Rewards, args: PPOConfig) -> Scores:
    """The rewards of this process's rollout; a failing one stops all processes."""
    scores, failure = None, None
    try:
        scores = reward(samples, args.local_rollout_forward_batch_size, prefix=args.reward_baseline)
    except RecipeError as error:
        failure = error
    stop_together(failure)
    assert scores is not None
    return scores
