"""A sweep without wandb's server: an Optuna study in SQLite, one subprocess for each run, any number of workers.

A worker that dies leaves its trial RUNNING in the study and releases the trial's lock, so another worker, or the same command
started again, finds it and resumes its run with --resume. The trial's own process holds the lock too: a process that outlived
its worker is waited for.
"""

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from rlhf_recipes import interrupts
from rlhf_recipes.process import progress_bar
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.recipe.stages import TRAINED
from rlhf_recipes.runs.fingerprint import RESOLVED, SUMMARY
from rlhf_recipes.sweeps.file import Sweep, search_path, text_of
from rlhf_recipes.sweeps.job import POLL, FailedError, Job, PrunedError, Runner, last_words, run_process, watched_values
from rlhf_recipes.sweeps.results import describe, print_results, results_of, row_of, write_results


class Worker:
    """Runs the points of a sweep that no other worker runs, one after another, until none is left."""

    def __init__(self, sweep: Sweep, runner: Runner = run_process) -> None:
        self.sweep = sweep
        self.runner = runner
        for name in ("logs", ".locks"):
            (sweep.folder / name).mkdir(parents=True, exist_ok=True)
        with self._alone():
            self.study = self._open()

    def run(self) -> dict[str, Any]:
        """Returns what results.json holds.

        Raises:
            Interrupted: by a signal; the study can be resumed.
        """
        waiting = False
        total = len(self._points()) if self.sweep.method == "grid" else self.sweep.run_cap
        with progress_bar(total=total, initial=self._ended(), desc=self.sweep.name, unit="trial") as bar:
            while True:
                bar.update(self._ended() - bar.n)
                if interrupts.requested():
                    raise interrupts.Interrupted("interrupted; the same command resumes the sweep")
                taken = self._take()
                if taken is not None:
                    trial, lock = taken
                    try:
                        self._run_trial(trial, lock)
                    finally:
                        os.close(lock)
                    self._say(describe(self.sweep, row_of(self.sweep, self._frozen(trial))))
                elif busy := [t.number for t in self._trials(TrialState.RUNNING)]:
                    if not waiting:
                        self._say(f"waiting for trial {', '.join(map(str, busy))}, which other processes are running")
                    waiting = True
                    time.sleep(POLL)
                else:
                    break
            bar.update(self._ended() - bar.n)
        results = results_of(self.sweep, self.study.get_trials(deepcopy=False))
        write_results(self.sweep, results)
        return results

    # --- the study -----------------------------------------------------------------------------------------------

    def _open(self) -> optuna.Study:
        """Creates the study, or opens it.

        Raises:
            RecipeError: it belongs to another sweep.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sweep, file = self.sweep, self.sweep.folder / "study.db"
        if file.is_file() and file.stat().st_size and not file.read_bytes().startswith(b"SQLite format 3\0"):
            raise RecipeError(f"{file}: not a study's SQLite file; move it away, or choose another --study")
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if sweep.pruning is not None:
            pruner = optuna.pruners.HyperbandPruner(
                sweep.pruning.min_resource, sweep.pruning.max_resource, sweep.pruning.reduction_factor
            )
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}}),
            sampler=sampler_of(sweep.method, 0),
            pruner=pruner,
            study_name=sweep.name,
            direction="maximize" if sweep.maximize else "minimize",
            load_if_exists=True,
        )
        identity = self._identity()
        before = study.user_attrs.get("sweep", identity)
        if changed := [key for key in before | identity if before.get(key) != identity.get(key)]:
            listed = ", ".join(f"{key} was {before.get(key)} and is {identity.get(key)}" for key in changed)
            raise RecipeError(f"{file}: the study was started with another sweep: {listed}; choose another --study")
        study.set_user_attr("sweep", identity)
        return study

    def _identity(self) -> dict[str, Any]:
        """What must not change when a study is resumed, as JSON returns it."""
        sweep = self.sweep
        read = {name: value for name, value in sweep.recipe.to_dict().items() if name not in {"run", *TRAINED} - {sweep.stage}}
        identity = {
            "method": sweep.method, "metric": sweep.metric, "maximize": sweep.maximize, "program": sweep.program,
            "seeds": sweep.seeds, "early_terminate": str(sweep.pruning),
            **{f"`{name}`": str(distribution) for name, distribution in sweep.space.items()},
            **{f"the recipe's `{name}`": value for name, value in read.items()},
        }  # fmt: skip
        return json.loads(json.dumps(identity))

    def _points(self) -> list[dict[str, Any]]:
        return self.sweep.grid()[: self.sweep.run_cap]

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _take(self) -> tuple[Trial, int] | None:
        """A trial to run and its lock, held: one whose worker died, else the next one; None where there is neither.

        A grid's points are in the study from the start, in order. Optuna's GridSampler would hand out a running point again
        once all have started, and does not work with ask and tell.
        """
        with self._alone():
            for frozen in self._trials(TrialState.RUNNING):
                lock = self._lock(frozen.number)
                if lock is None:
                    continue
                if self.study.get_trials(deepcopy=False)[frozen.number].state != TrialState.RUNNING:  # it ended meanwhile
                    os.close(lock)
                    continue
                self._say(f"trial {frozen.number}: resuming its interrupted run")
                return self._suggest(Trial(self.study, frozen._trial_id)), lock
            if self.sweep.method == "grid":
                self._queue_grid()
            while self._trials(TrialState.WAITING) or not self._all_drawn():
                trial = self.study.ask()
                lock = self._lock(trial.number)
                if lock is not None:  # else a process of an earlier study still runs under its number
                    return self._suggest(trial), lock
            return None

    def _all_drawn(self) -> bool:
        counted = sum("again" not in trial.user_attrs for trial in self._trials())
        return self.sweep.method == "grid" or counted >= (self.sweep.run_cap or 0)

    def _queue_grid(self) -> None:
        """Adds the points that are missing from the study: all of them at first, the rest where that was interrupted."""
        there = {_key(t.system_attrs.get("fixed_params", t.params)) for t in self._trials()}
        for point in self._points():
            if _key(point) not in there:
                self.study.enqueue_trial(point)

    def _suggest(self, trial: Trial) -> Trial:
        """Draws the trial's point with a generator seeded by its number: a resumed study draws as an uninterrupted one."""
        self.study.sampler = sampler_of(self.sweep.method, trial.number)
        for name, distribution in self.sweep.space.items():
            _suggest(trial, name, distribution)
        return trial

    # --- one trial -----------------------------------------------------------------------------------------------

    def _run_trial(self, trial: Trial, lock: int) -> None:
        """Runs a point with every seed and tells the study the outcome.

        Raises:
            Interrupted: the trial is left RUNNING.
        """
        try:
            runs = [self._run_seed(trial, seed, lock) for seed in self.sweep.seeds]
        except PrunedError:
            self.study.tell(trial, state=TrialState.PRUNED)
        except FailedError as failure:
            trial.set_user_attr("reason", str(failure))
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("runs", runs)
            self.study.tell(trial, fmean(run["value"] for run in runs))

    def _run_seed(self, trial: Trial, seed: int, lock: int) -> dict[str, Any]:
        """One run: {seed, run, value, seconds, policy, reference}, the last three of its summary.

        Raises:
            Interrupted, PrunedError, FailedError
        """
        sweep = self.sweep
        name = sweep.run_name(trial.number, seed)
        folder = Path(sweep.output) / sweep.recipe.task / sweep.stage / name
        resumed = folder.is_dir()
        if resumed:
            self._check_same(folder, sweep.recipe_of(trial.params, seed))
        if not (folder / SUMMARY).is_file():
            words = sweep.words(trial.params, seed, name=name, group=sweep.name, trial="true")
            command = [*words, f"--resume={folder}"] if resumed else words
            log = sweep.folder / "logs" / f"{name}.log"
            start = log.stat().st_size if log.is_file() else 0
            environment = {**os.environ, "PATH": search_path()}
            environment.setdefault("WANDB_MODE", "offline")
            watch = _Watch(self, trial, folder, first=seed == sweep.seeds[0])
            code = self.runner(Job(command, environment, sweep.program, log, lock), watch.stop)
            if not (folder / SUMMARY).is_file():
                if watch.pruned:
                    raise PrunedError
                if interrupts.requested():
                    raise interrupts.Interrupted("interrupted; the same command resumes the sweep")
                reason = last_words(log, start, code)
                if resumed:
                    self._queue_again(trial, reason)
                raise FailedError(f"seed {seed}: {reason}" if len(sweep.seeds) > 1 else reason)
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        try:
            value = sweep.value(summary["policy"])
        except KeyError as missing:
            raise FailedError(f"{folder / SUMMARY} has no {missing} of the policy") from None
        if not math.isfinite(value):
            raise FailedError(f"its {sweep.title} is {value}")
        kept = {key: summary[key] for key in ("seconds", "policy", "reference")}
        return {"seed": seed, "run": str(folder), "value": value, **kept}

    def _check_same(self, folder: Path, now: Recipe) -> None:
        """Checks that the run folder of this name belongs to this very point."""
        if not (folder / RESOLVED).is_file() or _essence(load_recipe(folder / RESOLVED)) != _essence(now):
            raise RecipeError(f"{folder}: it is a run of another recipe than this trial's; choose another --study")

    def _queue_again(self, trial: Trial, reason: str) -> None:
        """Queues the point of a run that could not be resumed as another trial."""
        if "of" in trial.user_attrs:  # once is enough
            return
        with self._alone():
            if not any(t.user_attrs.get("of") == trial.number for t in self._trials()):
                self.study.enqueue_trial(trial.params, user_attrs={"of": trial.number})
            trial.set_user_attr("again", True)
        self._say(f"trial {trial.number}: its run cannot be resumed, so its point is queued again: {reason}")

    # --- helpers -------------------------------------------------------------------------------------------------

    def _ended(self) -> int:
        return sum(t.state.is_finished() and "again" not in t.user_attrs for t in self._trials())

    def _say(self, line: str) -> None:
        tqdm.write(line)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While this lasts, no other worker takes a trial."""
        descriptor = os.open(self.sweep.folder / ".locks" / "study", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, number: int) -> int | None:
        """The trial's lock, or None where another process holds it. It lasts until every copy of the descriptor is closed."""
        descriptor = os.open(self.sweep.folder / ".locks" / f"trial-{number}", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor


class _Watch:
    """Follows a run while it trains: reports its held-out metric to the study, and says when it must stop."""

    def __init__(self, worker: Worker, trial: Trial, folder: Path, first: bool) -> None:
        self.worker, self.trial, self.folder = worker, trial, folder
        self.judged = first and worker.sweep.pruning is not None  # a point's first seed decides for all of them
        self.reported = set(worker._frozen(trial).intermediate_values)
        self.pruned = False

    def stop(self) -> bool:
        if interrupts.requested():
            return True
        if self.judged and not self.pruned:
            for step, value in enumerate(watched_values(self.folder, self.worker.sweep), start=1):
                if step not in self.reported:
                    self.trial.report(value, step)
                    self.reported.add(step)
                    self.pruned = self.pruned or (step < self._last_step() and self.trial.should_prune())
        return self.pruned

    def _last_step(self) -> float:
        """The last step of a run, as far as known; stopping there saves nothing. wandb's bands end below `max_iter` too."""
        most = self.worker.sweep.pruning.max_resource if self.worker.sweep.pruning else "auto"
        ended = [trial.last_step for trial in self.worker._trials(TrialState.COMPLETE) if trial.last_step is not None]
        return min(max(ended, default=math.inf), most if isinstance(most, int) else math.inf)


def sampler_of(method: str, number: int) -> optuna.samplers.BaseSampler:
    """Draws the point of a trial; never asked for a grid, whose points are already in the study."""
    seed = int(numpy.random.SeedSequence(number).generate_state(1)[0])  # so that neighbours' first draws are independent
    return optuna.samplers.TPESampler(seed=seed) if method == "bayes" else optuna.samplers.RandomSampler(seed=seed)


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, FloatDistribution):
        trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    else:
        assert isinstance(distribution, optuna.distributions.IntDistribution)
        trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _key(point: dict[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


def _essence(recipe: Recipe) -> dict[str, Any]:
    """What identifies a run: the recipe, with only the seed of its section `run`."""
    return recipe.to_dict() | {"run": recipe.run.seed}


def run_sweep(sweep: Sweep, runner: Runner = run_process) -> dict[str, Any]:
    """Starts a sweep, resumes it, or joins its other workers; prints the table and returns the content of results.json."""
    with interrupts.handled(), interrupts.training():  # a signal is passed on to the trial, and ends the sweep after it
        results = Worker(sweep, runner).run()
    print_results(sweep, results)
    return results


def plan(sweep: Sweep) -> str:
    """What --dry-run prints."""
    seeds = f"seed{'s'[: len(sweep.seeds) - 1]} {', '.join(map(str, sweep.seeds))}"
    if sweep.method == "grid":
        points = sweep.grid()[: sweep.run_cap]
        lines = [f"points of the grid: {len(points)}, each with {seeds}: {len(points) * len(sweep.seeds)} runs"]
        lines += [f"  {text_of(point)}" for point in points]
    else:
        points = [dict.fromkeys(sweep.space, "...")]
        lines = [f"points by {type(sampler_of(sweep.method, 0)).__name__}: {sweep.run_cap}, each with {seeds}"]
        lines += [f"  {name} {dist}" for name, dist in sweep.space.items()]
    if sweep.pruning is not None:
        lines.append(f"pruned by hyperband: {', '.join(f'{key} {value}' for key, value in vars(sweep.pruning).items())}")
    name = sweep.run_name(0, sweep.seeds[0])
    first = sweep.words(points[0], sweep.seeds[0], name=name, group=sweep.name, trial="true")
    named = ["python" if word == sys.executable else word for word in first]
    goal = "highest" if sweep.maximize else "lowest"
    return "\n".join([
        f"# {sweep.name}: {sweep.recipe.task} by {sweep.program}, the {goal} {sweep.title}; into {sweep.folder}",
        *lines, f"the first run: {' '.join(named)}", "# nothing was written",
    ])  # fmt: skip
