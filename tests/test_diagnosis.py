"""What goes wrong, read off histories that differ from a healthy one in a single respect; and what a run then does about it.

Every number is derived from the thresholds, so that they can be retuned.
"""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_recipes.evaluation import diagnosis
from rlhf_recipes.evaluation.diagnosis import CHECKS, diagnose
from rlhf_recipes.evaluation.watch import Watch
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.sections import SECTIONS
from rlhf_recipes.recipe.stages import TRAINED
from rlhf_recipes.runs.folder import Finding
from tests.test_scripts import lines, run

SE, LENGTH, ENTROPY, GOLD = 0.1, 20.0, 2.0, 0.9
ERROR = SE * 2**0.5  # of the difference of two evaluations
NOISE, TIGHT_KL, LOOSE = diagnosis.NOISE, diagnosis.TIGHT_KL, diagnosis.LOOSE_KL_PER_TOKEN
EXPLAINED, COLLAPSED = diagnosis.LOW_EXPLAINED_VARIANCE, diagnosis.COLLAPSED_ENTROPY
CORRELATED, LONGER = diagnosis.LENGTH_CORRELATION, diagnosis.LENGTH_CHANGE
CLIPPED, SPREAD = diagnosis.SATURATED_CLIPPED, diagnosis.SATURATED_SPREAD
CLIP, STEP, GAP, TRUNCATED = (
    diagnosis.HIGH_CLIP_FRACTION,
    diagnosis.HIGH_STEP_KL,
    diagnosis.SAMPLING_GAP,
    diagnosis.ALL_TRUNCATED,
)

# every metric that the checks read; a function is of t, which goes from 0 to 1 over the run
UPDATES = {
    "objective/kl": lambda t: t * LENGTH * LOOSE / 2,
    "objective/scores_std": 1.0,
    "rewards/clipped": CLIPPED / 2,
    "completions/mean_length": LENGTH,
    "completions/clipped_ratio": TRUNCATED / 2,
    "completions/length_score_correlation": 0.0,
    "policy/entropy_avg": ENTROPY,
    "policy/clipfrac_avg": CLIP / 2,
    "policy/step_kl": STEP / 2,
    "val/explained_variance": (1 + EXPLAINED) / 2,
    "val/sampling_gap": GAP / 10,
}
EVALUATIONS = {
    "eval/reward": lambda t: 1 + 3 * t * NOISE * ERROR,
    "eval/reward_se": SE,
    "eval/kl": lambda t: 3 * t * TIGHT_KL,
    "eval/gold": lambda t: GOLD + t / 10,
    "eval/gold_se": SE,
}


