"""A sweep file in wandb's own format, read and checked for scripts/sweep.py, which runs it without wandb's server.

Nothing heavy is imported here: a wrong key is answered in about a second.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution

from rlhf_recipes.checks.machine import check
from rlhf_recipes.command_line import parse_command_line
from rlhf_recipes.metrics import HELD_OUT
from rlhf_recipes.recipe.errors import RecipeError, nearest, shortened
from rlhf_recipes.recipe.loading import keys_of_sections, load_recipe
from rlhf_recipes.recipe.sections import SECTIONS, Recipe
from rlhf_recipes.recipe.stages import JUDGED, TRAINED
from rlhf_recipes.recipe.yaml_text import read_yaml
from rlhf_recipes.sweeps.pruning import Pruning, pruning_of
from rlhf_recipes.sweeps.space import combinations, distribution, range_ends

METHODS = ("grid", "random", "bayes")
SEED = "run.seed"
_KEYS = (
    "program", "command", "method", "metric", "parameters", "early_terminate", "run_cap", "name", "project", "entity",
    "description",
)  # fmt: skip  # the last two are read by wandb alone
_SERVERS_KEYS = ("apiVersion", "kind", "controller", "job", "image_uri", "scheduler", "metrics")
_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")  # wandb's default
_GIVEN = ("run.name", "run.output", "run.resume", "run.group", "run.trial")  # to every trial


@dataclass(frozen=True)
class Sweep:
    """What is varied, and what every trial runs."""

    file: Path
    name: str
    stage: str
    method: str
    metric: str  # a key of a summary's `policy`
    maximize: bool
    space: dict[str, BaseDistribution]  # in the file's order, without `run.seed`
    fixed: dict[str, Any]
    seeds: list[int]  # every point is run with each
    command: list[str]  # all macros replaced except ${args}
    program: str
    output: str
    project: str | None
    run_cap: int | None  # points
    pruning: Pruning | None
    recipe: Recipe  # with the first value of each parameter, except that beta is its own
    note: str | None = None  # set where the recipe beside the file replaces the one that the command names

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.recipe.task / "sweep" / self.name

    @property
    def beta(self) -> float | None:
        """The beta at which J is compared where the trials' own betas differ: the recipe's.

        Policies' J at betas of their own cannot be compared: J* falls with beta, so the smallest would win.
        """
        return self.recipe.objective.beta if self.metric == "objective" and "objective.beta" in self.space else None

    def run_name(self, trial: int, seed: int | str) -> str:
        return f"{self.name}-trial-{trial}" + (f"-seed-{seed}" if len(self.seeds) > 1 else "")

    @property
    def title(self) -> str:
        """What is compared, as the head of a column."""
        name = HELD_OUT[self.metric].title if self.metric in HELD_OUT else self.metric
        return name if self.beta is None else f"{name} at beta {self.beta:g}"

    def value(self, metrics: dict[str, float]) -> float:
        """What a trial is judged by.

        Raises:
            KeyError: it was not measured.
        """
        if self.beta is not None:
            return metrics["reward"] - self.beta * metrics["kl"]
        return metrics[self.metric]

    def grid(self) -> list[dict[str, Any]]:
        """Every point of a grid, the last parameter varying fastest."""
        return combinations({name: list(dist.choices) for name, dist in self.space.items()})  # type: ignore[attr-defined]

    def words(self, point: dict[str, Any], seed: int, **options: str) -> list[str]:
        """The command of one run.

        Args:
            options: of the section `run`, after all others; `output` and the file's `project` are always among them.
        """
        arguments = [f"--{name}={value}" for name, value in (self.fixed | point | {SEED: seed}).items()]
        options = ({"project": self.project} if self.project else {}) | {"output": self.output} | options
        words = [word for part in self.command for word in (arguments if part == "${args}" else [part])]
        return [*words, *(f"--run.{name}={value}" for name, value in options.items())]

    def recipe_of(self, point: dict[str, Any], seed: int) -> Recipe:
        """The recipe as the script will resolve it.

        Raises:
            RecipeError: it will refuse it.
        """
        words = self.words(point, seed)
        line = parse_command_line(words[words.index(self.program) + 1 :])
        return load_recipe(line.recipe, line.overrides)


def load_sweep(
    file: Path, seeds: int | None = None, study: str | None = None, output: str = "outputs", trials: int | None = None
) -> Sweep:
    """Reads a sweep and resolves the recipe of every value in it; writes nothing.

    Args:
        seeds: how many to run each point with: the first of the file's `run.seed`, or 0, 1, ...
        study: a name to use instead of the file's.
        trials: the number of points, instead of `run_cap`.

    Raises:
        RecipeError: naming the file, the key and the nearest valid name.
    """
    try:
        return _load(file, seeds, study, output, trials)
    except RecipeError as error:
        message = str(error)
        raise RecipeError(message if message.startswith(f"{file}: ") else f"{file}: {message}") from None


def _load(file: Path, asked: int | None, study: str | None, output: str, trials: int | None) -> Sweep:
    content = _read(file)
    for key in content:
        if key in _SERVERS_KEYS:
            raise RecipeError(f"`{key}` needs wandb's server; scripts/sweep.py runs without one: leave it out")
        if key not in _KEYS:
            raise RecipeError(f"unknown key `{key}`{nearest(str(key), _KEYS)}")
    stage, program = _program(content)
    method = _one_of("method", content.get("method"), METHODS)
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise RecipeError("`parameters` must be a mapping of a recipe's keys, as `objective.beta`, to what each may be")
    for name in parameters:
        _check_name(name, stage)
    read = {name: distribution(name, spec, method == "grid") for name, spec in parameters.items()}
    fixed = {name: value[0] for name, value in read.items() if isinstance(value, list) and name != SEED}
    space = {name: dist for name, dist in read.items() if isinstance(dist, BaseDistribution) and name != SEED}
    if not space and method != "grid":
        raise RecipeError(f"`parameters` leave method {method} nothing to vary; give one of them `values`, or min and max")

    command = _command(content, program)
    at, note = command.index(program) + 1, None
    if another := another_recipe(file, command[at:]):
        command[at:], note = _renamed(command[at:], another[1]), said_of_another(file, *another)
    first = {name: range_ends(dist)[0] for name, dist in space.items() if name != "objective.beta"}
    base = _base_recipe(command, program, fixed | first, output)
    metric, maximize = _metric(content, [term.title for term in base.reward.all_terms()])
    name = study or content.get("name") or f"{base.task}-{file.stem}"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name):
        raise RecipeError(f"`name` {shortened(name)}: expected the name of a folder: letters, digits, `_`, `.` and `-`")
    chosen = _seeds(read.get(SEED), asked, base.run.seed)
    cap = _run_cap(content, len(chosen), trials)
    if method != "grid" and cap is None:
        raise RecipeError(f"method {method} has no end of its own: give --trials N, or `run_cap`, which counts every seed")
    stop = content.get("early_terminate")
    pruning = None if stop is None else pruning_of(stop, stage, base.stages.get(stage, {}))
    project = content.get("project")
    sweep = Sweep(
        file, name, stage, method, metric, maximize, space, fixed, chosen, command, program, output, project, cap, pruning,
        base, note,
    )  # fmt: skip
    for point in _probes(sweep):
        check(sweep.recipe_of(point, chosen[0]), stage)
    for seed in chosen[1:]:
        sweep.recipe_of(point, seed)
    return sweep


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        known = ", ".join(sorted(map(str, [*Path().glob("recipes/*/sweep.yaml"), *Path().glob("recipes/*/sweeps/*.yaml")])))
        raise RecipeError(f"no such file; {f'sweeps here: {known}' if known else 'give the file of a sweep'}")
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"cannot be read as text: {error}") from None
    content = read_yaml(text, str(file))
    if not isinstance(content, dict):
        raise RecipeError(f"a sweep is a mapping, got {type(content).__name__}")
    if yaml.safe_load(text) != content:
        raise RecipeError("wandb reads yes, no, on and off as booleans, and dates as dates: put them in quotes")
    return content


def _program(content: dict[str, Any]) -> tuple[str, str]:
    scripts = [f"scripts/{stage}.py" for stage in JUDGED]
    program = content.get("program")
    if program is None:
        raise RecipeError(f"`program` is missing: one of {', '.join(scripts)}")
    if program not in scripts:
        raise RecipeError(
            f"`program` {shortened(program)}: expected one of {', '.join(scripts)}{nearest(str(program), scripts)}"
        )
    if not Path(program).is_file():
        raise RecipeError(f"`program` {program}: no such file here; sweeps are run from the repository's root")
    return Path(program).stem, program


def _one_of(key: str, value: Any, allowed: Iterable[str]) -> str:
    if value not in allowed:
        said = "is missing" if value is None else f"is {shortened(value)}"
        raise RecipeError(f"`{key}` {said}: expected one of {', '.join(allowed)}{nearest(str(value), allowed)}")
    return value


def _check_name(name: Any, stage: str) -> None:
    """Checks that a parameter is a key that the stage reads; whether the key exists, the recipe's loader says."""
    if not isinstance(name, str) or "." not in name:
        sections = keys_of_sections()
        keys = {f"{section}.{key}" for section in (*SECTIONS, stage) for key in sections[section]}
        same = sorted((key for key in keys if key.endswith(f".{name}")), key=lambda key: not key.startswith(stage))
        near = f"; did you mean `{same[0]}`?" if same else nearest(str(name), keys)
        raise RecipeError(f"`parameters`: `{name}` is not a key of a recipe, `section.key`{near}")
    section = name.partition(".")[0]
    if section in TRAINED and section != stage:
        raise RecipeError(f"`parameters.{name}`: scripts/{stage}.py does not read it, so every trial would be the same")
    if name in _GIVEN:
        raise RecipeError(f"`parameters.{name}`: scripts/sweep.py gives it to every trial; leave it out")


