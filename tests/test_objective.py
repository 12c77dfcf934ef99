"""The formulas against their definitions and against TRL's own."""

import itertools

import pytest
import torch

from rlhf_recipes.algorithms.ppo_config import trl_ppo_trainer
from rlhf_recipes.objective import (
    clipped_surrogate,
    clipped_value_loss,
    generalized_advantages,
    masked_mean,
    robust_smoothing,
    token_kl,
    token_rewards,
    whitened,
    whitening_scale,
)
from rlhf_recipes.optimum import (
    best_of_n_kl,
    best_of_n_weights,
    bootstrap_interval,
    estimate_optimal_objective,
    fraction_of_optimum,
    objective_value,
    optimal_frontier_point,
    optimal_objective,
    optimal_policy,
)


def test_kl_estimators_have_the_exact_kl_as_their_mean():
    torch.manual_seed(0)
    log_pi, log_ref = torch.randn(2, 7).log_softmax(-1)
    exact = (log_pi.exp() * (log_pi - log_ref)).sum()
    for estimator in ("k1", "k3"):
        per_token = token_kl(log_pi, log_ref, estimator)  # of every token, weighted by its probability
        torch.testing.assert_close((log_pi.exp() * per_token).sum(), exact)
    assert (token_kl(log_pi, log_ref, "k3") >= 0).all()


def test_gae_is_its_defining_sum():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 5)
    gamma, lam = 0.9, 0.7
    next_values = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    delta = rewards + gamma * next_values - values
    expected = torch.stack([sum((gamma * lam) ** k * delta[:, t + k] for k in range(5 - t)) for t in range(5)], 1)
    torch.testing.assert_close(generalized_advantages(rewards, values, gamma, lam), expected)


def test_gae_with_lambda_one_and_gamma_one_is_reward_to_go_less_value():
    rewards, values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(generalized_advantages(rewards, values, 1.0, 1.0), to_go - values)


def test_whitening_is_trls():
    torch.manual_seed(0)
    values, mask = torch.randn(4, 6), torch.rand(4, 6) > 0.3
    mean, scale = masked_mean(values, mask), whitening_scale(values, mask)
    for shift in (True, False):
        white = whitened(values, mask, mean, scale, keep_mean=not shift)
        torch.testing.assert_close(white, trl_ppo_trainer.masked_whiten(values, mask, shift) * mask)


def test_the_robust_loss_of_this_smoothing_is_the_expected_label_one():
    z, p, e = torch.linspace(-3, 3, 7), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.25, 0.45]), 0.1
    q, s = p * (1 - e) + (1 - p) * e, robust_smoothing(p, e)
    chosen, rejected = -torch.nn.functional.logsigmoid(z), -torch.nn.functional.logsigmoid(-z)
    torch.testing.assert_close(((1 - s) * chosen - s * rejected) / (1 - 2 * s), (1 - q) * chosen + q * rejected)


# --- PPO's two losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [(1.5, 2.0, -2.4, True), (0.5, 2.0, -1.0, False), (0.5, -2.0, 1.6, True), (1.5, -2.0, 3.0, False), (1.1, 2.0, -2.2, False)],
)
def test_the_clipped_surrogate_takes_the_worse_of_the_two(ratio, advantage, loss, clipped):
    losses, is_clipped = clipped_surrogate(torch.tensor([[ratio]]).log(), torch.tensor([[advantage]]), 0.2)
    assert losses.item() == pytest.approx(loss)
    assert is_clipped.item() is clipped


def test_the_clipped_value_loss_takes_the_worse_of_the_two():
    values, returns = torch.tensor([[1.5, 0.5, 1.1]]), torch.tensor([[2.0, 0.0, 0.0]])
    losses, clipped = clipped_value_loss(values, torch.ones(1, 3), returns, 0.2)
    torch.testing.assert_close(losses, torch.tensor([[0.8**2 / 2, 0.8**2 / 2, 1.1**2 / 2]]))
    assert clipped.tolist() == [[True, True, False]]


