"""The laboratory: every estimate against the enumeration, and every trainer against the exact optimum."""

import json
from pathlib import Path

import pytest
import torch

from recipes.lab import exact as lab_exact
from recipes.lab.exact import completions_of, enumerate_policy
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.evaluation.judged import judged_policy
from rlhf_recipes.evaluation.judging import complete
from rlhf_recipes.optimum import (
    estimate_optimal_objective,
    kl_divergence,
    objective_value,
    optimal_frontier_point,
    optimal_objective,
    optimal_policy,
)
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.roles import build_roles
from rlhf_recipes.tasks import load_dataset, load_task
from tests.test_scripts import run

LAB = Path(__file__).resolve().parent.parent / "recipes" / "lab"


@pytest.fixture(scope="module")
def lab():
    """Recipe, roles with a policy away from the reference, and the eight prompts."""
    recipe = load_recipe(LAB)
    tokenizer = load_tokenizer(recipe)
    prompts = tokenize_prompts(load_dataset(load_task(recipe), "load_prompts", "eval"), tokenizer, 2)
    roles = build_roles(recipe, tokenizer)
    for name, p in roles.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(1))
    return recipe, roles, prompts


def test_completions_are_all_and_each_once():
    rows = {tuple(row) for row in completions_of([5, 6], eos=2, pad=0, length=2).tolist()}
    assert rows == {(2, 0), (5, 2), (6, 2), (5, 5), (5, 6), (6, 5), (6, 6)}
    assert len(completions_of(list(range(8)), 10, 11, 3)) == 1 + 8 + 64 + 512


def test_the_optimum_leaves_no_gap_and_the_gap_is_beta_times_kl(lab):
    _, roles, prompts = lab
    exact = enumerate_policy(roles.policy, roles, prompts, 3, 1.0)
    assert torch.allclose(exact.log_pi.exp().sum(-1), torch.ones(8, dtype=torch.float64), atol=1e-5)
    for beta in (0.3, 1.0):
        log_star = optimal_policy(exact.log_ref, exact.rewards, beta)
        gap = optimal_objective(exact.log_ref, exact.rewards, beta) - objective_value(
            exact.log_pi, exact.log_ref, exact.rewards, beta
        )
        torch.testing.assert_close(gap, beta * kl_divergence(exact.log_pi, log_star), atol=1e-4, rtol=1e-4)
        numbers = exact.exact(beta)
        assert numbers["optimum"] - numbers["objective"] == pytest.approx(beta * numbers["kl_to_optimum"], abs=1e-4)


def test_kl_estimates_agree_with_the_enumeration(lab):
    recipe, roles, prompts = lab
    exact = enumerate_policy(roles.policy, roles, prompts, 3, 1.0)
    kl = kl_divergence(exact.log_pi, exact.log_ref).mean().item()
    assert kl > 0.05
    judged = complete(roles.policy, roles, prompts, recipe.run.seed, recipe.evaluate.batch_size, samples=2000)
    for estimate in (judged.kl, judged.kl_k3):
        error = estimate.std().item() / estimate.numel() ** 0.5
        assert estimate.mean().item() == pytest.approx(kl, abs=4 * error)
    reward = (exact.log_pi.exp() * exact.rewards).sum(-1).mean().item()
    assert judged.reward.mean().item() == pytest.approx(
        reward, abs=4 * judged.reward.std().item() / judged.reward.numel() ** 0.5
    )


@pytest.mark.parametrize("proposal", ["reference", "policy"])
def test_the_estimated_optimum_and_frontier_agree_with_the_enumeration(lab, proposal):
    """From the reference's samples, and from another policy's with its log-ratio: the same J* and the same frontier."""
    recipe, roles, prompts = lab
    exact = enumerate_policy(roles.policy, roles, prompts, 3, 1.0)
    model = roles.reference if proposal == "reference" else roles.policy
    judged = complete(model, roles, prompts, recipe.run.seed, recipe.evaluate.batch_size, samples=4000)
    for beta in (0.5, 1.0, 3.0):
        estimate, size = estimate_optimal_objective(judged.reward, beta, judged.kl)
        optimum = optimal_objective(exact.log_ref, exact.rewards, beta)
        assert ((estimate - optimum).abs() < 4 * beta * size.rsqrt()).all()  # the delta method's deviation
        weights = optimal_policy(exact.log_ref, exact.rewards, beta)
        reward, kl, _ = optimal_frontier_point(judged.reward, beta, judged.kl)
        deviation = 4 * exact.rewards.std().item() * size.rsqrt()
        assert ((reward - (weights.exp() * exact.rewards).sum(-1)).abs() < deviation).all()
        assert ((kl - kl_divergence(weights, exact.log_ref)).abs() < deviation / beta + 4 * size.rsqrt()).all()


