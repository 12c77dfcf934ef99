"""Sweeps: wandb's format read as wandb reads it, and run without its server by a study that survives what runs survive."""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jsonschema
import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from rlhf_recipes import interrupts
from rlhf_recipes.command_line import parse_command_line
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.sweeps.file import load_sweep
from rlhf_recipes.sweeps.job import last_words, terminate, watched_values
from rlhf_recipes.sweeps.pruning import Pruning
from rlhf_recipes.sweeps.results import _save_frontier, interval
from rlhf_recipes.sweeps.worker import Worker, run_sweep, sampler_of
from scripts.sweep import main

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("recipes/*/sweep.yaml"), *ROOT.glob("recipes/*/sweeps/*.yaml")])
SCHEMA = json.loads((ROOT / "tests" / "wandb_sweep_schema.json").read_text())


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("rlhf_recipes.sweeps.job.POLL", 0.01)
    monkeypatch.setattr("rlhf_recipes.sweeps.worker.POLL", 0.01)
    monkeypatch.setattr("rlhf_recipes.sweeps.results._save_frontier", lambda sweep, results, file: file.touch())


def wandb_violations(sweep):
    """What wandb's own schema has against a file, with its two formats."""
    formats = jsonschema.FormatChecker()
    formats.checks("float")(lambda value: isinstance(value, float))
    formats.checks("integer")(lambda value: isinstance(value, int))
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA, format_checker=formats).iter_errors(sweep)]


