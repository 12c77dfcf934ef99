"""PPO (Schulman et al. 2017, arXiv 1707.06347) on what a language model says (Ziegler et al. 2019, arXiv 1909.08593).

    rollout     y ~ pi_old(.|x); every role reads it                                experience.py
    rewards     r_t = -beta KL_t, plus r(x, y) where y ends                         PPO.rewards
    advantages  A_t by GAE, whitened; V is fitted to A_t + V_old(s_t)               PPO.advantages
    loss        -min(ratio A, clip(ratio) A) + vf_coef (V - R)^2 / 2, clipped       PPO.loss

`num_ppo_epochs` passes over the rollout, an optimizer step for each of `num_mini_batches`, are trainer.py's. The equations are
pure functions in objective.py, the KL is leash.py's. A2C is PPO with one step on each rollout (arXiv 2205.09123).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_recipes.algorithms.experience import Rollout
from rlhf_recipes.algorithms.leash import Leash
from rlhf_recipes.algorithms.ppo_config import PPOConfig
from rlhf_recipes.objective import (
    clipped_surrogate,
    clipped_value_loss,
    generalized_advantages,
    masked_mean,
    token_rewards,
    whitened,
    whitening_scale,
)


@dataclass
class Advantages:
    """What the rollout's tokens were worth. `scale` is by how much whitening stretched the advantages (1 without)."""

    advantages: Tensor  # [batch, response]
    returns: Tensor  # [batch, response]
    scale: Tensor  # scalar


@dataclass
class PPO:
    """What a rollout's tokens were worth, and the loss that makes the better ones likelier.

    Args:
        gather: joins the rows of all processes, so that whitening sees one batch.
    """

    args: PPOConfig
    leash: Leash
    gather: Callable[[Tensor], Tensor]

    def rewards(self, rollout: Rollout) -> Tensor:
        """The rewards of the tokens, the score in the state after the response's last; [batch, response].

        A response that fills all its positions has no such state; there the score goes to its last token, as in TRL.
        """
        states = rollout.value_mask
        following = self.args.kl != "reward"  # the gradient of the KL at t is then a term of the loss
        rewards = token_rewards(rollout.kl, rollout.scores.total, states.sum(1) - 1, self.leash.beta, following)
        if self.args.whiten_rewards:
            rewards = whitened(rewards, states, *self._mean_and_scale(rewards, states), keep_mean=True)
        return rewards

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """GAE advantages, whitened over the batch if `whiten_advantages`, and the returns V is fitted to."""
        raw = generalized_advantages(rewards, rollout.values, self.args.gamma, self.args.lam)
        returns = raw + rollout.values
        if not self.args.whiten_advantages:
            return Advantages(raw * rollout.mask, returns, torch.ones_like(raw[0, 0]))
        mean, scale = self._mean_and_scale(raw, rollout.mask)
        return Advantages(whitened(raw, rollout.mask, mean, scale), returns, scale)

    def _mean_and_scale(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation under `mask` over the rollouts of all processes, as if they were one batch."""
        values, mask = self.gather(values), self.gather(mask.float())
        return masked_mean(values, mask), whitening_scale(values, mask)

    def loss(
        self, model: nn.Module, rollout: Rollout, advantages: Advantages, rows: Tensor, tokens: Tensor, states: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate, `vf_coef` times the clipped value loss, and the leash's term where it has one.

        Args:
            model: PolicyAndValue, as it is being trained.
            rows: which rows of the rollout, [micro batch].
            tokens, states: how many the whole minibatch has, over which policy and value loss are averaged.

        Returns:
            the loss, and its statistics averaged over this micro batch's own tokens.
        """
        args = self.args
        mask, value_mask, old_logprobs = rollout.mask[rows], rollout.value_mask[rows], rollout.logprobs[rows]
        output, values = model(
            rollout.query_responses[rows],
            rollout.attention[rows],
            rollout.context_length,
            args.temperature,
            None if rollout.reference_hidden is None else rollout.reference_hidden[rows],
        )
        if rollout.baseline is not None:
            values = values + rollout.baseline[rows]

        log_ratio = (output.logprobs - old_logprobs) * mask
        policy_loss, policy_clipped = clipped_surrogate(log_ratio, advantages.advantages[rows], args.cliprange)
        policy_loss = policy_loss * mask
        kl_loss = self.leash.loss(output, old_logprobs, rollout.reference_logprobs[rows], advantages.scale)
        if kl_loss is not None:
            policy_loss = policy_loss + kl_loss * mask

        value_loss, value_clipped = clipped_value_loss(
            values, rollout.values[rows], advantages.returns[rows], args.cliprange_value
        )
        value_loss = value_loss * value_mask

        loss = policy_loss.sum() / tokens + args.vf_coef * value_loss.sum() / states
        with torch.no_grad():
            stats = {
                "policy/approxkl_avg": 0.5 * log_ratio.square().mean(),
                "policy/step_kl": masked_mean(0.5 * log_ratio.square(), mask),
                "policy/clipfrac_avg": masked_mean(policy_clipped.float(), mask),
                "loss/policy_avg": masked_mean(policy_loss, mask),
                "loss/value_avg": masked_mean(value_loss, value_mask),
                "val/clipfrac_avg": masked_mean(value_clipped.float(), value_mask),
                "policy/entropy_avg": masked_mean(output.entropy, mask),
                "val/ratio": log_ratio.exp().mean(),
            }
        return loss, stats