def history(updates=20, evaluations=5, without=(), **changes):
    """The lines of metrics.jsonl of a healthy run, with `changes` to some metrics."""
    assert {*changes, *without} <= {*UPDATES, *EVALUATIONS}

    def rows(metrics, steps):
        now = {name: changes.get(name, value) for name, value in metrics.items() if name not in without}
        for step in steps:
            yield {"step": step, **{name: v(step / updates) if callable(v) else v for name, v in now.items()}}

    held_out = rows(EVALUATIONS, [updates * i // (evaluations - 1) for i in range(evaluations)]) if evaluations else ()
    return sorted([*rows(UPDATES, range(1, updates + 1)), *held_out], key=lambda row: row["step"])


def found(stage="ppo", ends_matter=True, **described):
    return diagnose(history(**described), stage, ends_matter)


def names_of(findings):
    return [finding.name for finding in findings]


def late(value, before):
    """A metric that changes halfway."""
    return lambda t: value if t > 0.5 else before


def falling(by):
    """Gold that is at its best halfway and has fallen `by` from there at the end."""
    return lambda t: GOLD - by if t == 1 else GOLD - abs(t - 0.5) / 100


def cases(over):
    """name of a finding: (the metrics that show it, keys of the recipe in its advice, numbers of its evidence, in order).

    The metrics are beyond the thresholds by the share `over` of them, or short of them where it is negative.
    """
    more, less = 1 + over, 1 - over
    return {
        "reward hacking": (
            {"eval/gold": falling(more * NOISE * ERROR)},
            ["objective.beta", "watch.on_over_optimisation"],
            [10, 20, 1 + 1.5 * NOISE * ERROR, 1 + 3 * NOISE * ERROR, GOLD, GOLD - more * NOISE * ERROR, more * NOISE],
        ),
        "leash too tight": (
            {"eval/kl": lambda t: t * TIGHT_KL * less, "eval/reward": lambda t: 1 + t * NOISE * ERROR * less},
            ["objective.beta", "ppo.learning_rate"],
            [20, TIGHT_KL * less, NOISE * ERROR * less, 1],
        ),
        "leash too loose": (
            {"objective/kl": late(LENGTH * LOOSE * more, before=0.0)},
            ["objective.beta", "ppo.kl_target"],
            [LENGTH * LOOSE * more, LOOSE * more],
        ),
        "value function not learning": (
            {"val/explained_variance": EXPLAINED - over / 10},  # may be retuned to 0
            ["ppo.vf_coef", "ppo.reward_baseline"],
            [EXPLAINED - over / 10],
        ),
        "entropy collapse": (
            {"policy/entropy_avg": late(ENTROPY * COLLAPSED * less, before=ENTROPY)},
            ["objective.beta", "ppo.learning_rate"],
            [ENTROPY, ENTROPY * COLLAPSED * less],
        ),
        "length exploitation": (
            {"completions/length_score_correlation": CORRELATED * more,
             "completions/mean_length": late(LENGTH * (1 + LONGER * more), before=LENGTH)},
            ["reward.length_penalty"],
            [CORRELATED * more, LENGTH, LENGTH * (1 + LONGER * more)],
        ),
        "all completions truncated": (
            {"completions/clipped_ratio": min(1.0, TRUNCATED * more)},
            ["data.max_completion_tokens", "reward.missing_eos_penalty", "reward.read_eos"],
            [100 * min(1.0, TRUNCATED * more)],
        ),
        "sampling and training apart": (
            {"val/sampling_gap": GAP * more},
            ["model.path", "model.dtype"],
            [GAP * more],
        ),
        "reward saturated": (
            {"objective/scores_std": late(SPREAD * less, before=1.0)},
            ["reward.clip"],
            [100 * CLIPPED / 2, 1, SPREAD * less],
        ),
        "learning rate too high": (
            {"policy/clipfrac_avg": CLIP * more},
            ["ppo.learning_rate", "ppo.num_ppo_epochs", "ppo.target_kl"],
            [100 * CLIP * more, STEP / 2],
        ),
    }  # fmt: skip


NAMES = list(cases(0.1))


def test_a_healthy_run_has_no_findings():
    assert len(NAMES) == len(CHECKS) == 10
    assert len(history()) == 25
    for stage in ("ppo", "a2c"):
        for without in ((), ["rewards/clipped"], ["eval/gold", "eval/gold_se"]):  # metrics that not every recipe has
            assert found(stage, without=without) == []
    assert found(evaluations=0) == []
    assert diagnose([], "ppo", True) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_wrong_is_found_and_nothing_else(name):
    changes, keys, numbers = cases(0.1)[name]
    [finding] = found(**changes)
    assert finding.name == name
    assert set(keys) <= set(re.findall(r"`(\w+\.\w+)", finding.advice))
    shown = re.findall(r"[+-]?\d+(?:\.\d+)?", finding.evidence)
    assert len(shown) == len(numbers)
    for text, number in zip(shown, numbers, strict=True):  # rounded
        assert float(text) == pytest.approx(number, abs=0.51 * 10 ** -len(text.partition(".")[2])), finding.evidence
    assert str(finding) == f"{name}: {finding.evidence}. {finding.advice}"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_short_of_a_threshold_is_not_found(name):
    changes, _, _ = cases(-0.1)[name]
    assert found(**changes) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_first_updates_say_nothing(name):
    changes, _, _ = cases(0.1)[name]
    assert found(updates=diagnosis.LEAST_UPDATES - 1, **changes) == []
    assert names_of(found(updates=diagnosis.LEAST_UPDATES, **changes)) == [name]


def test_several_findings_at_once_are_all_there():
    changes = {metric: value for metrics, _, _ in cases(0.1).values() for metric, value in metrics.items()}
    del changes["eval/reward"], changes["eval/kl"]  # a reward that is not learned is not hacked
    changes["objective/kl"] = 2 * LOOSE * LENGTH * (1 + LONGER)  # of longer completions
    assert names_of(found(**changes)) == [name for name in NAMES if name != "leash too tight"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("reward saturated", {"rewards/clipped": CLIPPED * 1.1}),
        ("learning rate too high", {"policy/step_kl": STEP * 1.1}),
        (
            "length exploitation",
            {
                "completions/length_score_correlation": -CORRELATED * 1.1,
                "completions/mean_length": late(LENGTH * (1 - LONGER * 1.1), before=LENGTH),
            },
        ),
    ],
)
def test_the_other_ways_to_the_same_finding(name, changes):
    assert names_of(found(**changes)) == [name]


@pytest.mark.parametrize(
    "changes",
    [
        {"eval/gold": falling(2 * NOISE * ERROR), "eval/reward": lambda t: 5 - t},  # the reward falls too: no over-optimisation
        {"eval/gold": falling(2 * NOISE * ERROR), "eval/gold_se": 3 * SE},  # more noise
        {"eval/kl": 0.0},  # and the reward rises all the same
        {"eval/reward": 1.0},  # and the KL is not small
        {"completions/mean_length": late(LENGTH * (1 + 2 * LONGER), before=LENGTH)},  # but the score does not follow it
        {"completions/length_score_correlation": CORRELATED * 1.1},  # but the length stays
        {
            "completions/length_score_correlation": CORRELATED * 0.9,  # too little
            "completions/mean_length": late(LENGTH * (1 + 2 * LONGER), before=LENGTH),
        },
        {"objective/kl": LENGTH * LOOSE * 1.5, "completions/mean_length": LENGTH * 2},  # not a token's
        {
            "completions/length_score_correlation": -CORRELATED * 1.1,  # longer against what the score would like
            "completions/mean_length": late(LENGTH * (1 + 2 * LONGER), before=LENGTH),
        },
        {"objective/kl": late(0.0, before=LENGTH * LOOSE * 2)},  # has come back
        {"val/explained_variance": late(1.0, before=-1.0)},  # has learned meanwhile
        {"objective/scores_std": SPREAD / 2},  # was so from the start
        {"policy/entropy_avg": ENTROPY * COLLAPSED / 2},
    ],
)
def test_what_looks_like_it_and_is_not(changes):
    assert found(**changes) == []


def test_the_best_of_ten_evaluations_of_a_flat_gold_is_rarely_beyond_noise():
    """The last is compared with the best, which chance favours; with two standard errors one run in eight would be found."""
    runs = torch.randn(400, 10, generator=torch.Generator().manual_seed(0)).mul(SE).tolist()
    alarms = 0
    for golds in map(iter, runs):
        alarms += names_of(found(evaluations=10, **{"eval/gold": lambda t, golds=golds: next(golds)})) == ["reward hacking"]
    assert alarms / len(runs) < 0.08


def test_truncation_matters_where_ends_do():
    changes, _, _ = cases(0.1)["all completions truncated"]
    assert names_of(found(ends_matter=True, **changes)) == ["all completions truncated"]
    assert found(ends_matter=False, **changes) == []


@pytest.mark.parametrize("name", NAMES)
def test_advice_names_the_stage(name):
    changes, _, _ = cases(0.1)[name]
    [ppo], [a2c] = found("ppo", **changes), found("a2c", **changes)
    assert a2c.evidence == ppo.evidence
    assert "a2c." not in ppo.advice and "ppo." not in a2c.advice
    assert ("`ppo." in ppo.advice) == ("`a2c." in a2c.advice)


@pytest.mark.parametrize("stage", ["ppo", "a2c"])
def test_advice_names_keys_that_the_recipe_takes(stage):
    for changes, _, _ in cases(0.1).values():
        [finding] = found(stage, **changes)
        for section, key in re.findall(r"`(\w+)\.(\w+)", finding.advice):
            known = SECTIONS[section].model_fields if section in SECTIONS else ()
            assert key in (known or TRAINED[section].keys), finding


# --- what a run does about it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "matter"),
    [
        ({}, False),  # the tiny recipe's adapter does not read eos
        ({"reward.read_eos": True}, True),
        ({"reward.missing_eos_penalty": 1.0}, True),
        ({"reward.adapter": None, "reward.read_eos": True, "reward.function": True}, False),  # which sees text without eos
        ({"reward.adapter": None, "reward.read_eos": True, "reward.terms": [{"function": True}, {"adapter": "x"}]}, True),
    ],
)
def test_ends_matter_where_the_reward_sees_them(tiny, settings, matter):
    assert Watch(SimpleNamespace(recipe=load_recipe(tiny, settings))).ends_matter == matter


