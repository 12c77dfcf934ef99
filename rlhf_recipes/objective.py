"""The objective's mathematics: pure functions on tensors, shapes in their docstrings.

J_beta(pi) = E[ r(x, y) ] - beta * KL( pi(.|x) || pi_ref(.|x) )
"""

import torch
from torch import Tensor


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimates KL(pi || pi_ref) at each token from the token that pi sampled, in nats.

    Args:
        logprobs, ref_logprobs: log pi(y_t | x, y_<t) and log pi_ref(y_t | x, y_<t), [batch, tokens].
        estimator: with log r = log pi_ref - log pi, as in http://joschu.net/blog/kl-approx.html,
            "k1" = -log r: unbiased, can be negative;
            "k2" = (log r)^2 / 2: biased, never negative, its gradient is the KL's;
            "k3" = r - 1 - log r: unbiased, never negative.

    Returns:
        [batch, tokens]
    """
    logr = ref_logprobs - logprobs
    if estimator == "k1":
        return -logr
    if estimator == "k2":
        return logr.square() / 2
    if estimator == "k3":
        return logr.exp() - 1 - logr
    raise ValueError(f"the KL estimators are k1, k2 and k3, not {estimator!r}")


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str = "k1") -> Tensor:
    """Estimates KL(pi(.|x) || pi_ref(.|x)) from each completion: `token_kl` summed over its tokens, in nats.

    By the chain rule the sum over tokens of an unbiased estimate is one of the sequences' KL.

    Args:
        logprobs, ref_logprobs, mask: [batch, tokens]; the mask marks the completion's tokens, eos included.

    Returns:
        [batch]
    """
    return (token_kl(logprobs, ref_logprobs, estimator) * mask).sum(-1)


def weighted_token_kl(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """The KL as a loss term: pi / pi_old times `token_kl`, whose gradient is that of KL(pi || pi_ref) at each state.

    Without the ratio the expected gradient of k1 is zero and that of k3 the forward KL's: the tokens were drawn from pi_old,
    and how pi draws them is part of the gradient (arXiv 2512.02556, eq. 7).

    Args:
        logprobs, old_logprobs, ref_logprobs: of the tokens sampled from pi_old, [batch, tokens].

    Returns:
        [batch, tokens]
    """
    return (logprobs - old_logprobs).exp() * token_kl(logprobs, ref_logprobs, estimator)


def adapted_beta(beta: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The leash, tightened where the KL is above its target and loosened where it is below.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: beta (1 + K e) with e = clip((KL - target) / target, -0.2, 0.2); K is
    episodes / horizon, as in their code.

    Args:
        kl, target: nats a completion.
        episodes: since beta was last adapted.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) under `mask`; 1 is a perfect V, 0 one no better than a constant."""
    error, total = (whitening_scale(x, mask).square().reciprocal() for x in (returns - values, returns))
    return 1 - error / total


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's; 0 where one of them is constant."""
    x, y = x.float() - x.float().mean(), y.float() - y.float().mean()
    return (x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-8)


def token_rewards(kl: Tensor, scores: Tensor, ends: Tensor, beta: float, following: bool = False) -> Tensor:
    """r_t = -beta KL_t, plus the score where the completion ends: eq. 2 of Ziegler et al. 2019 (arXiv 1909.08593) by tokens.

    Args:
        kl: KL_t in nats, 0 where there is no token, [batch, tokens].
        scores: r(x, y), [batch].
        ends: the position whose reward holds the score, [batch].
        following: r_t holds KL_{t+1}, for a KL whose own gradient is a term of the loss: KL_t, of the state in which token t is
            chosen, does not depend on that choice.

    Returns:
        [batch, tokens]
    """
    rewards = -beta * kl
    if following:
        rewards = torch.nn.functional.pad(rewards[:, 1:], (0, 1))
    rewards[torch.arange(len(scores)), ends] += scores
    return rewards


def generalized_advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE (Schulman et al. 2016, arXiv 1506.02438, eq. 16): sum_l (gamma lam)^l delta_{t+l}.

    Args:
        rewards, values: r_t and V(s_t), [batch, tokens]; V after the last token is 0.

    Returns:
        advantages, [batch, tokens]; advantages + values are the returns.
    """
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(advantage)
    backwards = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        backwards.append(advantage)
    return torch.stack(backwards[::-1], dim=1)


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """PPO's policy loss at each token (Schulman et al. 2017, arXiv 1707.06347, eq. 7), to be minimised.

    -min(ratio A, clip(ratio, 1 - cliprange, 1 + cliprange) A) with ratio = pi / pi_old. On the rollout's own policy its
    gradient is that of -A log pi, the policy gradient.

    Args:
        log_ratio: log pi - log pi_old, 0 where there is no token, [batch, tokens].
        advantages: [batch, tokens].

    Returns:
        the loss, and whether the clipped term is what counts, both [batch, tokens]
    """
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(unclipped, clipped), clipped > unclipped


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """max((V - R)^2, (clip(V, V_old - cliprange, V_old + cliprange) - R)^2) / 2 at each token, as in TRL.

    Args:
        values, old_values, returns: V now, V at the rollout, and what V is fitted to, [batch, tokens].

    Returns:
        the loss, and whether the clipped term is what counts, both [batch, tokens]
    """
    near = values.clamp(old_values - cliprange, old_values + cliprange)
    error, near_error = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.max(error, near_error), near_error > error


def robust_smoothing(p: Tensor, e: float = 0.0) -> Tensor:
    """The `label_smoothing` at which TRL's robust DPO loss is the expected-label one.

    With z = beta (log-ratio of chosen - log-ratio of rejected), the expected-label loss is that of both orders, weighted:
    -(1 - q) log sigmoid(z) - q log sigmoid(-z), as in cDPO (Mitchell 2023). The robust loss (arXiv 2403.00409),
    (-(1 - s) log sigmoid(z) + s log sigmoid(-z)) / (1 - 2s), takes a share s of flipped labels out; s = -q / (1 - 2q) puts a
    share q in.

    Args:
        p: the probability, pair by pair, that the rejected completion is the better one, [pairs].
        e: the probability that a label is besides wrong: q = p (1 - e) + (1 - p) e.

    Returns:
        [pairs]
    """
    q = (p * (1 - e) + (1 - p) * e).clamp(max=0.4999)
    return -q / (1 - 2 * q)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true, 0 where it is nowhere; a scalar."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whitening_scale(values: Tensor, mask: Tensor) -> Tensor:
    """1 / standard deviation of `values` under `mask`, with Bessel's correction as in TRL; a scalar."""
    squares = (values - masked_mean(values, mask)).square() * mask
    return torch.rsqrt(squares.sum() / (mask.sum() - 1).clamp(min=1) + 1e-8)


def whitened(values: Tensor, mask: Tensor, mean: Tensor, scale: Tensor, keep_mean: bool = False) -> Tensor:
    """(values - mean) * scale where `mask` is true and 0 elsewhere, [batch, tokens]; mean and scale are scalars.

    Args:
        keep_mean: adds the mean again, as TRL does to whitened rewards.
    """
    centred = (values - mean) * scale
    return (centred + mean if keep_mean else centred) * mask
