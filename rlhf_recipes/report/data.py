"""What a report shows, read and checked: scripts/evaluate.py's measurements, and the curves of the runs behind them."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from rlhf_recipes.metrics import SMALL_EFFECTIVE_SIZE
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import LATEST, SECTIONS, Recipe, followed
from rlhf_recipes.recipe.stages import JUDGED
from rlhf_recipes.runs.fingerprint import describe_reward, differences, parts_of, recorded_fingerprint


@dataclass(frozen=True)
class Interval:
    """A mean over held-out prompts and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Estimate:
    """What an importance-sampling estimate rests on: whose samples, and how many effective ones a prompt."""

    effective_sample_size: float
    proposal: str

    @property
    def small(self) -> bool:
        return self.effective_sample_size < SMALL_EFFECTIVE_SIZE


@dataclass(frozen=True)
class Optimum(Estimate):
    """J* as `yardstick.estimate_optimum` estimates it; a bound where the sample is small."""

    objective: float


@dataclass(frozen=True)
class OptimalPoint(Estimate):
    """The optimum at one beta: reward, and KL in nats."""

    beta: float
    reward: float
    kl: float


@dataclass(frozen=True)
class BestOfN:
    n: int
    kl: float
    reward: float


@dataclass(frozen=True)
class Frontiers:
    optimal: list[OptimalPoint]
    best_of_n: list[BestOfN]


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json; see `yardstick.evaluation_of`."""

    beta: float
    prompts: int
    completions: int
    optimum: Optimum
    policies: dict[str, dict[str, Interval]]
    frontiers: Frontiers
    folders: dict[str, str]
    runs: dict[str, str] = field(default_factory=dict)
    judged_by: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Policy:
    """One row of the evaluation, with what its run folder says about its training; a model from elsewhere has none."""

    name: str
    kind: str  # a key of plots.STYLES
    metrics: dict[str, Interval]
    run: str = ""  # STAGE/RUN
    beta: float | None = None
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # `section.key` -> value, of the sections that matter to training
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # metric -> (episodes or steps, value)
    watched: list[dict[str, Any]] = field(default_factory=list)  # the held-out evaluations during training, in order
    findings: list[dict[str, str]] = field(default_factory=list)  # what diagnosis.py found in it


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows."""

    task: str
    folder: Path
    evaluation: Evaluation
    policies: list[Policy]
    sides: list[str]  # who has samples: the reference, then the policies in folders
    samples: list[dict[str, Any]]  # the rows of samples.jsonl
    judged_by: str  # the reward
    notes: list[str]  # what to know beside the numbers


def evaluation_folder(recipe: Recipe) -> Path:
    """`report.evaluation`, or the task's latest run of scripts/evaluate.py.

    Raises:
        RecipeError: there is none.
    """
    hint = f"run scripts/evaluate.py of {recipe.task} first"
    if recipe.report.evaluation is None:
        stage = Path(recipe.run.output) / recipe.task / "evaluate"
        folder = followed(stage / LATEST)
        if not (folder / "evaluation.json").is_file():
            raise RecipeError(f"no evaluation in {stage}: {hint}, or name one with `report.evaluation`")
    else:
        folder = Path(recipe.path(recipe.report.evaluation))
        if not folder.is_dir():
            raise RecipeError(f"`report.evaluation` {recipe.report.evaluation}: no such folder; {hint}")
        if not (folder / "evaluation.json").is_file():
            raise RecipeError(f"`report.evaluation` {recipe.report.evaluation}: it has no evaluation.json; {hint}")
    return folder.resolve()