EVERY_UPDATE = ["--ppo.eval_strategy=steps", "--ppo.eval_steps=1", "--ppo.total_episodes=48", "--ppo.learning_rate=1e-2"]
HACKED = Finding("reward hacking", "gold fell", "Raise `objective.beta`")


def watched_run(tiny, tmp_path, monkeypatch, action, hacked_at, gold=(0.1, 0.2, 0.3, 0.9, 0.5)):
    """A run of six updates, judged at step 0 and after each: is over-optimised from step `hacked_at` on.

    Args:
        gold: of the held-out completions at step 0, 1, ...; the last one stays; None: of one of them there is none.
    """
    calls = []

    def scripted_gold(prompts, completions, **columns):
        calls.append(len(prompts))  # two batches of four prompts an evaluation
        assert len(prompts) == 4
        value = gold[min((len(calls) - 1) // 2, len(gold) - 1)]
        return [value] * 4 if value is not None else [0.2, 0.2, None, 0.2]

    def scripted_diagnosis(history, stage, ends_matter):
        assert (stage, ends_matter) == ("ppo", False)
        return [HACKED] if history[-1]["step"] >= hacked_at else []

    monkeypatch.setattr("rlhf_recipes.algorithms.online.optional_gold", lambda *_: scripted_gold)
    monkeypatch.setattr("rlhf_recipes.evaluation.watch.diagnose", scripted_diagnosis)
    summary = run("ppo", tiny, tmp_path, f"--watch.on_over_optimisation={action}", f"--run.name={action}", *EVERY_UPDATE)
    folder = tmp_path / "outputs/tiny/ppo" / action
    assert json.loads((folder / "summary.json").read_text()) == summary
    hacked = hacked_at <= 6
    assert summary["findings"] == hacked * [{"name": HACKED.name, "evidence": HACKED.evidence, "advice": HACKED.advice}]
    rows = lines(folder / "metrics.jsonl")
    return folder, [row for row in rows if "objective/kl" in row], [row for row in rows if "eval/reward" in row]


def test_warn_trains_on_and_says_it_once(tiny, tmp_path, monkeypatch, capsys):
    _, updates, evaluations = watched_run(tiny, tmp_path, monkeypatch, "warn", hacked_at=1)
    assert [row["step"] for row in updates] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluations] == [0, 1, 2, 3, 4, 5, 6, 7]  # and at the end
    assert capsys.readouterr().err.count(f"step 1: {HACKED}") == 1


def test_stop_ends_at_that_step_with_the_policy_it_has(tiny, tmp_path, monkeypatch):
    folder, updates, evaluations = watched_run(tiny, tmp_path, monkeypatch, "stop", hacked_at=1)
    assert [row["step"] for row in updates] == [1]
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    for name in ("eval/reward", "eval/kl", "eval/length"):  # the same prompts and seeds, hence the same numbers
        assert evaluations[2][name] == evaluations[1][name]
    assert evaluations[2]["eval/kl"] != 0
    assert not list(folder.glob("best-*"))


def test_rollback_ends_with_the_best_policy_by_gold(tiny, tmp_path, monkeypatch):
    folder, updates, evaluations = watched_run(tiny, tmp_path, monkeypatch, "rollback", hacked_at=4)
    assert [row["step"] for row in updates] == [1, 2, 3, 4]
    assert [row["eval/gold"] for row in evaluations] == pytest.approx([0.1, 0.2, 0.3, 0.9, 0.5, 0.5])
    assert [best.name for best in folder.glob("best-*")] == ["best-3"]
    for file in ("adapter_model.safetensors", "value.safetensors"):
        ended, best = load_file(folder / file), load_file(folder / "best-3" / file)
        assert ended.keys() == best.keys()
        assert all(torch.equal(ended[name], best[name]) for name in ended)
    for name in ("eval/reward", "eval/kl", "eval/length", "eval/entropy"):
        assert evaluations[5][name] == evaluations[3][name]
    assert evaluations[5]["eval/kl"] != evaluations[4]["eval/kl"]


def test_rollback_to_the_start_where_gold_only_falls(tiny, tmp_path, monkeypatch):
    folder, updates, evaluations = watched_run(tiny, tmp_path, monkeypatch, "rollback", hacked_at=1, gold=(0.9, 0.5))
    assert [row["step"] for row in updates] == [1]
    assert [best.name for best in folder.glob("best-*")] == ["best-0"]
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all((adapter[name] == 0).all() for name in adapter if "lora_B" in name)
    assert [row["eval/kl"] != 0 for row in evaluations] == [False, True, False]


def test_rollback_without_a_finding_ends_with_the_last_policy(tiny, tmp_path, monkeypatch):
    folder, updates, evaluations = watched_run(tiny, tmp_path, monkeypatch, "rollback", hacked_at=99)
    assert [row["step"] for row in updates] == [1, 2, 3, 4, 5, 6]
    assert [best.name for best in folder.glob("best-*")] == ["best-3"]
    assert evaluations[-1]["eval/kl"] == evaluations[-2]["eval/kl"] != evaluations[3]["eval/kl"]


def test_a_real_run_has_every_metric_that_the_checks_read(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis, "HIGH_STEP_KL", 0.0)  # so that there is a finding
    updates = diagnosis.LEAST_UPDATES
    words = ["--ppo.eval_strategy=steps", f"--ppo.eval_steps={updates}", f"--ppo.total_episodes={8 * updates}"]
    summary = run("ppo", tiny, tmp_path, "--reward.clip=0.5", *words)
    rows = lines(tmp_path / "outputs/tiny/ppo/it/metrics.jsonl")
    trained, judged = ([row for row in rows if name in row] for name in ("objective/kl", "eval/reward_se"))
    assert (len(trained), len(judged)) == (updates, 2)
    assert all(UPDATES.keys() <= row.keys() for row in trained)
    assert all(EVALUATIONS.keys() <= row.keys() for row in judged)
    findings = [dataclasses.asdict(finding) for finding in diagnose(rows, "ppo", ends_matter=False)]
    assert "learning rate too high" in [finding["name"] for finding in findings]
    assert summary["findings"] == findings


def test_a_run_too_short_to_judge_has_no_findings(tiny, tmp_path):
    assert run("ppo", tiny, tmp_path)["findings"] == []


def test_gold_without_an_opinion_on_one_completion_is_not_the_best(tiny, tmp_path, monkeypatch):
    folder, _, _ = watched_run(tiny, tmp_path, monkeypatch, "rollback", hacked_at=4, gold=(0.1, 0.9, None, 0.3, 0.2))
    assert [best.name for best in folder.glob("best-*")] == ["best-1"]


def test_a_finding_is_an_alert_of_wandb_and_survives_its_failure(tiny, tmp_path, monkeypatch, capsys):
    from unittest import mock

    from rlhf_recipes.recipe.loading import load_recipe
    from rlhf_recipes.runs.folder import Run
    from rlhf_recipes.runs.trackers import Tracked, Trackers, WandbTracker

    recipe = load_recipe(tiny, {"run.output": str(tmp_path), "run.tracker": "wandb"})
    with mock.patch("wandb.init") as init:
        trackers = Trackers({"wandb": WandbTracker(Tracked("project", "tiny", "ppo", tmp_path, {}))})
    wandb = init.return_value
    run_ = Run(recipe, "ppo", tmp_path, main=True, trackers=trackers)
    run_.found(HACKED, step=7)
    [call] = wandb.alert.call_args_list
    assert call.kwargs["title"] == HACKED.name
    assert "step 7" in call.kwargs["text"]
    assert HACKED.advice in call.kwargs["text"]
    wandb.alert.side_effect = OSError("no network")
    run_.found(HACKED, step=8)
    assert "continuing without it" in capsys.readouterr().err
    assert run_.findings == [HACKED, HACKED]
