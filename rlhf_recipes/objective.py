"""The objective's mathematics: pure functions on tensors, shapes in their docstrings.

J_beta(pi) = E[ r(x, y) ] - beta * KL( pi(.|x) || pi_ref(.|x) )
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimates KL(pi || pi_ref) at each token from the token that pi sampled, in nats.

    Args:
        logprobs, ref_logprobs: log pi(y_t | x, y_<t) and log pi_ref(y_t | x, y_<t), [batch, tokens].
        estimator: "k1" = log pi - log pi_ref: unbiased, can be negative. "k3" = exp(-k1) - 1 + k1: unbiased, never
            negative. http://joschu.net/blog/kl-approx.html

    Returns:
        [batch, tokens]
    """
    logr = ref_logprobs - logprobs
    return -logr if estimator == "k1" else logr.exp() - 1 - logr


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
    """Mean of `values` where `mask` is true; a scalar."""
    return (values * mask).sum() / mask.sum()


def whitening_scale(values: Tensor, mask: Tensor) -> Tensor:
    """1 / standard deviation of `values` under `mask`, with Bessel's correction as in TRL; a scalar."""
    squares = (values - masked_mean(values, mask)).square() * mask
    return torch.rsqrt(squares.sum() / (mask.sum() - 1) + 1e-8)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Values of unit variance under `mask`, and zero mean if `shift_mean`; TRL's `masked_whiten`."""
    mean = masked_mean(values, mask)
    whitened = (values - mean) * whitening_scale(values, mask)
    return whitened if shift_mean else whitened + mean


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


def optimal_objective(log_ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J* = beta log Z(x) by enumeration; at beta = 0 the best reward. [prompts, completions] twice -> [prompts]"""
    if beta == 0:
        return rewards.masked_fill(log_ref.isneginf(), -torch.inf).amax(-1)
    return beta * torch.logsumexp(log_ref + rewards / beta, dim=-1)


def estimate_optimal_objective(rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """J*(x) estimated from the reference's samples: beta log mean_k exp(r_k / beta).

    By Jensen's inequality it is low on average, the more so the smaller the effective sample size.

    Args:
        rewards: r(x, y_k) of samples y_k ~ pi_ref(.|x), [prompts, samples].

    Returns:
        estimate [prompts], and effective sample size (sum w)^2 / sum w^2 of w = exp(r / beta), [prompts].
    """
    if beta == 0:
        return rewards.amax(-1), torch.ones(len(rewards))
    scaled = (rewards / beta).double()
    log_mean = torch.logsumexp(scaled, dim=-1) - math.log(rewards.shape[-1])
    size = (2 * torch.logsumexp(scaled, dim=-1) - torch.logsumexp(2 * scaled, dim=-1)).exp()
    return (beta * log_mean).float(), size.float()


def optimal_frontier_point(rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Reward and KL of pi* at `beta`, by self-normalised importance sampling from the reference's samples.

    With w_k = softmax_k(r_k / beta): reward = sum_k w_k r_k and KL(pi* || pi_ref) = sum_k w_k log(K w_k).

    Args:
        rewards: [prompts, samples].

    Returns:
        reward and KL in nats, both [prompts].
    """
    log_w = torch.log_softmax(rewards.double() / beta, dim=-1)
    w = log_w.exp()
    kl = (w * (log_w + math.log(rewards.shape[-1]))).sum(-1)
    return (w * rewards).sum(-1).float(), kl.float()


def best_of_n(rewards: Tensor, n: int) -> Tensor:
    """E[ max of n draws ] of each prompt, exactly over all subsets of its samples.

    The i-th smallest of K samples (from 1) is the largest of a random n-subset with probability
    C(i-1, n-1) / C(K, n).

    Args:
        rewards: [prompts, samples], samples >= n.

    Returns:
        [prompts]
    """
    return (best_of_n_weights(rewards, n) * rewards).sum(-1)


def best_of_n_weights(rewards: Tensor, n: int) -> Tensor:
    """The probability that each sample is the one best-of-n returns: [prompts, samples] -> [prompts, samples]."""
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
