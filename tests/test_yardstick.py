"""The yardstick: what evaluation.json holds and that its numbers are what they are called."""

import json
import math

import pytest
import torch

from rlhf_recipes.evaluation import Completions, distinct_n
from rlhf_recipes.yardstick import estimate_optimum, frontiers, measure, measure_best_of_n
from tests.test_scripts import lines, run

METRICS = {
    "reward", "gold", "kl", "kl_k3", "objective", "fraction_of_optimum", "win_rate", "gold_win_rate", "length", "distinct_2",
}  # fmt: skip


def made_up(seed, prompts=40, k=8, shift=0.0, kl=0.0):
    """Completions with rewards around `shift` and log-ratios around `kl`."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(prompts, k, generator=generator) + shift
    log_ratio = kl + 0.1 * torch.randn(prompts, k, generator=generator) * (kl > 0)
    texts = [[f"a{i} b{j} c d" for j in range(k)] for i in range(prompts)]
    length = torch.full((prompts, k), 4)
    gold, nothing = torch.sigmoid(reward), torch.zeros_like(reward)
    return Completions([[[1]] * k] * prompts, texts, reward, log_ratio, log_ratio.abs(), length, gold, nothing, nothing)


def test_metrics_are_what_they_are_called():
    beta, reference, policy = 0.5, made_up(0), made_up(1, shift=1.0, kl=0.8)
    optimum = estimate_optimum({"reference": reference, "policy": policy}, beta)
    metrics = measure(policy, reference, optimum, beta)
    assert set(metrics) == METRICS
    mean = {name: value["mean"] for name, value in metrics.items()}
    assert mean["objective"] == pytest.approx(mean["reward"] - beta * mean["kl"], abs=1e-5)
    base = reference.reward.mean().item()
    assert mean["fraction_of_optimum"] == pytest.approx(
        (mean["objective"] - base) / (optimum.objective.mean().item() - base), abs=1e-5
    )
    by_hand = [
        (a > b) + 0.5 * (a == b)
        for row, other in zip(policy.reward.tolist(), reference.reward.tolist(), strict=True)
        for a in row
        for b in other
    ]
    assert mean["win_rate"] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-6)
    assert mean["distinct_2"] == pytest.approx(distinct_n([row[0] for row in policy.texts], 2))
    for name, value in metrics.items():
        assert value["low"] <= value["mean"] <= value["high"], name
    error = policy.reward.mean(1).std().item() / math.sqrt(40)  # of the mean over prompts
    assert metrics["reward"]["high"] - metrics["reward"]["low"] == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_the_reference_is_at_zero_and_no_policy_above_the_optimum_it_shows():
    beta, reference = 0.5, made_up(0)
    alone = estimate_optimum({"reference": reference}, beta)
    assert measure(reference, reference, alone, beta)["fraction_of_optimum"]["mean"] == 0
    assert measure(reference, reference, alone, beta)["win_rate"]["mean"] == pytest.approx(0.5)
    better = made_up(1, shift=6.0, kl=1.0)  # above what any of the reference's samples shows
    optimum = estimate_optimum({"reference": reference, "policy": better}, beta)
    assert optimum.proposal == "policy"
    assert measure(better, reference, alone, beta)["fraction_of_optimum"]["mean"] > 1
    assert measure(better, reference, optimum, beta)["fraction_of_optimum"]["mean"] <= 1


def test_best_of_one_is_the_reference_and_best_of_all_its_maximum():
    beta, reference = 0.5, made_up(0)
    optimum = estimate_optimum({"reference": reference}, beta)
    own, one, all_ = (
        measure(reference, reference, optimum, beta),
        measure_best_of_n(reference, 1, optimum, beta),
        measure_best_of_n(reference, 8, optimum, beta),
    )
    for name in METRICS - {"distinct_2"}:
        assert one[name]["mean"] == pytest.approx(own[name]["mean"], abs=1e-5), name
    best = reference.reward.argmax(1)
    assert all_["reward"]["mean"] == pytest.approx(reference.reward.amax(1).mean().item(), abs=1e-5)
    assert all_["gold"]["mean"] == pytest.approx(reference.gold[torch.arange(40), best].mean().item(), abs=1e-5)
    assert all_["kl"]["mean"] == pytest.approx(math.log(8) - 7 / 8)
    assert all_["win_rate"]["mean"] == pytest.approx(7.5 / 8)
    points = frontiers({"reference": reference})
    assert [p["n"] for p in points["best_of_n"]] == [1, 2, 4, 8]
    kls = [p["kl"] for p in points["optimal"]]
    assert kls == sorted(kls, reverse=True)  # a tighter leash, a smaller KL


def test_the_script_judges_adapters_full_models_and_best_of_n(tiny, tmp_path):
    run("ppo", tiny, tmp_path)
    full = tiny / "checkpoints/backbone"
    policies = f"--evaluate.policies=[best-of-2, mine={tmp_path}/outputs/tiny/ppo/latest, full={full}]"
    run("evaluate", tiny, tmp_path, policies)
    folder = tmp_path / "outputs/tiny/evaluate/it"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["beta"] == 0.05
    assert (evaluation["prompts"], evaluation["completions"]) == (8, 2)
    assert {"objective", "effective_sample_size"} <= set(evaluation["optimum"])
    assert list(evaluation["policies"]) == ["reference", "best-of-2", "mine", "full"]
    for name, metrics in evaluation["policies"].items():
        assert set(metrics) == METRICS, name
        assert all(set(value) == {"mean", "low", "high"} for value in metrics.values())
    assert evaluation["policies"]["full"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)  # the backbone is the reference
    assert evaluation["policies"]["mine"]["kl"]["mean"] != 0
    samples = lines(folder / "samples.jsonl")
    assert len(samples) == 8
    assert {"prompt", "reference", "mine", "full_gold"} <= set(samples[0])


def test_the_default_is_the_latest_run_of_each_stage_and_a_repeated_evaluation_is_the_same(tiny, tmp_path):
    run("ppo", tiny, tmp_path)
    for name in ("a", "b"):
        run("evaluate", tiny, tmp_path, f"--run.name={name}")
    a, b = (json.loads((tmp_path / f"outputs/tiny/evaluate/{n}/evaluation.json").read_text()) for n in "ab")
    assert list(a["policies"]) == ["reference", "best-of-4", "ppo"]
    assert a == b


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ("[nowhere]", "nowhere is no folder; expected `reference`, `best-of-N`"),
        ("[best-of-500]", "`evaluate.reference_completions` is 4"),
        ("[best-of-2, best-of-2]", "two are named best-of-2"),
        ("[recipes]", "neither an adapter"),
    ],
)
def test_what_cannot_be_judged_is_named(policies, message, tiny, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        run("evaluate", tiny, tmp_path, f"--evaluate.policies={policies}")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()
