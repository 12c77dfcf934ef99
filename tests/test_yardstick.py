"""The yardstick: what evaluation.json holds and that its numbers are what they are called."""

import html
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_recipes.evaluation.judging import Completions, distinct_n
from rlhf_recipes.evaluation.tables import fraction_bound, print_evaluation
from rlhf_recipes.evaluation.yardstick import Judged, estimate_optimum, evaluation_of, frontiers, measure, measure_best_of_n
from rlhf_recipes.recipe.loading import DEFAULT_RECIPE, load_recipe
from rlhf_recipes.runs.fingerprint import fingerprint
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.resume import newest_run
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


SUM = "--reward.terms=[{adapter: checkpoints/reward, read_eos: false}, {function: wordy, weight: 0.5}]"
NO_ADAPTER = ["--reward.adapter=null", "--reward.read_eos=true"]  # their place is in the terms


def test_the_terms_of_a_sum_are_measured_separately():
    beta, reference, policy = 0.5, made_up(0), made_up(1, shift=1.0, kl=0.8)
    for completions in (reference, policy):
        completions.terms = {"a": completions.reward - 1, "b": completions.gold.clone()}
        completions.terms["b"][0] = torch.nan  # no opinion on any completion of the first prompt
        completions.terms["b"][1, 0] = torch.nan
    optimum = estimate_optimum({"reference": reference, "policy": policy}, beta)
    metrics = measure(policy, reference, optimum, beta)
    assert set(metrics) == METRICS | {"reward_a", "reward_b"}
    assert metrics["reward_a"]["mean"] == pytest.approx(metrics["reward"]["mean"] - 1, abs=1e-5)
    known = policy.terms["b"][1:].nanmean(1)
    assert metrics["reward_b"]["mean"] == pytest.approx(known.mean().item(), abs=1e-6)
    assert metrics["reward_b"]["low"] < metrics["reward_b"]["mean"] < metrics["reward_b"]["high"]
    one, all_ = (measure_best_of_n(reference, n, optimum, beta) for n in (1, 8))
    assert one["reward_b"]["mean"] == pytest.approx(reference.terms["b"][1:].nanmean(1).mean().item(), abs=1e-5)
    best = reference.reward.argmax(1)
    assert all_["reward_a"]["mean"] == pytest.approx(reference.terms["a"][torch.arange(40), best].mean().item(), abs=1e-5)


def test_an_optimum_of_few_samples_is_printed_as_a_bound_without_intervals(capsys):
    reference, policy = made_up(0, k=32), made_up(1, k=32, shift=1.0, kl=0.8)
    recipe = load_recipe(DEFAULT_RECIPE)
    policies = [Judged("reference"), Judged("mine", folder=Path("outputs/imdb/ppo/the-run"))]
    for beta, bound in ((5.0, False), (0.05, True)):
        judged_at = load_recipe(DEFAULT_RECIPE, {"objective.beta": beta})
        judged, judged_by = {"reference": reference, "mine": policy}, fingerprint(judged_at, "evaluate")
        evaluation = evaluation_of(judged, policies, beta, judged_at.evaluate, judged_by)
        assert evaluation["optimum"]["bound"] == bound
        assert (evaluation["optimum"]["effective_sample_size"] < 10) == bound
        print_evaluation(evaluation)
        said = capsys.readouterr().out
        objective = evaluation["optimum"]["objective"]
        assert (f"J* >= {objective:.3f}, a bound from samples of" in said) == bound
        assert (f"J* is about {objective:.3f}, from samples of" in said) != bound
        assert ("at most" in said) == bound
        assert "ppo/the-run" in said
        assert "judged by adapter checkpoints/reward" in " ".join(said.split())
    assert recipe.objective.beta not in (5.0, 0.05)
    assert [fraction_bound(x) for x in (0.5, 0.0, -0.5)] == ["at most 0.500", "0.000", "at least -0.500"]


