"""The leash: the gradient of a sampled KL, beta that adapts, epochs that are left out, and whom the KL is measured from."""

import math

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from rlhf_recipes.algorithms.ppo import Advantages
from rlhf_recipes.models.reference import Reference
from rlhf_recipes.objective import adapted_beta, correlation, explained_variance, token_kl, weighted_token_kl
from rlhf_recipes.optimum import kl_divergence
from rlhf_recipes.rollouts.forward import response_forward
from tests.test_ppo_trainer import build_trainer, logs_of, rewards_of_the_next_kl, rollout_of
from tests.test_scripts import run

RESPONSES = [[5, 6, 7, 8, 9, 10], [7, 2, 0, 0, 0, 0]]


def move(policy, seed, std=0.3):
    """Draws the second half of every adapter anew."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)


def adapter_of(policy):
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


# --- a sampled KL as a loss term, over a vocabulary small enough to enumerate ----------------------------------------


def distributions(moved, words=9):
    """The policy's logits, log pi_old and log pi_ref of every word; pi is pi_old, or `moved` away from it."""
    generator = torch.Generator().manual_seed(0)
    old, other, away = torch.randn(3, words, generator=generator, dtype=torch.float64)
    return (old + moved * away).requires_grad_(), old.log_softmax(-1), other.log_softmax(-1)


def expected_gradient(logits, log_old, term):
    """sum_y pi_old(y) d/dlogits of `term` [words], which has a value for every word that may be sampled."""
    return torch.autograd.grad((log_old.exp() * term).sum(), logits)[0]


def exact_gradient(logits, log_ref, forward=False):
    log_pi = logits.log_softmax(-1)
    return torch.autograd.grad(kl_divergence(log_ref, log_pi) if forward else kl_divergence(log_pi, log_ref), logits)[0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("moved", [0.0, 0.7])
def test_the_weighted_kl_has_the_value_and_the_gradient_of_the_exact_one(estimator, moved):
    """The tokens are drawn from pi_old, and pi may have moved on since then."""
    logits, log_old, log_ref = distributions(moved)
    term = weighted_token_kl(logits.log_softmax(-1), log_old, log_ref, estimator)
    torch.testing.assert_close((log_old.exp() * term).sum(), kl_divergence(logits.log_softmax(-1), log_ref))
    exact = exact_gradient(logits, log_ref)
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(expected_gradient(logits, log_old, term), exact)


def test_what_the_gradient_would_be_without_the_ratio():
    """That of k1 is zero, that of k2 is the KL's, and that of k3 the forward KL's."""
    logits, log_old, log_ref = distributions(moved=0.0)
    expected = {
        "k1": torch.zeros_like(log_ref),
        "k2": exact_gradient(logits, log_ref),
        "k3": exact_gradient(logits, log_ref, forward=True),
    }
    for estimator, exact in expected.items():
        term = token_kl(logits.log_softmax(-1), log_ref, estimator)
        torch.testing.assert_close(expected_gradient(logits, log_old, term), exact, atol=1e-12, rtol=1e-9, msg=estimator)
    assert (expected["k2"] - expected["k3"]).abs().max() > 0.05


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "beta"),
    [
        (5.0, 0.1),  # at the target
        (5.5, 0.1001),  # 0.1 (1 + 0.1 * 64 / 6400)
        (4.5, 0.0999),
        (6.0, 0.1002),
        (50.0, 0.1002),  # clipped at 20%
        (0.0, 0.0998),
        (-3.0, 0.0998),  # k1 can be negative
    ],
)
def test_beta_adapts_as_in_ziegler_2019(kl, beta):
    assert adapted_beta(0.1, kl, target=5.0, episodes=64, horizon=6400) == pytest.approx(beta, rel=1e-12)


