"""`--resume`: which run resumes, from which checkpoint, and whether it still is the run it was.

Nothing heavy is imported here: a run that cannot resume is refused at once.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.sections import LATEST, Recipe, followed
from rlhf_recipes.recipe.stages import STAGES, TRAINED
from rlhf_recipes.runs.checkpoints import RESUME, checkpoints_of, damage, step_of
from rlhf_recipes.runs.fingerprint import RESOLVED, RUN, SUMMARY, differences, fingerprint, without_code

# What may change while a run is interrupted: it has no say in the weights.
_FREE_SECTIONS = ("evaluate", "watch", "report", "merge", "run")
_FREE_KEYS = (
    "logging_steps", "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps", "eval_on_start",
    "metric_for_best_model", "load_best_model_at_end", "dataloader_num_workers",
)  # fmt: skip


def resumed_recipe(recipe: Recipe, stage: str, overrides: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """The recipe that the run was started with, `run.resume` being the checkpoint (without any: the run) to resume from.

    Args:
        recipe: as the command line gives it; its `run.resume` says which run.
        overrides: those of the command line, applied to the run's own recipe.

    Returns:
        the recipe, and what the user should know: changed keys, skipped checkpoints.

    Raises:
        RecipeError: there is no such run, it is finished, or it would not be the same run.
    """
    if not STAGES[stage].resumable:
        raise RecipeError(f"--resume: {stage} writes nothing before its end, so there is nothing to resume; start it again")
    run, chosen = _find(str(recipe.run.resume), recipe.runs / stage)
    then = load_recipe(run / RESOLVED)
    now = load_recipe(run / RESOLVED, {key: value for key, value in overrides.items() if not key.startswith("run.")})
    notes = _compare(then, now, recipe, stage, run)
    checkpoint, damaged = _pick(run, chosen)
    notes += [f"{folder} is left out: {reason}" for folder, reason in damaged]
    if checkpoint is not None:
        before, processes = _processes(checkpoint), int(os.environ.get("WORLD_SIZE", "1"))
        if before != processes:
            raise RecipeError(
                f"--resume: {checkpoint} was written by {before} processes and this job has {processes}: batches, data order "
                f"and random states would be others; launch with {before}"
            )
        notes.append(f"resuming from {checkpoint}")
    elif STAGES[stage].trains:  # of another one what it has written is its record
        notes.append(f"{run} has no checkpoint yet: starting from its beginning")
    settings = now.run.model_copy(update={"resume": str(checkpoint or run), "name": run.name, "output": recipe.run.output})
    return dataclasses.replace(now, run=settings), notes


def _find(asked: str, runs: Path) -> tuple[Path, Path | None]:
    """The run that `run.resume` asks for, and the checkpoint if it names one.

    Args:
        runs: the folder of the stage's runs.
    """
    stage, given = runs.name, runs / LATEST if asked == LATEST else Path(asked)
    path = followed(given).resolve()
    if not path.is_dir():
        there = sorted(folder.name for folder in runs.glob("*") if (folder / RESOLVED).is_file() and not folder.is_symlink())
        known = f"runs of {stage} in {runs}: {', '.join(there)}" if there else f"there is no run of {stage} in {runs}"
        raise RecipeError(f"--resume: {given}: no such run; {known}")
    run, chosen = (path.parent, path) if path in checkpoints_of(path.parent) else (path, None)
    if not (run / RESOLVED).is_file():
        raise RecipeError(f"--resume: {run} is not a run's folder: it has no {RESOLVED}")
    if (run / SUMMARY).is_file():
        raise RecipeError(f"--resume: {run} is finished: it has a {SUMMARY}")
    of = read_run(run).get("stage", stage)
    if of != stage:
        raise RecipeError(f"--resume: {run} is a run of {of}, not of {stage}; scripts/{of}.py resumes it")
    return run, chosen


def read_run(run: Path) -> dict[str, Any]:
    """What run.json holds; {} without one."""
    file = run / RUN
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        raise RecipeError(f"{file}: not JSON; restore it, or remove it to resume without what it says") from None


def is_trial(run: Path) -> bool:
    """Whether a run is one of a sweep's; in runs of before that was recorded, its name says so."""
    about = read_run(run)
    if "trial" in about:
        return bool(about["trial"])
    return re.search(r"-trial-\d+(-seed-\d+)?$", run.name) is not None