def test_what_cannot_be_enumerated_is_refused(tiny, roles, lab):
    recipe = load_recipe(tiny)
    prompts = tokenize_prompts(load_dataset(load_task(recipe), "load_prompts", "eval"), roles.tokenizer, 24, limit=1)
    with pytest.raises(RecipeError, match="it is for laboratories"):
        enumerate_policy(roles.policy, roles, prompts, recipe.data.max_completion_tokens, 1.0)
    with pytest.raises(RecipeError, match="can also sample pad or bos"):
        enumerate_policy(roles.policy, roles, prompts, 1, 1.0)


def test_exact_py_judges_each_run_by_its_own_beta(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no finished run of lab in outputs"):
        lab_exact.main([])
    run("ppo", LAB, tmp_path, "--objective.beta=2", "--ppo.total_episodes=256")
    made = tmp_path / "outputs/lab/ppo/it"
    assert lab_exact.main([]) is None  # the run that finished last
    numbers = json.loads((made / "exact.json").read_text())
    reference, policy = numbers["reference"], numbers["policy"]
    assert (reference["beta"], reference["kl"], reference["fraction_of_optimum"]) == (2, 0, 0)
    assert reference["reward"] == reference["objective"] == pytest.approx(-0.4534, abs=1e-4)  # as the README has it
    for name in ("reference", "policy"):
        gap = numbers[name]["optimum"] - numbers[name]["objective"]
        assert gap == pytest.approx(2 * numbers[name]["kl_to_optimum"], abs=1e-4)
    assert policy["objective"] == pytest.approx(policy["reward"] - 2 * policy["kl"], abs=1e-6)
    assert policy["fraction_of_optimum"] == pytest.approx(1 - policy["kl_to_optimum"] / reference["kl_to_optimum"], abs=1e-4)
    assert "ppo/it" in capsys.readouterr().out
    resolved = made / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("beta: 2", "beta: 0"))
    with pytest.raises(RecipeError, match="divides by `objective"):
        lab_exact.main([str(made)])


def test_the_checkpoints_are_what_make_py_makes(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("lab_make", LAB / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    for part in ("backbone/model.safetensors", "reward/adapter_model.safetensors", "backbone/tokenizer.json"):
        assert (tmp_path / part).read_bytes() == (LAB / "checkpoints" / part).read_bytes(), part


PYTHON = {"reward.adapter": None, "reward.function": True}


def test_a_python_reward_is_enumerated_with_its_prompt(lab):
    _, _, prompts = lab
    recipe = load_recipe(LAB, PYTHON)
    roles = build_roles(recipe, load_tokenizer(recipe))
    exact = enumerate_policy(roles.reference, roles, prompts, 3, 1.0)
    assert exact.rewards.amax(1).tolist() == [3.0] * 8  # three times the next letter
    assert exact.rewards.amin(1).tolist() == [-1.5] * 8
    assert exact.rewards.argmax(1).unique().numel() == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "beta", "keys"),
    [(stage, beta, {}) for stage in ("ppo", "a2c", "dpo") for beta in (0.5, 1.0)]
    + [(stage, 0.5, PYTHON) for stage in ("ppo", "dpo")]
    + [("ppo", 0.5, {"ppo.kl": "loss"}), ("ppo", 0.5, {"ppo.kl": "loss", "ppo.kl_estimator": "k3"})],
)
def test_every_trainer_reaches_the_optimum(stage, beta, keys, lab, tmp_path):
    """Exact KL(pi || pi*) at least 20 times smaller than the reference's, J at least 0.97 of the way to J*.

    With the KL in the loss, from sampled tokens, less: near the optimum reward and KL cancel in the reward, and only there.
    """
    _, _, prompts = lab
    times, fraction = (15, 0.93) if "ppo.kl" in keys else (20, 0.97)
    run(stage, LAB, tmp_path, *(f"--{key}={json.dumps(value)}" for key, value in ({"objective.beta": beta} | keys).items()))
    recipe = load_recipe(LAB, {"objective.beta": beta} | keys)
    roles = build_roles(recipe, load_tokenizer(recipe))
    with judged_policy(tmp_path / f"outputs/lab/{stage}/it", roles, recipe.model) as policy:
        trained = enumerate_policy(policy, roles, prompts, 3, 1.0).exact(beta)
    start = enumerate_policy(roles.reference, roles, prompts, 3, 1.0).exact(beta)
    print(json.dumps({"stage": stage, "beta": beta, "reference": start, "trained": trained}))
    assert start["kl_to_optimum"] / trained["kl_to_optimum"] >= times
    assert trained["fraction_of_optimum"] >= fraction