def test_beta_comes_to_rest_where_the_kl_is_its_target():
    """In a world where KL = 1 / beta: 5 nats is beta 0.2, from either side, by at most 20% a horizon."""
    for beta in (0.01, 3.0):
        for _ in range(400):
            before, beta = beta, adapted_beta(beta, 1 / beta, target=5.0, episodes=10, horizon=20)
            assert abs(math.log(beta / before)) <= -math.log(0.9) + 1e-12
        assert beta == pytest.approx(0.2)


def test_explained_variance_of_known_values():
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0], [5.0, 4.0, -7.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    garbage = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)) * 50
    for values, expected in (
        (returns, 1.0),
        (returns + 3, 1.0),  # an offset is no lack of variance
        (torch.full_like(returns, 2.5), 0.0),
        (returns / 2, 0.75),  # what is left has half the standard deviation
        (-returns, -3.0),
    ):
        values = torch.where(mask, values, garbage)
        assert explained_variance(values, returns, mask).item() == pytest.approx(expected, abs=1e-5)


def test_correlation_is_pearsons():
    x, noise = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for y, expected in ((3 * x - 1, 1.0), (-0.1 * x, -1.0), (torch.full_like(x, 2.0), 0.0), (x + noise, None)):
        expected = np.corrcoef(x, y)[0, 1] if expected is None else expected
        assert correlation(x, y).item() == pytest.approx(expected, abs=1e-5)
    assert correlation(torch.tensor([3, 5, 7]), torch.tensor([1.0, 0.0, -1.0])).item() == pytest.approx(-1.0)  # lengths are int


# --- beta that adapts, epochs that are left out ----------------------------------------------------------------------


def test_beta_follows_the_kl_and_every_update_pays_its_own(tiny, tmp_path):
    """With the horizon of one update beta moves by up to 20%, so that what it was is seen in the numbers."""
    trainer = build_trainer(
        tiny, tmp_path, ppo__kl_target=0.02, ppo__kl_horizon=8, ppo__total_episodes=48, ppo__learning_rate=1e-2
    )
    paid, rewards = [], trainer.ppo.rewards

    def record(rollout):
        charged = rewards(rollout)
        paid.append([x.double().sum().item() for x in (charged, rollout.scores.total, rollout.kl)])
        return charged

    trainer.ppo.rewards = record
    trainer.train()
    logs, beta = logs_of(trainer), 0.05  # objective.beta
    assert len(logs) == 6
    assert logs[0]["objective/kl"] == 0.0
    for log, (charged, scores, kl) in zip(logs, paid, strict=True):
        assert charged == pytest.approx(scores - beta * kl, abs=1e-6)
        assert log["objective/kl_coef"] == beta
        assert log["objective/non_score_reward"] == pytest.approx(-beta * log["objective/kl"], rel=1e-5)
        assert log["objective/rlhf_reward"] == pytest.approx(log["objective/scores"] - beta * log["objective/kl"], rel=1e-5)
        beta = adapted_beta(beta, log["objective/kl"], 0.02, episodes=8, horizon=8)
    assert trainer.leash.beta == beta
    steps = np.diff([log["objective/kl_coef"] for log in logs])
    assert (steps < 0).any() and (steps > 0).any()


def test_without_a_target_beta_stays(tiny, tmp_path):
    trainer = build_trainer(tiny, tmp_path)
    trainer.train()
    assert [log["objective/kl_coef"] for log in logs_of(trainer)] == [0.05, 0.05]


def updated(tiny, tmp_path, **settings):
    """The statistics of an update of four epochs of two steps of two micro batches, the same up to where it stops."""
    trainer = build_trainer(
        tiny, tmp_path, ppo__num_ppo_epochs=4, ppo__num_mini_batches=2, ppo__gradient_accumulation_steps=4,
        ppo__per_device_train_batch_size=2, **settings,
    )  # fmt: skip
    query = trainer.processing_class("the film")["input_ids"]
    rollout = rollout_of(trainer, query, [[5 + i] * (1 + i % 6) + [0] * (5 - i % 6) for i in range(8)])
    np.random.seed(0)
    return trainer.update(rollout, trainer.ppo.advantages(rollout, trainer.ppo.rewards(rollout)))