def _command(content: dict[str, Any], program: str) -> list[str]:
    """The command's words, with its macros except ${args} replaced as wandb's agent does."""
    parts = content.get("command", list(_COMMAND))
    if not isinstance(parts, list) or not parts:
        raise RecipeError(f"`command` must be a list of words, got {shortened(parts)}")
    values = {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${program}": [program], "${args}": ["${args}"]}
    words: list[str] = []
    for part in map(str, parts):
        if re.fullmatch(r"\$\{\w+\}", part) and part not in values:
            raise RecipeError(f"`command`: our scripts take --section.key=value, which is the macro ${{args}}, not {part}")
        words += values.get(part) or [re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda m: os.environ.get(m[1], m[1]), part)]
    if words.count(program) != 1 or words.count("${args}") != 1 or words.index("${args}") < words.index(program):
        raise RecipeError("`command` must name ${program} once, and ${args} once after it")
    first = next(word for word in words if word != "/usr/bin/env" and "=" not in word)  # env takes NAME=VALUE before it
    if shutil.which(first, path=search_path()) is None:
        raise RecipeError(f"`command`: there is no program {first} on the PATH")
    return words


def search_path() -> str:
    """PATH, preceded by this Python's own programs, so that `accelerate` is found without activating its environment."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def another_recipe(file: Path, words: list[str] | None = None) -> tuple[Path, Path] | None:
    """(the recipe that a sweep's command names, the one beside the sweep file) where they differ.

    A copied recipe folder takes its sweeps along, and in wandb's format these name a recipe by its path.

    Args:
        words: what the command has after the program; by default the file's.
    """
    beside = next((folder for folder in (file.parent, file.parent.parent) if (folder / "recipe.yaml").is_file()), None)
    if words is None:
        content = _read(file)
        command = [str(word) for word in content.get("command") or _COMMAND]
        programs = [i for i, word in enumerate(command) if word in ("${program}", content.get("program"))]
        words = command[programs[0] + 1 :] if programs else []
    named = parse_command_line([word for word in words if word != "${args}"]).recipe
    if beside is None or _folder_of(named) == beside.resolve():
        return None
    variant = beside / named.name
    return named, variant if named.suffix and variant.is_file() else beside


def sweeps_of_others(folder: Path) -> list[str]:
    """A line for each sweep of a recipe's folder that names another recipe."""
    notes = []
    for file in sorted([*folder.glob("sweep.yaml"), *folder.glob("sweeps/*.yaml")]):
        with suppress(RecipeError):  # scripts/sweep.py says what else is wrong with it
            if another := another_recipe(file):
                notes.append(said_of_another(file, *another))
    return notes


def said_of_another(file: Path, named: Path, beside: Path) -> str:
    return (
        f"{file}: its `command` names the recipe {named}, and scripts/sweep.py runs the one beside the file, {beside}; `wandb "
        f"sweep` would run {named}: write {beside} there"
    )


def _folder_of(recipe: Path) -> Path:
    """The folder of what is given as --recipe, whether or not it exists."""
    try:
        return load_recipe(recipe).folder
    except RecipeError:
        return (recipe.parent if recipe.suffix else recipe).resolve()


def _renamed(words: list[str], recipe: Path) -> list[str]:
    """The words of a command line with `recipe` in place of the one they name."""
    values = [i + 1 for i, word in enumerate(words) if word == "--recipe"]
    others = [w for i, w in enumerate(words) if i not in values and w != "--recipe" and not w.startswith("--recipe=")]
    return ["--recipe", str(recipe), *others]


def _base_recipe(command: list[str], program: str, values: dict[str, Any], output: str) -> Recipe:
    arguments = [f"--{name}={value}" for name, value in values.items()]
    words = [word for part in command for word in (arguments if part == "${args}" else [part])]
    line = parse_command_line(words[words.index(program) + 1 :])
    for name in _GIVEN:
        if name in line.overrides:
            raise RecipeError(f"`command`: scripts/sweep.py gives --{name} to every trial; leave it out")
    return load_recipe(line.recipe, line.overrides | {"run.output": output})


def _metric(content: dict[str, Any], rewards: list[str]) -> tuple[str, bool]:
    metric = content.get("metric", {"name": "eval/objective", "goal": "maximize"})
    if not isinstance(metric, dict) or "name" not in metric:
        raise RecipeError("`metric` must have a `name` and a `goal`, as {name: eval/objective, goal: maximize}")
    for key in metric:
        if key not in ("name", "goal"):
            raise RecipeError(f"`metric.{key}` is not read here{nearest(str(key), ('name', 'goal'))}; leave it out")
    measured = [name for name, metric in HELD_OUT.items() if not metric.several]
    known = [f"eval/{name}" for name in (*measured, *(f"reward_{name}" for name in rewards if len(rewards) > 1))]
    name = _one_of("metric.name", metric["name"], known)
    if "goal" not in metric:
        raise RecipeError("`metric.goal` is missing, and wandb would minimize: write `goal: maximize` or `goal: minimize`")
    return name.removeprefix("eval/"), _one_of("metric.goal", metric["goal"], ("maximize", "minimize")) == "maximize"


def _seeds(given: BaseDistribution | list[Any] | None, asked: int | None, own: int) -> list[int]:
    if asked is not None and asked < 1:
        raise RecipeError(f"--seeds {asked}: expected at least 1")
    if given is None:
        return [own] if asked is None else list(range(asked))
    if not isinstance(given, list | CategoricalDistribution):
        raise RecipeError(f"`parameters.{SEED}`: every point is run with every seed, so give them as `values`")
    seeds = list(given if isinstance(given, list) else given.choices)
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise RecipeError(f"`parameters.{SEED}`: expected whole numbers, got {shortened(seeds)}")
    if asked is not None and asked > len(seeds):
        raise RecipeError(f"--seeds {asked}: `parameters.{SEED}` has {len(seeds)}; give more there")
    return seeds[:asked]


def _run_cap(content: dict[str, Any], seeds: int, trials: int | None) -> int | None:
    """The number of points: wandb's `run_cap` counts every seed of one."""
    cap = content.get("run_cap")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise RecipeError(f"`run_cap`: expected a whole number of at least 1, got {shortened(cap)}")
    if trials is not None and trials < 1:
        raise RecipeError(f"--trials {trials}: expected at least 1")
    return trials or (cap and max(1, cap // seeds))


def text_of(point: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.items()) or "the one point"


def _probes(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every point of a grid; else one with each value, or each end of a range, beside the first of the others."""
    if sweep.method == "grid":
        yield from sweep.grid()
        return
    ends = {name: range_ends(dist) for name, dist in sweep.space.items()}
    first = {name: values[0] for name, values in ends.items()}
    yield first
    yield from (first | {name: value} for name, values in ends.items() for value in values[1:])