# --- the shipped files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_sweeps_are_wandbs_and_expand_to_commands_that_resolve(file, tmp_path):
    """The command that `wandb agent` would run, expanded by wandb's own code, is ours, and a recipe."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    content = yaml.safe_load(file.read_text())
    assert wandb_violations(content) == []
    assert content["metric"]["goal"] == "maximize"
    sweep = load_sweep(file, output=str(tmp_path / "outputs"))
    points = sweep.grid() if sweep.method == "grid" else [{name: _middle(dist) for name, dist in sweep.space.items()}]
    for point, seed in itertools.product(points, sweep.seeds):
        chosen = {name: {"value": value} for name, value in (sweep.fixed | point | {"run.seed": seed}).items()}
        arguments = create_sweep_command_args({"args": chosen})["args"]
        replaced = {"${args}": arguments, "${env}": ["/usr/bin/env"], "${program}": [content["program"]]}
        replaced["${interpreter}"] = [sys.executable]  # wandb's agent says `python`
        agent = [w for part in create_sweep_command(list(content["command"])) for w in replaced.get(part, [part])]
        assert sweep.words(point, seed)[: len(agent)] == agent
        line = parse_command_line(agent[agent.index(content["program"]) + 1 :])
        recipe = load_recipe(line.recipe, line.overrides)
        for name, value in (sweep.fixed | point | {"run.seed": seed}).items():
            section, _, key = name.partition(".")
            found = getattr(recipe, section, None) or recipe.stages[section]
            assert (found[key] if isinstance(found, dict) else getattr(found, key)) == value


def _middle(distribution):
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low


@pytest.mark.parametrize("file", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_sweeps_dry_run(file, tmp_path, capsys):
    assert main([str(file), "--output", str(tmp_path / "outputs"), "--dry-run"]) is None
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_schema_is_one_that_refuses():
    assert wandb_violations({"method": "grid", "parameters": {"a": {"value": 1}}, "parametres": {}})
    assert wandb_violations({"method": "grid", "parameters": {"a": {"min": "1e-4", "max": 1}}})


def test_no_two_shipped_sweeps_share_a_study():
    names = [yaml.safe_load(file.read_text())["name"] for file in FILES]
    assert len(set(names)) == len(names)


# --- what a file may say -----------------------------------------------------------------------------------------


def content_of(tiny, **changes):
    content = {
        "program": "scripts/ppo.py", "name": "beta", "method": "grid",
        "metric": {"name": "eval/objective", "goal": "maximize"},
        "parameters": {"objective.beta": {"values": [0.1, 0.2, 0.3]}},
        "command": ["${env}", "accelerate", "launch", "${program}", "--recipe", str(tiny), "${args}"],
    } | changes  # fmt: skip
    return {key: value for key, value in content.items() if value is not ...}


@pytest.fixture
def write(tiny, tmp_path):
    """Writes a sweep of the tiny recipe, with `changes`, and loads it."""

    def load(seeds=None, trials=None, study=None, **changes):
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump(content_of(tiny, **changes), sort_keys=False))
        return load_sweep(file, seeds, study, str(tmp_path / "outputs"), trials)

    return load


SPACES = {
    "categorical": ({"values": [0.1, 0.2]}, CategoricalDistribution([0.1, 0.2])),
    "categorical by name": ({"values": [1], "distribution": "categorical"}, CategoricalDistribution([1])),
    "uniform": ({"min": 0.0, "max": 1.0}, FloatDistribution(0, 1)),
    "uniform of a whole number and a float": ({"min": 0, "max": 1.0}, FloatDistribution(0, 1)),
    "int_uniform": ({"min": 1, "max": 8}, IntDistribution(1, 8)),
    "int_uniform by name": ({"min": 1, "max": 8, "distribution": "int_uniform"}, IntDistribution(1, 8)),
    "log_uniform_values": (
        {"min": 1e-4, "max": 1e-2, "distribution": "log_uniform_values"},
        FloatDistribution(1e-4, 1e-2, log=True),
    ),
    "q_uniform": ({"min": 0.1, "max": 0.9, "q": 0.25, "distribution": "q_uniform"}, FloatDistribution(0.25, 0.75, step=0.25)),
    "q_uniform of whole numbers": ({"min": 4, "max": 30, "q": 4, "distribution": "q_uniform"}, IntDistribution(4, 28, step=4)),
    "q_log_uniform_values": ({"min": 1, "max": 64, "distribution": "q_log_uniform_values"}, IntDistribution(1, 64, log=True)),
}


@pytest.mark.parametrize(("spec", "distribution"), SPACES.values(), ids=SPACES)
def test_wandbs_distributions_become_optunas(spec, distribution, tiny, write):
    sweep = write(method="random", trials=1, parameters={"objective.beta": spec})
    assert sweep.space == {"objective.beta": distribution}
    assert wandb_violations(content_of(tiny, parameters={"objective.beta": spec})) == []


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ({"min": 2, "max": 4}, [2, 3, 4]),
        ({"min": 2, "max": 8, "q": 2, "distribution": "q_uniform"}, [2, 4, 6]),  # as wandb: numpy.arange(2, 8, 2)
        ({"values": [3, "all-linear"]}, [3, "all-linear"]),
    ],
)
def test_a_grid_goes_through_what_wandbs_goes_through(spec, values, write):
    assert write(parameters={"model.attention": spec}).grid() == [{"model.attention": value} for value in values]


def test_constants_and_lists_are_passed_as_wandb_passes_them(write):
    sweep = write(parameters={"lora.target_modules": {"values": [["q_proj", "v_proj"], "all-linear"]}, "lora.r": {"value": 2}})
    assert sweep.fixed == {"lora.r": 2}
    flags = write(parameters={"ppo.kl": {"values": ["full", "reward"]}, "ppo.target_kl": {"value": "null"}})
    assert [flags.recipe_of(point, 0).stages["ppo"] for point in flags.grid()] == [
        flags.recipe.stages["ppo"] | {"kl": kl, "target_kl": None} for kl in ("full", "reward")
    ]
    recipes = [sweep.recipe_of(point, 0) for point in sweep.grid()]
    assert [recipe.lora.target_modules for recipe in recipes] == [["q_proj", "v_proj"], "all-linear"]


@pytest.mark.parametrize(
    ("stop", "pruning"),
    [
        ({"min_iter": 2, "eta": 2}, Pruning(2, "auto", 2)),
        ({"min_iter": 1}, Pruning(1, "auto", 3)),
        ({"max_iter": 27, "s": 2}, Pruning(3, 27, 3)),  # wandb's bands: 27 / 3 and 27 / 9
    ],
)
def test_early_terminate_becomes_hyperband(stop, pruning, write):
    parameters = {
        "ppo.eval_strategy": {"value": "steps"},
        "ppo.eval_steps": {"value": 1},
        "objective.beta": {"min": 0.1, "max": 0.5},
    }
    sweep = write(method="random", trials=9, parameters=parameters, early_terminate={"type": "hyperband", **stop})
    assert sweep.pruning == pruning
    pruner = Worker(sweep).study.pruner
    assert isinstance(pruner, optuna.pruners.HyperbandPruner)
    assert (pruner._min_resource, pruner._max_resource, pruner._reduction_factor) == dataclasses.astuple(pruning)


def test_methods_become_samplers():
    assert isinstance(sampler_of("random", 0), optuna.samplers.RandomSampler)
    assert isinstance(sampler_of("bayes", 0), optuna.samplers.TPESampler)


def test_seeds_are_those_of_the_file_or_the_first_ones(write):
    with_seeds = {"objective.beta": {"values": [0.1]}, "run.seed": {"values": [5, 6, 7]}}
    assert write(parameters=with_seeds).seeds == [5, 6, 7]
    assert write(parameters=with_seeds, seeds=2).seeds == [5, 6]
    assert write(seeds=3).seeds == [0, 1, 2]
    assert write().seeds == [0]
    random = {"method": "random", "run_cap": 12, "parameters": with_seeds | {"objective.beta": {"min": 0.1, "max": 0.5}}}
    assert write(**random).run_cap == 4  # wandb counts every seed
    assert write(trials=5, **random).run_cap == 5


def varied(**spec):
    return {"parameters": {"objective.beta": spec}}


BAD = {
    "no file": (None, "no such file; sweeps here: recipes/"),
    "not a mapping": ([1], "a sweep is a mapping"),
    "unknown key": ({"parametres": {}}, "unknown key `parametres`; did you mean `parameters`?"),
    "server's key": ({"scheduler": {"engine": "optuna"}}, "`scheduler` needs wandb's server"),
    "no program": ({"program": ...}, "`program` is missing: one of scripts/ppo.py, scripts/a2c.py, scripts/dpo.py"),
    "other program": ({"program": "scripts/sft.py"}, "`program` 'scripts/sft.py': expected one of"),
    "no method": ({"method": ...}, "`method` is missing: expected one of grid, random, bayes"),
    "other method": ({"method": "custom"}, "`method` is 'custom'"),
    "no goal": ({"metric": {"name": "eval/objective"}}, "`metric.goal` is missing, and wandb would minimize"),
    "unknown metric": ({"metric": {"name": "eval/rewrd", "goal": "maximize"}}, "did you mean `eval/reward`?"),
    "no parameters": ({"parameters": {}}, "`parameters` must be a mapping"),
    "no section": ({"parameters": {"beta": {"value": 1}}}, "`beta` is not a key of a recipe"),
    "no section, nearest": ({"parameters": {"beta": {"value": 1}}}, "did you mean `objective.beta`?"),
    "no section, of the stage": ({"parameters": {"learning_rate": {"value": 1}}}, "did you mean `ppo.learning_rate`?"),
    "unknown name": ({"parameters": {"objective.bta": {"value": 1}}}, "unknown key `objective.bta`; did you mean `beta`?"),
    "unknown section": ({"parameters": {"objektive.beta": {"value": 1}}}, "`objektive`; did you mean `objective`?"),
    "another stage's": ({"parameters": {"dpo.learning_rate": {"value": 1}}}, "scripts/ppo.py does not read it"),
    "given": ({"parameters": {"run.name": {"values": ["a", "b"]}}}, "scripts/sweep.py gives it to every trial"),
    "given in the command": (
        {"command": ["accelerate", "launch", "${program}", "--run.output=x", "${args}"]},
        "`command`: scripts/sweep.py gives --run.output to every trial",
    ),
    "refused value": (varied(values=[0.1, -1]), "`objective.beta`: expected float >= 0, got -1"),
    "refused end": (varied(min=-1.0, max=1.0) | {"method": "random", "run_cap": 1}, "expected float >= 0, got -1.0"),
    "refused by preflight": (
        {"parameters": {"ppo.num_mini_batches": {"values": [1, 3]}}},
        "`ppo.num_mini_batches` 3 does not divide",
    ),
    "null": (varied(values=[None, 0.1]), "write it in quotes, as 'null'"),
    "twice": (varied(values=[0.1, 0.1]), "the value 0.1 appears twice"),
    "no values": (varied(values=[]), "must be a list of at least one value"),
    "nothing": (varied(), "expected `value`, `values`, or `min` and `max`"),
    "nested": (varied(parameters={"a": {"value": 1}}), "write `objective.beta.KEY` as a parameter"),
    "min alone": (varied(min=1.0, distribution="uniform"), "`max` is missing, which the distribution uniform needs"),
    "misspelt distribution": (varied(min=1.0, max=2.0, distribution="uniforn"), "did you mean `uniform`?"),
    "key of another": (varied(min=1.0, max=2.0, q=1, distribution="uniform"), "`q` is not a key of the distribution uniform"),
    "min above max": (varied(min=2.0, max=1.0), "min 2.0 is not below max 1.0"),
    "text": (varied(min="1e-4", max=1.0), "`min` must be a number, got '1e-4'; YAML 1.1 wants 1.0e-4"),
    "log of 0": (varied(min=0, max=1.0, distribution="log_uniform_values"), "min of log_uniform_values must be above 0"),
    "grid of a range": (varied(min=0.1, max=1.0), "a grid cannot go through uniform; give its `values`"),
    "no end": (varied(min=0.1, max=1.0) | {"method": "random"}, "method random has no end of its own: give --trials N"),
    "nothing varied": (varied(value=0.1) | {"method": "bayes"}, "leave method bayes nothing to vary"),
    "seeds of a range": ({"parameters": {"run.seed": {"min": 0, "max": 9}}, "method": "random"}, "leave method random nothing"),
    "seeds as text": ({"parameters": {"run.seed": {"values": ["a"]}}}, "expected whole numbers, got ['a']"),
    "name": ({"name": "a/b"}, "`name` 'a/b': expected the name of a folder"),
    "macro": ({"command": ["${program}", "${args_json}"]}, "which is the macro ${args}, not ${args_json}"),
    "no arguments": ({"command": ["accelerate", "launch", "${program}"]}, "`command` must name ${program} once, and ${args}"),
    "no program in it": ({"command": ["accelerate", "launch", "${args}"]}, "`command` must name ${program} once"),
    "no launcher": ({"command": ["acelerate", "launch", "${program}", "${args}"]}, "there is no program acelerate on the PATH"),
    "no recipe": ({"command": ["accelerate", "launch", "${program}", "--recipe=nowhere", "${args}"]}, "no such recipe"),
    "strict": ({"early_terminate": {"type": "hyperband", "min_iter": 1, "strict": False}}, "is the strict one"),
    "eta": ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1.5}}, "takes whole numbers from 2 on, got 1.5"),
    "s alone": ({"early_terminate": {"type": "hyperband", "s": 1}}, "needs `min_iter`, or `max_iter` and `s`"),
    "other stop": ({"early_terminate": {"type": "median"}}, "`early_terminate.type` must be hyperband"),
    "nothing to stop by": (
        {"early_terminate": {"type": "hyperband", "min_iter": 1}},
        "this ppo measures no held-out metric before its end; give `ppo.eval_strategy: {value: steps}` and `ppo.eval_steps`",
    ),
    **{
        f"distribution {kind}": (varied(mu=1, sigma=1, distribution=kind), f"no distribution `{kind}`; the nearest is `{near}`")
        for kind, near in {
            "normal": "uniform", "q_normal": "q_uniform", "log_normal": "log_uniform_values", "beta": "uniform",
            "log_uniform": "log_uniform_values", "inv_log_uniform_values": "log_uniform_values", "q_beta": "q_uniform",
        }.items()
    },
    "probabilities": (varied(values=[0.1, 0.2], probabilities=[0.5, 0.5]), "the nearest is `categorical`"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(changes, message, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_recipes.sweeps.worker.run_process", None)
    file = tmp_path / "sweep.yaml"
    if changes is not None:
        content = content_of(tiny, **changes) if isinstance(changes, dict) else changes
        file.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as stop:
        main([str(file), "--output", str(tmp_path / "outputs")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == ([file] if changes is not None else [])


@pytest.mark.parametrize("text", ["method: grid\nmethod: grid", "method: [", "description: no\nname: x"])
def test_broken_or_ambiguous_yaml(text, tmp_path):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"twice|not valid YAML|put them in quotes"):
        load_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "4"], "--seeds 4: `parameters.run.seed` has 2"),
        (["--seeds", "0"], "expected at least 1"),
        (["--trials", "0"], "expected at least 1"),
        (["--study", "../x"], "expected the name of a folder"),
    ],
)
def test_mistakes_on_the_command_line(options, message, tiny, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content_of(tiny, parameters={"run.seed": {"values": [0, 1]}})))
    with pytest.raises(SystemExit) as stop:
        main([str(file), "--output", str(tmp_path / "outputs"), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# --- running it --------------------------------------------------------------------------------------------------


def folder_of(job):
    """The run folder that a job's script would make, and its recipe."""
    words = job.command
    line = parse_command_line(words[words.index(job.program) + 1 :])
    recipe = load_recipe(line.recipe, line.overrides)
    return Path(recipe.run.output) / recipe.task / Path(job.program).stem / recipe.run.name, recipe