def test_an_update_stops_after_the_epoch_that_went_too_far(tiny, tmp_path):
    whole = updated(tiny, tmp_path)
    assert whole["policy/epochs"].tolist() == [4]
    steps = whole["policy/step_kl"]
    assert len(steps) == 16
    assert (steps[:2] == 0).all()  # before the first step
    epochs = steps.view(4, 4).mean(1).tolist()
    assert 0 < epochs[0] < epochs[1] < epochs[2]
    for target, last in ((1e-9, 1), ((epochs[0] + epochs[1]) / 2, 2), ((epochs[1] + epochs[2]) / 2, 3), (1e9, 4)):
        stats = updated(tiny, tmp_path, ppo__target_kl=target)
        assert stats["policy/epochs"].tolist() == [last]
        torch.testing.assert_close(stats["policy/step_kl"], steps[: 4 * last])


@pytest.mark.parametrize(("target", "epochs"), [(1e-9, 1), (1e9, 4)])
def test_the_epochs_are_in_the_metrics(tiny, tmp_path, target, epochs):
    trainer = build_trainer(tiny, tmp_path, ppo__target_kl=target, ppo__num_ppo_epochs=4, ppo__num_mini_batches=2)
    trainer.train()
    for log in logs_of(trainer):
        assert log["policy/epochs"] == epochs
        assert log["policy/step_kl"] > 0


def test_step_kl_is_over_the_tokens_alone(tiny, tmp_path):
    trainer = build_trainer(tiny, tmp_path)
    rollout = rollout_of(trainer, trainer.processing_class("the film")["input_ids"], RESPONSES)
    move(trainer.roles.policy, seed=2)
    nothing = Advantages(torch.zeros(2, 6), rollout.values, torch.tensor(1.0))
    _, stats = trainer.ppo.loss(trainer.model, rollout, nothing, torch.arange(2), torch.tensor(8), torch.tensor(9))
    output, _ = trainer.model(rollout.query_responses, rollout.attention, rollout.context_length, 1.0)
    differences = [(output.logprobs - rollout.logprobs)[i, t].item() for i, n in ((0, 6), (1, 2)) for t in range(n)]
    assert stats["policy/step_kl"].item() == pytest.approx(sum(d * d / 2 for d in differences) / 8, rel=1e-4)


# --- the KL in the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_loss_charges_the_next_tokens_kl_and_puts_its_gradient_into_the_loss(tiny, tmp_path, estimator):
    trainer = build_trainer(
        tiny, tmp_path, ppo__kl="loss", ppo__kl_estimator=estimator, ppo__whiten_advantages=False, ppo__vf_coef=0.0
    )
    policy = trainer.roles.policy
    move(policy, seed=2)
    rollout = rollout_of(trainer, trainer.processing_class("the film")["input_ids"], RESPONSES)
    assert rollout.kl[rollout.mask].abs().min() > 1e-4
    torch.testing.assert_close(rollout.kl, token_kl(rollout.logprobs, rollout.reference_logprobs, estimator) * rollout.mask)
    rewards = trainer.ppo.rewards(rollout)
    torch.testing.assert_close(rewards, rewards_of_the_next_kl(rollout))

    move(policy, seed=3)  # the policy has moved since the rollout: the ratio counts
    stretched = Advantages(torch.zeros_like(rewards), rollout.values, torch.tensor(2.5))  # by whitening
    loss, _ = trainer.ppo.loss(trainer.model, rollout, stretched, torch.arange(2), torch.tensor(8), torch.tensor(9))
    output, _ = trainer.model(rollout.query_responses, rollout.attention, rollout.context_length, 1.0)
    terms = []
    for i, length in enumerate([6, 2]):
        for t in range(length):
            now, then, ref = (x[i, t] for x in (output.logprobs, rollout.logprobs, rollout.reference_logprobs))
            kl = now - ref if estimator == "k1" else (ref - now).exp() - 1 - (ref - now)
            terms.append((now - then).exp() * kl)
    written_out = 0.05 * 2.5 * torch.stack(terms).sum() / 8
    assert loss.item() == pytest.approx(written_out.item(), rel=1e-4)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for mine, plain in zip(*(torch.autograd.grad(x, parameters) for x in (loss, written_out)), strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-4)
    trainer.leash.beta = 0.1  # the beta that adapts, not the recipe's
    twice, _ = trainer.ppo.loss(trainer.model, rollout, stretched, torch.arange(2), torch.tensor(8), torch.tensor(9))
    assert twice.item() == pytest.approx(2 * loss.item(), rel=1e-4)