def load_report_data(folder: Path, ours: dict[str, Any] | None = None) -> ReportData:
    """Reads one evaluate run's folder, and the run folders of the policies it judged.

    Args:
        ours: the fingerprint of the recipe whose report it is: an evaluation by another reward, beta or backbone is noted.

    Raises:
        RecipeError: a file is missing or is not what scripts/evaluate.py writes.
    """
    file = folder / "evaluation.json"
    try:
        evaluation = TypeAdapter(Evaluation).validate_python(_read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise RecipeError(f"{file}: not what scripts/evaluate.py writes: {where}: {first['msg']}; evaluate again") from None
    for name, metrics in evaluation.policies.items():
        if missing := {"reward", "kl", "objective"} - metrics.keys():
            raise RecipeError(f"{file}: policies.{name} has no {', '.join(sorted(missing))}; evaluate again")
    if not (folder / "samples.jsonl").is_file():
        raise RecipeError(f"{folder}: it has no samples.jsonl, so the evaluation did not finish; evaluate again")
    samples = _read_lines(folder / "samples.jsonl")
    sides = [name for name in ("reference", *evaluation.folders) if all(name in row for row in samples)]
    task = _read_summary(folder).get("task") or folder.parent.parent.name
    folders, runs = evaluation.folders, evaluation.runs
    policies = [
        _load_policy(name, metrics, folders.get(name), runs.get(name, ""), file)
        for name, metrics in evaluation.policies.items()
    ]
    judged_by = evaluation.judged_by or recorded_fingerprint(folder)
    reward, notes = parts_of(judged_by).get("reward"), list(evaluation.notes)
    if ours is not None:
        other = differences(judged_by, ours, here="the recipe now has").values()
        notes += [f"This evaluation was made for {'; '.join(other)}."] if other else []
    return ReportData(task, folder, evaluation, policies, sides, samples, describe_reward(reward) if reward else "", notes)


def _load_policy(name: str, metrics: dict[str, Interval], path: str | None, run: str, where: Path) -> Policy:
    if path is None:
        if name != "reference" and not re.fullmatch(r"best-of-\d+", name):
            raise RecipeError(f"{where}: `folders` does not say where {name} is; evaluate again")
        return Policy(name, "reference" if name == "reference" else "best-of-n", metrics)
    folder = Path(path)
    summary, resolved = _read_summary(folder), _read_resolved(folder)
    stage = summary.get("stage", folder.parent.name if resolved else None)
    kind = stage if stage in JUDGED else "other"
    settings = {
        f"{section}.{key}": value
        for section, keys in resolved.items()
        if isinstance(keys, dict) and section not in ("run", "evaluate", "report") and (section in SECTIONS or section == stage)
        for key, value in keys.items()
    }
    beta = settings.pop("objective.beta", None)
    return Policy(
        name,
        kind,
        metrics,
        run=run,
        beta=summary.get("beta", beta) if kind in JUDGED else None,
        seed=summary.get("seed", (resolved.get("run") or {}).get("seed")),
        settings=settings,
        curves=_read_curves(folder, JUDGED[kind].curves if kind in JUDGED else ()),
        watched=[row for row in _read_metrics(folder) if {"eval/reward_se", "eval/kl"} <= row.keys()],
        findings=summary.get("findings", []),
    )


def _read_curves(folder: Path, metrics: Iterable[str]) -> dict[str, list[tuple[float, float]]]:
    """Metric -> its points; x is `episode` where the trainer counts them, else `step`."""
    rows = _read_metrics(folder)
    curves = {name: [(row.get("episode", row.get("step", 0)), row[name]) for row in rows if name in row] for name in metrics}
    return {name: points for name, points in curves.items() if points}


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    return _read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []


def _read_summary(folder: Path) -> dict[str, Any]:
    """summary.json where one of our scripts wrote it, else nothing."""
    file = folder / "summary.json"
    content = _read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) and content.get("stage") else {}


def _read_resolved(folder: Path) -> dict[str, Any]:
    """recipe.resolved.yaml as it is: an older recipe need not pass today's checks."""
    file = folder / "recipe.resolved.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from None
    return content if isinstance(content, dict) else {}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also a UnicodeDecodeError
        raise RecipeError(f"{file}: not valid JSON: {error}") from None


def _read_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{file}, line {number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise RecipeError(f"{file}, line {number}: expected an object, got {type(row).__name__}")
            rows.append(row)
    return rows