def measured(recipe):
    """A landscape with its best J at beta 0.2: of the recipe's own beta, 0.05."""
    beta, seed = recipe.objective.beta, recipe.run.seed
    kl = 1 / beta + seed
    return {"reward": 5 - (math.log(beta / 0.2)) ** 2 + 0.05 * kl + 0.1 * seed**2, "kl": kl, "objective": 0.0, "gold": beta}


class Script:
    """A runner that leaves in a run's folder what a script would; `before` and `after` the summary something may happen."""

    def __init__(self, before=None, after=None):
        self.before, self.after, self.ran = before, after, []
        self.lock = threading.Lock()

    def __call__(self, job, stop):
        folder, recipe = folder_of(job)
        with self.lock:
            self.ran.append((folder.name, recipe.objective.beta, recipe.run.seed, recipe.run.resume))
        if recipe.run.resume is None:
            folder.mkdir(parents=True)
            (folder / "recipe.resolved.yaml").write_text(recipe.to_yaml())
        if self.before is not None and (code := self.before(self, job, folder, recipe, stop)):
            return code
        summary = {"seconds": 1.5, "policy": measured(recipe), "reference": {"reward": 0.5 + recipe.run.seed}}
        (folder / "summary.json").write_text(json.dumps(summary))
        if self.after is not None:
            self.after(self)
        return 0