def newest_run(runs: Path) -> Path | None:
    """The run that finished last of those in a stage's folder, trials of sweeps aside; None without one."""
    finished = [file for file in runs.glob(f"*/{SUMMARY}") if file.parent.name != "latest" and not is_trial(file.parent)]
    newest = max(finished, key=lambda file: file.stat().st_mtime, default=None)
    return newest and newest.parent


def trials_of(runs: Path) -> list[Path]:
    """The finished trials of sweeps among the runs in a stage's folder."""
    return sorted(file.parent for file in runs.glob(f"*/{SUMMARY}") if file.parent.name != "latest" and is_trial(file.parent))


def task_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "task.py").read_bytes()).hexdigest()


def _compare(then: Recipe, now: Recipe, given: Recipe, stage: str, run: Path) -> list[str]:
    """Notes on what is other than it was; refuses what would make it another run."""
    before, after, here = _dotted(then), _dotted(now), _dotted(given)
    changed = [key for key in after if after[key] != before.get(key)]
    breaking = [key for key in changed if not _is_free(key, stage)]
    if breaking:
        listed = ", ".join(f"`{key}` {before.get(key)!r} -> {after[key]!r}" for key in breaking)
        raise RecipeError(f"--resume: {run} would be another run: {listed}; leave them out, or start a new run with them")
    notes = []
    if changed:
        notes.append("changed: " + ", ".join(f"`{key}` {before.get(key)!r} -> {after[key]!r}" for key in changed))
    elsewhere = [key for key in after if after[key] != here.get(key) and _is_of(key, stage) and not key.startswith("run.")]
    if elsewhere and given.folder == then.folder:
        values = ", ".join(f"`{key}` {after[key]!r}" for key in elsewhere)
        notes.append(f"the run keeps what it was started with, other than the recipe and command line now: {values}")
    about = read_run(run)
    maximised = about.get("fingerprint"), fingerprint(now, stage)
    other = differences(maximised[0], maximised[1], here="now")
    weights = differences(without_code(maximised[0]), without_code(maximised[1]), here="now")
    if weights:
        raise RecipeError(
            f"--resume: {run} would be another run: {'; '.join(weights.values())}; put back what it was started with, or "
            f"start a new run"
        )
    if other:  # a function that failed may have been mended
        notes.append(f"warning: {'; '.join(other.values())}: the run continues with the function as it is now")
    elif about.get("task") not in (None, task_hash(now.folder)):
        notes.append(f"warning: {now.folder / 'task.py'} has changed since the run was started")
    return notes


def _is_of(key: str, stage: str) -> bool:
    """Whether a stage reads a key: those of other stages' sections it does not."""
    section = key.split(".")[0]
    return section not in TRAINED or section == STAGES[stage].section


def _is_free(key: str, stage: str) -> bool:
    section, _, name = key.partition(".")
    return (section in _FREE_SECTIONS and key != "run.seed") or not _is_of(key, stage) or name in _FREE_KEYS


def _dotted(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as `section.key` -> value."""
    sections = {name: section for name, section in recipe.to_dict().items() if isinstance(section, dict)}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def _pick(run: Path, chosen: Path | None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and those newer than it with what is wrong with them."""
    damaged: list[tuple[Path, str]] = []
    whole = None
    for folder in checkpoints_of(run):
        reason = damage(folder)
        if reason is None:
            whole = folder
            break
        damaged.append((folder, reason))
    if chosen is None or chosen == whole:
        return whole, damaged
    reason = damage(chosen)
    newest = f"the newest whole one is {whole}" if whole else "the run has no whole one"
    if reason is not None:
        raise RecipeError(f"--resume: {chosen} is damaged: {reason}; {newest}")
    assert whole is not None
    raise RecipeError(
        f"--resume: {chosen} is not the newest: {whole} has {step_of(whole) - step_of(chosen)} steps more, which would be "
        f"lost; move that folder away first if they should be, or resume the run"
    )


def _processes(checkpoint: Path) -> int:
    return json.loads((checkpoint / RESUME).read_text(encoding="utf-8"))["processes"]
