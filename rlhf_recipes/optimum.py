"""The objective's optimum and what is measured against it: pure functions on tensors, shapes in their docstrings.

pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x), with the value J* = beta E_x[ log Z(x) ]
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# --- the optimum -------------------------------------------------------------------------------------------------


def optimal_policy(log_ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi*(y|x) = log pi_ref(y|x) + r(x, y) / beta - log Z(x), over every y (Rafailov et al. 2023, eq. 4).

    Args:
        log_ref, rewards: [prompts, completions], all completions enumerated.

    Returns:
        [prompts, completions], normalised.
    """
    return torch.log_softmax(log_ref + rewards / beta, dim=-1)


def objective_value(log_pi: Tensor, log_ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J_beta(pi) of each prompt by enumeration: [prompts, completions] three times -> [prompts]."""
    return (log_pi.exp() * (rewards - beta * (log_pi - log_ref))).sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each prompt by enumeration, in nats: [prompts, completions] twice -> [prompts]"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def optimal_objective(log_ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J* = beta log Z(x) by enumeration; at beta = 0 the best reward. [prompts, completions] twice -> [prompts]"""
    if beta == 0:
        return rewards.masked_fill(log_ref.isneginf(), -torch.inf).amax(-1)
    return beta * torch.logsumexp(log_ref + rewards / beta, dim=-1)


def estimate_optimal_objective(rewards: Tensor, beta: float, kl: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """J*(x) from samples y_k of a policy q, by importance sampling of Z(x) = E_q[ pi_ref(y|x) / q(y|x) exp(r / beta) ].

    With q = pi_ref it is beta log mean_k exp(r_k / beta). By Jensen's inequality the estimate is low on average, the more
    so the smaller the effective sample size: of several proposals, the one with the highest mean is the closest. It is
    never below q's own mean objective on the same samples, mean_k (r_k - beta kl_k).

    Args:
        rewards: r(x, y_k) of samples y_k ~ q(.|x), [prompts, samples].
        kl: log q(y_k|x) - log pi_ref(y_k|x), [prompts, samples]; None for q = pi_ref.

    Returns:
        estimate [prompts], and effective sample size (sum w)^2 / sum w^2 of the weights w, [prompts].
    """
    if beta == 0:
        return rewards.amax(-1), torch.ones(len(rewards))
    log_w = _log_weights(rewards, beta, kl)
    log_mean = torch.logsumexp(log_w, dim=-1) - math.log(rewards.shape[-1])
    return (beta * log_mean).float(), _effective_size(log_w).float()


def optimal_frontier_point(rewards: Tensor, beta: float, kl: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Reward and KL of pi* at `beta`, by self-normalised importance sampling from the samples of a policy q.

    With weights w_k = softmax_k(r_k / beta - kl_k): reward = sum_k w_k r_k, and since log pi*/pi_ref = r / beta - log Z,
    KL(pi* || pi_ref) = reward / beta - log Z.

    Args:
        rewards, kl: as for `estimate_optimal_objective`.

    Returns:
        reward, KL in nats, and effective sample size, all [prompts].
    """
    log_w = _log_weights(rewards, beta, kl)
    reward = (torch.softmax(log_w, dim=-1) * rewards).sum(-1)
    log_z = torch.logsumexp(log_w, dim=-1) - math.log(rewards.shape[-1])
    return reward.float(), (reward / beta - log_z).float(), _effective_size(log_w).float()


def _log_weights(rewards: Tensor, beta: float, kl: Tensor | None) -> Tensor:
    log_w = rewards.double() / beta
    return log_w if kl is None else log_w - kl.double()


def _effective_size(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the last dimension (Kish 1965)."""
    return (2 * torch.logsumexp(log_w, dim=-1) - torch.logsumexp(2 * log_w, dim=-1)).exp()


def wins(scores: Tensor, reference: Tensor) -> Tensor:
    """The share of the reference's samples that each sample beats, ties counted half; its mean is the win rate.

    Args:
        scores [prompts, K], reference [prompts, L].

    Returns:
        [prompts, K]
    """
    above = (scores.unsqueeze(-1) > reference.unsqueeze(-2)).float()
    ties = (scores.unsqueeze(-1) == reference.unsqueeze(-2)).float()
    return (above + 0.5 * ties).mean(-1)


def best_of_n_weights(rewards: Tensor, n: int) -> Tensor:
    """The probability that each sample is the one best-of-n returns, exactly over all n-subsets of a prompt's samples.

    The i-th smallest of K samples (from 1) is the largest of a random n-subset with probability C(i-1, n-1) / C(K, n).
    The weighted sum of the rewards is E[ max of n draws ].

    Args:
        rewards: [prompts, samples], samples >= n.

    Returns:
        [prompts, samples]
    """
    k = rewards.shape[-1]
    if not 1 <= n <= k:
        raise ValueError(f"best of {n} needs at least {n} samples a prompt, there are {k}")
    by_rank = torch.tensor([math.comb(i, n - 1) / math.comb(k, n) for i in range(k)])
    rank = rewards.argsort(dim=-1, stable=True).argsort(dim=-1)
    return by_rank[rank]


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || pi_ref) = log n - (n - 1) / n nats (an upper bound where rewards tie; arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def fraction_of_optimum(objective: Tensor, reference: Tensor, optimum: Tensor) -> Tensor:
    """(J(pi) - J(ref)) / (J* - J(ref)) of means over prompts; three [..., prompts] -> [...]"""
    return (objective - reference).mean(-1) / (optimum - reference).mean(-1)


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor], prompts: int, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap over prompts, the unit that is independent (Efron 1979).

    Args:
        statistic: from prompt indices [resamples, prompts], drawn with replacement, to its values [resamples].

    Returns:
        the low and high end of the interval.
    """
    draws = torch.randint(prompts, (resamples, prompts), generator=torch.Generator().manual_seed(seed))
    tail = (1 - level) / 2
    low, high = statistic(draws).double().quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