# --- whom the leash holds on to --------------------------------------------------------------------------------------


def logprobs_by(trainer, model):
    query = trainer.processing_class("the film")["input_ids"]
    with torch.no_grad():
        sequences = torch.tensor([query + r for r in RESPONSES])
        return response_forward(model, sequences, sequences != 0, len(query), 1.0).logprobs


def test_a_synced_reference_follows_every_few_updates_and_then_stays(tiny, tmp_path):
    class Compare(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            policies.append(logprobs_by(trainer, trainer.roles.policy))
            references.append(logprobs_by(trainer, trainer.leash.reference))

    trainer = build_trainer(
        tiny, tmp_path, ppo__reference="sync", ppo__reference_sync_steps=2, ppo__total_episodes=48, ppo__learning_rate=1e-2
    )
    backbone = logprobs_by(trainer, trainer.roles.reference)
    references, policies = [logprobs_by(trainer, trainer.leash.reference)], [logprobs_by(trainer, trainer.roles.policy)]
    assert torch.equal(references[0], backbone)
    trainer.add_callback(Compare())
    trainer.train()
    for step, then in enumerate([0, 0, 2, 2, 4, 4, 6]):
        assert torch.equal(references[step], policies[then])
        assert step == then or not torch.equal(references[step], policies[step])
    assert torch.equal(logprobs_by(trainer, trainer.roles.reference), backbone)  # what held-out KL is measured from
    kls = [log["objective/kl"] for log in logs_of(trainer)]
    assert [kl == 0 for kl in kls] == [True, False] * 3  # each update after a sync starts at its reference


def test_a_synced_reference_that_speaks_leaves_the_policy_alone(tiny, tmp_path):
    trainer = build_trainer(tiny, tmp_path, ppo__reference="sync")
    policy = trainer.roles.policy
    move(policy, seed=2)
    before, where = adapter_of(policy), {name: p.data_ptr() for name, p in policy.named_parameters()}
    then = logprobs_by(trainer, trainer.leash.reference)
    assert not torch.equal(then, logprobs_by(trainer, policy))
    with pytest.raises(ZeroDivisionError), trainer.leash.reference.speaking():
        _ = 1 / 0
    assert {name: p.data_ptr() for name, p in policy.named_parameters()} == where
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(policy).items())
    assert torch.equal(then, logprobs_by(trainer, trainer.roles.reference))  # not yet synced: still the backbone


def test_the_kl_falls_to_nothing_at_a_sync(tiny, tmp_path):
    trainer = build_trainer(tiny, tmp_path, ppo__reference="sync")
    query = trainer.processing_class("the film")["input_ids"]
    move(trainer.roles.policy, seed=2)
    far = rollout_of(trainer, query, RESPONSES)
    trainer.leash.reference.sync()
    near = rollout_of(trainer, query, RESPONSES)
    assert (far.kl[far.mask].abs() > 1e-3).all()
    assert (near.kl == 0).all()
    move(trainer.roles.policy, seed=3)  # not the reference, which keeps a copy
    assert torch.equal(rollout_of(trainer, query, RESPONSES).reference_logprobs, near.logprobs)