def essence(results):
    """Results without where they are."""
    return [{key: value for key, value in row.items() if key != "runs"} for row in results["trials"]]


def test_a_grid_covers_each_point_once_and_ends_with_table_files_and_a_command(write, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_recipes.sweeps.results._save_frontier", _save_frontier)
    runner = Script()
    sweep = write(parameters={"objective.beta": {"values": [0.1, 0.2, 0.4]}, "lora.r": {"values": [2, 4]}})
    results = run_sweep(sweep, runner)
    assert [row[1] for row in runner.ran] == [0.1, 0.1, 0.2, 0.2, 0.4, 0.4]
    assert [row[0] for row in runner.ran] == [f"beta-trial-{n}" for n in range(6)]
    assert [row["rank"] for row in results["trials"]] == [1, 2, 3, 4, 5, 6]
    assert [row["parameters"]["objective.beta"] for row in results["trials"][:2]] == [0.2, 0.2]
    assert results["trials"][0]["value"]["mean"] == pytest.approx(5.0)  # at the recipe's beta, 0.05, and not at 0.2

    out = capsys.readouterr().out
    assert "J at beta 0.05" in out
    assert out.count("trial ") >= 6
    best = next(line for line in out.splitlines() if line.startswith("the best: ")).removeprefix("the best: ")
    assert best == results["best"]["command"]
    words = shlex.split(best)
    line = parse_command_line(words[words.index("scripts/ppo.py") + 1 :])
    recipe = load_recipe(line.recipe, line.overrides)
    assert (recipe.objective.beta, recipe.lora.r, recipe.run.name) == (0.2, results["trials"][0]["parameters"]["lora.r"], None)

    assert json.loads((sweep.folder / "results.json").read_text()) == results
    markdown = (sweep.folder / "results.md").read_text()
    assert best in markdown
    assert markdown.count("| finished |") == 6
    assert (sweep.folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    run_sweep(sweep, Script(before=lambda *_: pytest.fail("it was run already")))


def test_each_job_is_of_one_wandb_group_offline_and_named(write, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    jobs = []

    def look(script, job, folder, recipe, stop):
        jobs.append((job.environment["WANDB_MODE"], recipe.run.group, recipe.run.name, recipe.run.project))

    run_sweep(write(seeds=2, project="mine", parameters={"objective.beta": {"values": [0.1]}}), Script(before=look))
    assert jobs == [("offline", "beta", f"beta-trial-0-seed-{seed}", "mine") for seed in (0, 1)]


def test_wandb_gets_the_group(tiny, tmp_path, monkeypatch):
    import wandb

    from rlhf_recipes.runs.folder import Run

    groups = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **settings: groups.append(settings["group"]))
    for overrides in ({}, {"run.group": "beta"}):
        settings = {"run.tracker": "wandb", "run.output": str(tmp_path), "run.name": str(len(groups))}
        Run.prepare(load_recipe(tiny, overrides | settings), "ppo").start()
    assert groups == ["tiny", "beta"]


def test_seeds_are_judged_by_their_mean_with_students_interval(write):
    runner = Script()
    results = run_sweep(write(parameters={"objective.beta": {"values": [0.2]}, "run.seed": {"values": [0, 1, 2]}}), runner)
    assert [row[2] for row in runner.ran] == [0, 1, 2]
    [row] = results["trials"]
    # J at 0.05 is 5 + 0.1 seed^2: 5.0, 5.1, 5.4; t of 2 degrees of freedom at 0.975 is 4.302653
    half = 4.302653 * statistics.stdev([5.0, 5.1, 5.4]) / math.sqrt(3)
    assert row["value"]["mean"] == pytest.approx(15.5 / 3)
    assert row["value"]["low"] == pytest.approx(15.5 / 3 - half, rel=1e-6)
    assert row["value"]["high"] == pytest.approx(15.5 / 3 + half, rel=1e-6)
    assert row["metrics"]["kl"]["mean"] == pytest.approx(6.0)
    assert row["seconds"] == 4.5
    assert interval([3.0]) == {"mean": 3.0}


class Death(Exception):  # noqa: N818
    """A worker's."""


METHODS = {
    "grid": {"parameters": {"objective.beta": {"values": [0.1, 0.2, 0.3, 0.4]}}},
    "random": {"method": "random", "trials": 4, "parameters": {"objective.beta": {"min": 0.1, "max": 0.5}}},
    "bayes": {
        "method": "bayes",
        "trials": 13,
        "parameters": {"objective.beta": {"min": 0.1, "max": 0.5}},
    },  # 10 of them at random
}


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_whose_workers_die_ends_as_an_undisturbed_one(method, write, tmp_path):
    """They die before a run has a folder, in the middle of a run, and between its end and the study's knowing of it."""
    undisturbed = run_sweep(write(study="calm", **METHODS[method]), Script())
    sweep, deaths = write(study="wild", **METHODS[method]), []

    def before(script, job, folder, recipe, stop):
        if len(script.ran) == {0: 2, 2: 1}.get(len(deaths)):
            if not deaths:
                (folder / "recipe.resolved.yaml").unlink()
                folder.rmdir()
            deaths.append("before")
            raise Death

    def after(script):
        if len(deaths) == 1 and len(script.ran) == 2:
            deaths.append("after")
            raise Death

    ran = []
    for _ in range(3):
        runner = Script(before, after)
        with pytest.raises(Death):
            run_sweep(sweep, runner)
        ran += runner.ran
    runner = Script()
    results = run_sweep(sweep, runner)
    ran += runner.ran
    assert essence(results) == essence(undisturbed)
    assert len({beta for _, beta, _, _ in ran}) == len(undisturbed["trials"])
    assert [bool(resume) for *_, resume in runner.ran][:1] == [True]  # it went on with the run that was cut short
    assert sum(bool(resume) for *_, resume in ran) == 1


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from rlhf_recipes.sweeps.file import load_sweep
from rlhf_recipes.sweeps.worker import run_sweep
from tests.test_sweep import Script

def before(script, job, folder, recipe, stop):
    if len(script.ran) == 2:
        print("now", flush=True)
        time.sleep(60)

run_sweep(load_sweep(Path({file!r}), study="killed", output={output!r}), Script(before))
"""


def test_kill_minus_9_loses_and_repeats_nothing(write, tmp_path):
    sweep = write(study="killed")
    code = KILLED.format(root=str(ROOT), file=str(sweep.file), output=sweep.output)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert any(line.strip() == "now" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    runner = Script()
    results = run_sweep(sweep, runner)
    assert [(name, bool(resume)) for name, _, _, resume in runner.ran] == [("killed-trial-1", True), ("killed-trial-2", False)]
    assert essence(results) == essence(run_sweep(write(study="calm"), Script()))


def test_a_trial_whose_process_outlived_its_worker_is_waited_for(write, capsys):
    """The process holds the trial's lock; here a descriptor of another thread's stands for it."""
    sweep = write()

    def die(script, job, folder, recipe, stop):
        raise Death

    with pytest.raises(Death):
        run_sweep(sweep, Script(die))
    held = os.open(sweep.folder / ".locks" / "trial-0", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    runner = Script()

    def outlive():
        while len(runner.ran) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(runner.ran) == 2
        os.close(held)

    thread = threading.Thread(target=outlive)
    thread.start()
    run_sweep(sweep, runner)
    thread.join()
    assert [row[0] for row in runner.ran] == ["beta-trial-1", "beta-trial-2", "beta-trial-0"]
    assert "waiting for trial 0" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["grid", "random"])
def test_workers_share_a_study_without_repeating_a_point(method, write):
    changes = METHODS[method] | (
        {"parameters": {"objective.beta": {"values": [0.1 + i / 50 for i in range(8)]}}} if method == "grid" else {"trials": 8}
    )
    sweep, results = write(**changes), []
    runner = Script(before=lambda *_: time.sleep(0.05))
    with interrupts.handled():
        threads = [threading.Thread(target=lambda: results.append(Worker(sweep, runner).run())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(runner.ran) == len({beta for _, beta, _, _ in runner.ran}) == 8
    assert results[0] == results[1] == results[2]
    assert len(results[0]["trials"]) == 8
    assert essence(results[0]) == essence(run_sweep(write(study="alone", **changes), Script()))


def test_failed_trials_are_counted_with_their_reason(write, capsys):
    def fail(script, job, folder, recipe, stop):
        if recipe.objective.beta == 0.2:
            job.log.write_text("step 1\nerror: the disk is full\nTraceback (most recent call last):\n" + LAUNCHER)
            return 1

    results = run_sweep(write(), Script(fail))
    assert [(row["state"], row["reason"]) for row in results["trials"]] == [("finished", None)] * 2 + [
        ("failed", "error: the disk is full")
    ]
    out = capsys.readouterr().out
    assert "trial 1: objective.beta 0.2: failed: error: the disk is full" in out
    run_sweep(write(), Script(before=lambda *_: pytest.fail("a failed trial is not run again")))


def test_a_sweep_in_which_nothing_finished_exits_with_1(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_recipes.sweeps.worker.run_sweep", lambda sweep: {"best": None})
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content_of(tiny)))
    with pytest.raises(SystemExit) as stop:
        main([str(file), "--output", str(tmp_path / "outputs")])
    assert stop.value.code == 1
    assert "no trial was finished" in capsys.readouterr().err


def test_values_that_are_not_finite_or_missing_fail_the_trial(write):
    def odd(script, job, folder, recipe, stop):
        policy = {0.1: {"reward": math.nan, "kl": 1.0}, 0.2: {"reward": 1.0}}.get(recipe.objective.beta)
        if policy:
            (folder / "summary.json").write_text(json.dumps({"seconds": 1, "policy": policy, "reference": {}}))
            return 1

    results = run_sweep(write(), Script(odd))
    reasons = [row["reason"] for row in results["trials"]]
    assert reasons[0] is None
    assert reasons[1] == "its J at beta 0.05 is nan"
    assert reasons[2].endswith("summary.json has no 'kl' of the policy")


def test_a_run_that_cannot_go_on_fails_and_its_point_is_run_anew(write, capsys):
    sweep = write(parameters={"objective.beta": {"values": [0.1, 0.2]}})

    def die(script, job, folder, recipe, stop):
        raise Death

    with pytest.raises(Death):
        run_sweep(sweep, Script(die))

    def refuse(script, job, folder, recipe, stop):
        if recipe.run.resume:
            job.log.write_text("error: --resume: it was written by 2 processes\n")
            return 2

    runner = Script(refuse)
    results = run_sweep(sweep, runner)
    assert [(row["trial"], row["state"], row["parameters"]["objective.beta"]) for row in results["trials"]] == [
        (1, "finished", 0.2), (2, "finished", 0.1), (0, "failed", 0.1),
    ]  # fmt: skip
    assert "its point is queued again" in capsys.readouterr().out


def test_a_finished_run_is_not_run_again_and_another_recipes_is_refused(write, tmp_path):
    sweep = write()
    first = run_sweep(sweep, Script())
    (sweep.folder / "study.db").unlink()
    again = run_sweep(sweep, Script(before=lambda *_: pytest.fail("it has a summary")))
    assert essence(again) == essence(first)
    (sweep.folder / "study.db").unlink()
    with pytest.raises(
        RecipeError, match=r"beta-trial-0: it is a run of another recipe than this trial's; choose another --study"
    ):
        run_sweep(write(parameters={"objective.beta": {"values": [0.4]}}), Script())


def test_a_study_of_another_sweep_is_refused(write):
    run_sweep(write(), Script())
    with pytest.raises(RecipeError, match=r"with another sweep: seeds was \[0\] and is \[0, 1\]; choose another --study"):
        run_sweep(write(seeds=2), Script())
    with pytest.raises(RecipeError, match=r"`objective.beta` was CategoricalDistribution\(choices=\(0.1, 0.2, 0.3\)\) and is"):
        run_sweep(write(parameters={"objective.beta": {"values": [0.1]}}), Script())
    with pytest.raises(RecipeError, match=r"the recipe's `lora` was .*'r': 4.* and is .*'r': 8"):
        run_sweep(write(parameters={"objective.beta": {"values": [0.1, 0.2, 0.3]}, "lora.r": {"value": 8}}), Script())
    (write().folder / "study.db").write_text("something else")
    with pytest.raises(RecipeError, match=r"study.db: not a study's SQLite file"):
        run_sweep(write(), Script())


def test_more_trials_go_on_with_the_same_study(write):
    random = {"method": "random", "parameters": {"objective.beta": {"min": 0.1, "max": 0.5}}}
    run_sweep(write(trials=2, **random), Script())
    runner = Script()
    more = run_sweep(write(trials=5, **random), runner)
    assert len(runner.ran) == 3
    assert essence(more) == essence(run_sweep(write(trials=5, study="at-once", **random), Script()))
    grid = {"parameters": {"objective.beta": {"values": [0.1, 0.2, 0.3]}}}
    assert len(run_sweep(write(trials=2, study="grid", **grid), Script())["trials"]) == 2
    assert len(run_sweep(write(study="grid", **grid), Script())["trials"]) == 3


def test_bad_points_are_pruned_by_what_they_measure_while_they_train(write):
    """Four evaluations of a J that grows with beta; the pruned process is asked to end and the first seed decides for all."""
    stopped = []

    def train(script, job, folder, recipe, stop):
        with (folder / "metrics.jsonl").open("a") as file:
            for step in range(1, 5):
                row = {"step": step, "eval/objective": step * recipe.lora.alpha, "eval/reward_se": 0.1}
                file.write(json.dumps(row) + "\n")
                file.flush()
                if stop():
                    stopped.append(recipe.lora.alpha)
                    return 75
            file.write('{"eval/objective": 5}\n{"half a li')

    parameters = {
        "ppo.eval_strategy": {"value": "steps"},
        "ppo.eval_steps": {"value": 1},
        "lora.alpha": {"values": [8, 7, 6, 5, 4, 3]},
    }
    sweep = write(early_terminate={"type": "hyperband", "max_iter": 4, "s": 2, "eta": 2}, parameters=parameters, seeds=2)
    runner = Script(train)
    results = run_sweep(sweep, runner)
    pruned = [row for row in results["trials"] if row["state"] == "pruned"]
    assert [row["parameters"]["lora.alpha"] for row in pruned] == stopped
    assert pruned  # Optuna spreads the trials over three brackets, by their numbers, which begin at evaluation 1, 2 and 4
    assert all(re.match(r"at evaluation [12], with J \d", row["reason"]) for row in pruned)  # the fourth is the last
    assert {seed for *_, seed, _ in runner.ran} == {0, 1}
    assert not any(seed == 1 and name.split("-")[2] == str(row["trial"]) for name, _, seed, _ in runner.ran for row in pruned)
    assert watched_values(Path(sweep.output) / "tiny" / "ppo" / "beta-trial-0-seed-0", sweep) == [8, 16, 24, 32]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_trial_and_leaves_a_sweep_that_goes_on(number, tiny, write, monkeypatch, capsys):
    def interrupt(script, job, folder, recipe, stop):
        if len(script.ran) == 2:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop()
            return 75

    sweep = write()
    monkeypatch.setattr("rlhf_recipes.sweeps.worker.run_sweep", lambda loaded: run_sweep(loaded, Script(interrupt)))
    with pytest.raises(SystemExit) as stop:
        main([str(sweep.file), "--output", sweep.output])
    assert stop.value.code == 75
    assert "sweep: interrupted; the same command resumes the sweep" in capsys.readouterr().err
    study = optuna.load_study(study_name="beta", storage=f"sqlite:///{sweep.folder / 'study.db'}")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING]
    runner = Script()
    assert [row["state"] for row in run_sweep(sweep, runner)["trials"]] == ["finished"] * 3
    assert [bool(resume) for *_, resume in runner.ran] == [True, False]


# --- processes ---------------------------------------------------------------------------------------------------

KILL = "died with <Signals.SIGKILL: 9>"
LAUNCHER = "subprocess.CalledProcessError: Command '['python', 'scripts/ppo.py']' returned non-zero exit status 2.\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\nerror: `lora.r` is odd\nTraceback\n" + LAUNCHER, "error: `lora.r` is odd"),
        ("Traceback\n  File x\nValueError: no\nTraceback\n" + LAUNCHER, "ValueError: no"),
        ("torch.OutOfMemoryError: CUDA\n" + LAUNCHER, "torch.OutOfMemoryError: CUDA"),
        ("10%|#\r20%|##\n" + LAUNCHER.replace("returned non-zero exit status 2", KILL), KILL),
        ("1\r2\n", "2"),
        ("", "exit code 1"),
    ],
)  # fmt: skip
def test_last_words(text, reason, tmp_path):
    log = tmp_path / "log"
    log.write_text("error: of an earlier start\n" + text)
    assert last_words(log, len("error: of an earlier start\n"), 1) == reason


def test_sigterm_reaches_the_script_once_and_not_its_launcher(tmp_path):
    """As `accelerate launch` runs one process: a child whose parent does not pass signals on."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import signal, sys, time
        got = []
        signal.signal(signal.SIGTERM, lambda *_: got.append(1))
        print("ready", flush=True)
        while not got: time.sleep(0.01)
        time.sleep(0.1)
        sys.exit(70 + len(got))
    """)
    )
    (tmp_path / "launcher.py").write_text(
        "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-u', *sys.argv[1:]]).returncode)"
    )
    command = [sys.executable, "launcher.py", "script.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True) as process:
        assert process.stdout.readline() == "ready\n"
        terminate(process.pid, "script.py")
        assert process.wait(10) == 71
    terminate(process.pid, "script.py")  # one that has ended


def test_a_real_trial_by_accelerate_launch(tiny, tmp_path, capsys):
    """One of two points; the other is a mistake that only the run finds."""
    parameters = {"ppo.total_episodes": {"value": 8}, "reward.on_error": {"value": "stop"}, "reward.adapter": {"value": "null"},
                  "reward.function": {"values": ["wordy", "nowhere"]}, "evaluate.prompts": {"value": 4}}  # fmt: skip
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content_of(tiny, parameters=parameters)))
    results = main([str(file), "--output", str(tmp_path / "outputs")])
    assert [row["state"] for row in results["trials"]] == ["finished", "failed"]
    assert re.match(r"error: .*nowhere", results["trials"][1]["reason"])
    [run] = results["trials"][0]["runs"]
    summary = json.loads((Path(run["run"]) / "summary.json").read_text())
    assert run["policy"] == summary["policy"]
    assert results["trials"][0]["value"]["mean"] == summary["policy"]["objective"]
    resolved = load_recipe(Path(run["run"]) / "recipe.resolved.yaml")
    assert (resolved.run.group, resolved.run.name, resolved.reward.function) == ("beta", "beta-trial-0", "wordy")
    assert results["best"]["command"].endswith("--reward.function wordy")
    assert not (tmp_path / "outputs" / "tiny" / "sweep" / "beta" / "frontier.png").exists()  # beta was not varied