def test_rewards_are_the_kl_of_each_token_and_the_score_at_the_end():
    kl, scores, ends = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]), torch.tensor([10.0, 20.0]), torch.tensor([2, 1])
    torch.testing.assert_close(token_rewards(kl, scores, ends, 0.5), torch.tensor([[-0.5, -1.0, 8.5], [-2.0, 20.0, 0.0]]))
    following = token_rewards(kl, scores, ends, 0.5, following=True)
    torch.testing.assert_close(following, torch.tensor([[-1.0, -1.5, 10.0], [0.0, 20.0, 0.0]]))


# --- the optimum, on a space small enough to enumerate ---------------------------------------------------------------


def enumerable(prompts=50, completions=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_ref = (1.5 * torch.randn(prompts, completions, generator=generator)).log_softmax(-1)
    return log_ref, torch.randn(prompts, completions, generator=generator)


def test_optimal_policy_attains_the_optimum_and_nothing_beats_it():
    log_ref, rewards = enumerable()
    for beta in (0.1, 1.0):
        log_star = optimal_policy(log_ref, rewards, beta)
        optimum = optimal_objective(log_ref, rewards, beta)
        torch.testing.assert_close(objective_value(log_star, log_ref, rewards, beta), optimum, atol=1e-5, rtol=1e-5)
        for seed in range(20):
            noise = 0.3 * torch.randn(log_star.shape, generator=torch.Generator().manual_seed(seed))
            other = (log_star + noise).log_softmax(-1)
            gap = optimum - objective_value(other, log_ref, rewards, beta)
            assert gap.min() > -1e-5
            assert gap.mean() > 1e-4
    assert torch.equal(optimal_objective(log_ref, rewards, 0.0), rewards.amax(-1))


def test_optimum_and_frontier_from_samples_agree_with_the_enumeration():
    log_ref, rewards = enumerable()
    torch.manual_seed(0)
    drawn = rewards.gather(1, torch.distributions.Categorical(logits=log_ref).sample((4000,)).T)
    for beta in (0.5, 2.0):
        estimate, size = estimate_optimal_objective(drawn, beta)
        deviation = beta * size.rsqrt()  # of the estimate, by the delta method
        assert ((estimate - optimal_objective(log_ref, rewards, beta)).abs() < 4 * deviation).all()
        weights = optimal_policy(log_ref, rewards, beta).exp()
        reward, kl, frontier_size = optimal_frontier_point(drawn, beta)
        assert torch.equal(frontier_size, size)
        exact_kl = (weights * (weights.log() - log_ref)).sum(-1)
        assert (reward - (weights * rewards).sum(-1)).mean().abs() < 0.02
        assert (kl - exact_kl).mean().abs() < 0.02
        assert ((size > 1) & (size <= 4000)).all()
    assert size.mean() > estimate_optimal_objective(drawn, 0.1)[1].mean()  # a smaller beta weighs fewer samples
    assert estimate_optimal_objective(torch.ones(3, 7), 0.1)[1].tolist() == pytest.approx([7.0] * 3)


def test_best_of_n_is_the_mean_over_all_subsets():
    rewards = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 5, 7):
        expected = torch.stack([rewards[:, list(s)].amax(1) for s in itertools.combinations(range(7), n)]).mean(0)
        torch.testing.assert_close((best_of_n_weights(rewards, n) * rewards).sum(-1), expected)
    with pytest.raises(ValueError, match="needs at least 8 samples"):
        best_of_n_weights(rewards, 8)


def test_best_of_n_kl_is_the_kl_of_the_largest_of_n():
    """Continuous rewards: the best of n has density n F^(n-1) relative to the reference; integrated numerically."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for n in (2, 16):
        density = n * u ** (n - 1)
        assert (density * density.log()).mean().item() == pytest.approx(best_of_n_kl(n), abs=1e-3)


def test_fraction_of_optimum():
    reference, optimum = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])
    assert fraction_of_optimum(reference, reference, optimum) == 0
    assert fraction_of_optimum(optimum, reference, optimum) == 1
    assert fraction_of_optimum(torch.tensor([1.5, 2.5]), reference, optimum) == 0.5


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        sample = torch.randn(60, generator=generator)
        low, high = bootstrap_interval(lambda draws, sample=sample: sample[draws].mean(-1), 60, resamples=300)
        hits += low < 0 < high
    assert 0.88 <= hits / 200 <= 0.99