def test_a_frozen_reference_is_the_backbone_however_far_the_policy_goes(tiny, tmp_path):
    trainer = build_trainer(tiny, tmp_path)
    backbone = logprobs_by(trainer, trainer.roles.policy)
    trainer.train()
    assert torch.equal(logprobs_by(trainer, trainer.leash.reference), backbone)
    assert logs_of(trainer)[1]["objective/kl"] != 0


def test_no_reference_is_never_run(tiny, tmp_path, monkeypatch):
    def refuse(self):
        raise AssertionError("the reference speaks")

    monkeypatch.setattr(Reference, "speaking", refuse)
    with pytest.raises(AssertionError, match="speaks"):
        build_trainer(tiny, tmp_path).train()
    trainer = build_trainer(tiny, tmp_path, objective__beta=0, ppo__reference="none", ppo__total_episodes=24)
    before = adapter_of(trainer.roles.policy)
    trainer.train()
    for log in logs_of(trainer):
        assert log["objective/kl"] == log["objective/non_score_reward"] == 0
        assert log["objective/rlhf_reward"] == log["objective/scores"]
    assert any(not torch.equal(value, before[name]) for name, value in adapter_of(trainer.roles.policy).items())


# --- what is refused before a run ------------------------------------------------------------------------------------

HELD_OUT = ["--ppo.eval_strategy=steps", "--ppo.eval_steps=1"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--ppo.reference=none"], ["`ppo.reference` none", "--objective.beta=0"]),
        (["--ppo.reference=none", "--objective.beta=0", "--ppo.kl=loss"], ["`ppo.reference` none", "--ppo.kl=reward"]),
        (["--ppo.kl_target=5", "--objective.beta=0"], ["`ppo.kl_target`", "`objective.beta`"]),
        (["--ppo.kl_target=0"], ["`ppo.kl_target`"]),
        (["--ppo.target_kl=0"], ["`ppo.target_kl`"]),
        (["--ppo.kl_target=5", "--ppo.kl_horizon=7"], ["`ppo.kl_horizon` 7", "8 episodes"]),
        (["--ppo.kl_target=5", "--ppo.kl_horizon=0"], ["`ppo.kl_horizon`"]),
        (["--ppo.reference=sync", "--ppo.reference_sync_steps=0"], ["`ppo.reference_sync_steps`"]),
        (["--watch.on_over_optimisation=rollback"], ["`watch.on_over_optimisation` rollback", "`ppo.eval_strategy`"]),
        (["--watch.on_over_optimisation=stop"], ["`watch.on_over_optimisation` stop", "`ppo.eval_strategy`"]),
        (
            ["--watch.on_over_optimisation=rollback", "--ppo.metric_for_best_model=objective", *HELD_OUT],
            ["`watch.on_over_optimisation` rollback", "`ppo.metric_for_best_model`"],
        ),
    ],
)
def test_a_leash_that_cannot_hold_is_refused(tiny, tmp_path, capsys, words, named):
    with pytest.raises(SystemExit) as stop:
        run("ppo", tiny, tmp_path, *words)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    for name in named:
        assert name in line
    assert not list(tmp_path.iterdir())


def test_the_leashes_that_hold_are_not_refused(tiny, tmp_path):
    for words in (
        ["--ppo.kl_target=5", "--ppo.kl_horizon=8"],
        ["--ppo.kl_target=5"],
        ["--ppo.target_kl=0.02", "--ppo.kl=loss"],
        ["--ppo.reference=sync", "--ppo.kl=full"],
        ["--ppo.reference=none", "--objective.beta=0"],
        ["--watch.on_over_optimisation=rollback", *HELD_OUT],
        ["--watch.on_over_optimisation=rollback", "--ppo.metric_for_best_model=gold", *HELD_OUT],
    ):
        assert run("ppo", tiny, tmp_path, *words, "--dry-run") is None


def test_a_batch_larger_than_the_default_horizon_is_refused(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("ppo", tiny, tmp_path, "--ppo.kl_target=5", "--ppo.per_device_train_batch_size=20000", "--dry-run")
    assert "`ppo.kl_horizon` 10000" in capsys.readouterr().err
