"""A script's command line: the recipe, overrides of any of its keys, --help and --dry-run; mistakes end in exit code 2.

Nothing heavy is imported here: a wrong key is answered in well under a second.
"""

import errno
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rlhf_recipes import environment, interrupts
from rlhf_recipes.recipe.errors import RecipeError, StoppedError, nearest
from rlhf_recipes.recipe.loading import DEFAULT_RECIPE, instead_of, load_recipe
from rlhf_recipes.recipe.sections import SECTIONS, Recipe
from rlhf_recipes.recipe.stages import STAGES
from rlhf_recipes.recipe.yaml_text import read_yaml
from rlhf_recipes.runs.resume import resumed_recipe


@dataclass(frozen=True)
class CommandLine:
    recipe: Path
    overrides: dict[str, Any]
    dry_run: bool
    help: bool


def parse_command_line(argv: list[str], stage: str | None = None) -> CommandLine:
    """`--recipe PATH`, `--resume [PATH]`, `--dry-run`, `--help` and any number of `--section.key=value`, with = or a space.

    Args:
        stage: whose command line it is; a message names its keys alone.
    """
    recipe, overrides, flags = DEFAULT_RECIPE, {}, set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("--help", "-h", "--dry-run"):
            flags.add(word.lstrip("-")[0])
            continue
        if not word.startswith("--"):
            raise RecipeError(f"{word}: expected --recipe, --resume, --dry-run, --help or --section.key=value")
        key, equals, value = word[2:].partition("=")
        if key not in ("recipe", "resume") and "." not in key:
            near = nearest(key, ["recipe", "resume", "dry-run", "help"])
            advice = instead_of(key, (), stage=stage and STAGES[stage].section)
            raise RecipeError(f"--{key}: unknown option{advice or near or '; an override is --section.key=value'}")
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif key == "resume":
                value = "latest"
            else:
                raise RecipeError(f"--{key}: a value is missing; write --{key}=VALUE")
        if key == "recipe":
            recipe = Path(value)
        elif key == "resume":
            overrides["run.resume"] = value
        else:  # given twice, the last one holds
            overrides[key] = read_yaml(value, f"--{key}")
    return CommandLine(recipe, overrides, dry_run="d" in flags, help="h" in flags)


def help_text(stage: str, doc: str) -> str:
    """Usage, the shared sections' keys with defaults, and the stage's TRL fields."""
    lines = [
        doc.strip(),
        "",
        "options:",
        "  --recipe PATH          a recipe's folder (default: recipes/imdb)",
        "  --resume [RUN]         resume the latest run of the stage, or that run's or checkpoint's folder",
        "  --dry-run              print the resolved recipe, the memory estimate and the checks; write nothing",
        "  --section.key VALUE    override any key below",
        "",
        "shared keys:",
    ]
    for name, cls in SECTIONS.items():
        for key, field in cls.model_fields.items():
            default = "required" if field.is_required() else f"default {field.default}"
            lines.append(f"  --{name + '.' + key:<28} {field.description} ({default})")
    row = STAGES[stage]
    if row.trains:
        lines += ["", f"keys of `{row.section}`, TRL's own names (default):"]
        lines += [f"  --{row.section}.{key} ({row.fields[key].default})" for key in row.keys]
    return "\n".join(lines)


def command(stage: str, doc: str) -> Callable[[Callable[[Recipe], Any]], Callable[[list[str] | None], Any]]:
    """Makes `run(recipe)` a script's `main(argv=None)`: reads the recipe, answers --help and --dry-run, and turns a
    `RecipeError` into one line on stderr and its exit code."""

    def decorate(run: Callable[[Recipe], Any]) -> Callable[[list[str] | None], Any]:
        @functools.wraps(run)
        def main(argv: list[str] | None = None) -> Any:
            environment.prepare()
            try:
                line = parse_command_line(sys.argv[1:] if argv is None else argv, stage)
                if line.help:
                    print(help_text(stage, doc))
                    return None
                for note in environment.settle():
                    _say(f"warning: {note}")
                recipe = load_recipe(line.recipe, line.overrides)
                if recipe.run.resume is not None:
                    recipe, notes = resumed_recipe(recipe, stage, line.overrides)
                    for note in notes:
                        _say(f"resume: {note}")
                from rlhf_recipes.checks.machine import check, describe, warnings
                from rlhf_recipes.checks.memory import describe_memory

                if line.dry_run:
                    _say(describe(recipe, stage), sys.stdout)
                check(recipe, stage)
                longest = None
                if line.dry_run:
                    from rlhf_recipes.checks.look import look

                    seen = look(recipe, stage)
                    longest = seen.longest
                    _say("\n".join([describe_memory(recipe, stage, longest), *seen.lines]), sys.stdout)
                for warning in warnings(recipe, stage, longest):
                    _say(f"warning: {warning}")
                if line.dry_run:
                    _say(
                        "# checks: paths, tokens, lengths, batch sizes, disk are in order (a run also tries ten prompts)",
                        sys.stdout,
                    )
                    _say("# nothing was written", sys.stdout)
                    return None
                from rlhf_recipes.process import configure

                configure(recipe.run.seed)
                with interrupts.handled():
                    return run(recipe)
            except RecipeError as error:
                environment.fail(f"error: {error}", error.exit_code)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    environment.fail(
                        f"error: {error.filename}: {error.strerror}; give the right to it, or choose another place",
                        StoppedError.exit_code,
                    )
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                environment.fail(
                    f"error: the disk is full: {error.filename or error}; make room, then resume with --resume",
                    StoppedError.exit_code,
                )
            except interrupts.Interrupted as interruption:
                advice = "; --resume resumes it" if STAGES[stage].resumable else ""
                environment.fail(f"{stage}: {interruption}{advice}", interrupts.EXIT_CODE)

        return main

    return decorate


def _say(line: str, stream: TextIO | None = None) -> None:
    """On standard error, unless another stream is given."""
    if os.environ.get("RANK", "0") == "0":  # one process speaks
        print(line, file=stream or sys.stderr)