def test_an_evaluation_says_by_what_it_judged_and_what_each_policy_was_trained_for(tiny, tmp_path, capsys):
    run("ppo", tiny, tmp_path)
    run("evaluate", tiny, tmp_path, "--run.name=own")
    said = capsys.readouterr().out
    assert "left out: best-of-16, best-of-64, as `evaluate.reference_completions` is 4" in said
    assert "trained for" not in said
    run("evaluate", tiny, tmp_path, "--run.name=sum", SUM, *NO_ADAPTER, "--objective.beta=0.2")
    said = capsys.readouterr().out
    line = ("ppo (ppo/it) was trained for another objective: the reward adapter checkpoints/reward, and here adapter "
            "checkpoints/reward + 0.5 x function wordy; beta 0.05, and here 0.2")  # fmt: skip
    assert said.count(line) == 2  # before the work, and below the table
    own, other = (json.loads((tmp_path / f"outputs/tiny/evaluate/{n}/evaluation.json").read_text()) for n in ("own", "sum"))
    assert own["runs"] == other["runs"] == {"ppo": "ppo/it"}
    assert own["trained_for"]["ppo"] == json.loads((tmp_path / "outputs/tiny/ppo/it/run.json").read_text())["fingerprint"]
    assert own["judged_by"]["hash"] == own["trained_for"]["ppo"]["hash"] != other["judged_by"]["hash"]
    assert line in other["notes"]
    assert {"reward_reward", "reward_wordy"} <= other["policies"]["ppo"].keys() & other["policies"]["best-of-4"].keys()
    assert "reward_wordy" in said

    summary = run("report", tiny, tmp_path)  # of the latest, which judged by the sum
    report = html.unescape((tmp_path / "outputs/tiny/report/it/report.md").read_text())
    assert Path(summary["evaluation"]).name == "sum"
    assert "judged by adapter checkpoints/reward + 0.5 x function wordy" in report
    assert line in report
    assert "This evaluation was made for the reward adapter checkpoints/reward + 0.5 x function wordy, and the recipe" in report
    assert "| reward_wordy |" in report
    page = html.unescape((tmp_path / "outputs/tiny/report/it/report.html").read_text())
    assert line in page
    assert "<small>ppo/it</small>" in page


def test_an_adapter_of_another_backbone_is_refused_and_an_older_run_said_once(tiny, tmp_path, capsys):
    run("ppo", tiny, tmp_path)
    folder = tmp_path / "outputs/tiny/ppo/it"
    other = shutil.copytree(tiny / "checkpoints/backbone", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: 1.01 * weights[name]}, other / "model.safetensors", metadata={"format": "pt"})
    for stage in ("evaluate", "merge"):
        with pytest.raises(SystemExit) as stop:
            run(stage, tiny, tmp_path, f"--model.path={other}")
        assert stop.value.code == 2
        assert "an adapter trained on the backbone checkpoints/backbone, and here" in capsys.readouterr().err
        assert not (tmp_path / "outputs/tiny" / stage).exists()
    about = json.loads((folder / "run.json").read_text())
    del about["fingerprint"], about["trial"]
    (folder / "run.json").write_text(json.dumps(about))
    run("evaluate", tiny, tmp_path)
    said = capsys.readouterr().out
    assert said.count("ppo: trained before runs recorded what they maximise") == 2
    assert "another objective" not in said


def test_trials_of_sweeps_get_no_latest_and_are_judged_and_merged_by_name_alone(tiny, tmp_path, capsys):
    run("ppo", tiny, tmp_path, "--run.name=beta-trial-0", "--run.trial=true")
    folder = tmp_path / "outputs/tiny/ppo"
    assert {path.name for path in folder.iterdir()} == {"beta-trial-0"}
    run("evaluate", tiny, tmp_path, "--run.name=none")
    said = capsys.readouterr().out
    assert "left out: 1 runs of ppo, which are trials of sweeps; one is judged by its folder: --evaluate.policies" in said
    assert "ppo" not in json.loads((tmp_path / "outputs/tiny/evaluate/none/evaluation.json").read_text())["policies"]
    with pytest.raises(SystemExit):
        run("merge", tiny, tmp_path)
    assert f"there are 1 trials of sweeps, such as {folder}/beta-trial-0" in capsys.readouterr().err
    run("ppo", tiny, tmp_path, "--run.name=mine")
    run("ppo", tiny, tmp_path, "--run.name=beta-trial-1", "--run.trial=true")
    about = json.loads((folder / "beta-trial-1/run.json").read_text())
    del about["trial"]  # as in an older one
    (folder / "beta-trial-1/run.json").write_text(json.dumps(about))
    assert (folder / "latest").resolve().name == "mine"
    assert newest_run(folder).name == "mine"
    assert run("merge", tiny, tmp_path)["adapter"] == str(folder / "mine")
    run("evaluate", tiny, tmp_path, f"--evaluate.policies=[{folder}/beta-trial-0]")
    assert "ppo/beta-trial-0" in json.loads((tmp_path / "outputs/tiny/evaluate/it/evaluation.json").read_text())["policies"]


def test_wandbs_agent_makes_trials_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    made = Run.prepare(load_recipe(tiny, {"run.output": str(tmp_path), "run.name": "it"}), "ppo")
    made.start()
    assert json.loads((made.folder / "run.json").read_text())["trial"] is True
    assert not (made.folder.parent / "latest").exists()
