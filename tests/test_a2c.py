"""A2C as the special case of PPO (Huang et al. 2022, arXiv 2205.09123)."""

import pytest
import torch

from rlhf_recipes.algorithms.ppo import Advantages
from tests.test_ppo_trainer import build_trainer, rollout_of
from tests.test_scripts import lines, run


def test_the_gradient_is_the_textbooks(tiny, tmp_path):
    """Of -A log pi + vf_coef (V - return)^2 / 2, on the rollout's own policy: no ratio, no clipping."""
    trainer = build_trainer(tiny, tmp_path, stage="a2c", a2c__vf_coef=0.3)
    for name, p in trainer.model.named_parameters():  # a policy and a value function that are not at their start
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(2))
    rollout = rollout_of(trainer, trainer.processing_class("the film")["input_ids"], [[5, 6, 7, 8, 9, 10], [7, 2, 0, 0, 0, 0]])
    advantages, returns = 5 * torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0))
    tokens, states = rollout.mask.sum(), rollout.value_mask.sum()
    rows = torch.arange(2)
    parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}

    loss, stats = trainer.ppo.loss(
        trainer.model, rollout, Advantages(advantages, returns, torch.tensor(1.0)), rows, tokens, states
    )
    mine = torch.autograd.grad(loss, parameters.values())

    output, values = trainer.model(rollout.query_responses, rollout.attention, rollout.context_length, 1.0)
    policy_loss = -(advantages * output.logprobs * rollout.mask).sum() / tokens
    value_loss = 0.5 * ((values - returns).square() * rollout.value_mask).sum() / states
    plain = torch.autograd.grad(policy_loss + 0.3 * value_loss, parameters.values())
    assert max(g.abs().max() for g in plain) > 0.1
    for name, a, b in zip(parameters, mine, plain, strict=True):
        torch.testing.assert_close(a, b, msg=name, atol=1e-6, rtol=1e-4)
    assert stats["policy/clipfrac_avg"] == stats["val/clipfrac_avg"] == 0
    assert stats["val/ratio"] == pytest.approx(1.0)


def test_one_step_a_rollout_and_nothing_clipped(tiny, tmp_path):
    run("a2c", tiny, tmp_path)
    steps = [row for row in lines(tmp_path / "outputs/tiny/a2c/it/metrics.jsonl") if "objective/kl" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["policy/clipfrac_avg"] == row["val/clipfrac_avg"] == row["policy/approxkl_avg"] == 0
        assert row["val/ratio"] == pytest.approx(1.0)


def test_ppos_choices_are_refused(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("a2c", tiny, tmp_path, "--a2c.num_ppo_epochs=2")
    assert "A2C takes one step on each rollout" in capsys.readouterr().err


def test_without_the_leash(tiny, tmp_path):
    for stage in ("a2c", "ppo"):
        summary = run(stage, tiny, tmp_path, "--objective.beta=0")
        assert summary["policy"]["objective"] == summary["policy"]["reward"]
        steps = lines(tmp_path / f"outputs/tiny/{stage}/it/metrics.jsonl")
        assert all(row["objective/non_score_reward"] == 0 for row in steps if "objective/kl" in row)
