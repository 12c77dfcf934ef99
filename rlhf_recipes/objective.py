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


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true, 0 where it is nowhere; a scalar."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whitening_scale(values: Tensor, mask: Tensor) -> Tensor:
    """1 / standard deviation of `values` under `mask`, with Bessel's correction as in TRL; a scalar."""
    squares = (values - masked_mean(values, mask)).square() * mask
    return torch.rsqrt(squares.sum() / (mask.sum() - 1).clamp(min=1) + 1e-8)
