"""Runs a sweep in wandb's format without its server, with Optuna: a subprocess a run, resumable, any number of workers.

    python scripts/sweep.py recipes/imdb/sweep.yaml [--trials N] [--seeds K] [--study NAME] [--output outputs] [--dry-run]

The same file goes through `wandb sweep` and `wandb agent`; here it is the recipe beside it that is run. Points are judged by
the mean over their seeds: those of `run.seed` in the file, or 0 to K-1. Start the same command again to resume after an
interruption, or twice to share the work. Leaves study.db, results.json, results.md, logs and, over beta, frontier.png in
outputs/<task>/sweep/<name>/; the runs themselves are beside all others, in outputs/<task>/<stage>/<name>-trial-<n>/, and in
one wandb group.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rlhf_recipes import environment
from rlhf_recipes.interrupts import EXIT_CODE, Interrupted
from rlhf_recipes.recipe.errors import RecipeError


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    environment.prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a sweep's file, as recipes/imdb/sweep.yaml")
    parser.add_argument("--trials", type=int, help="points in all, of all workers (default: the grid, or the file's run_cap)")
    parser.add_argument("--seeds", type=int, help="runs of each point (default: the file's `run.seed`, else the recipe's)")
    parser.add_argument("--study", help="the study's name (default: the file's `name`)")
    parser.add_argument("--output", default="outputs", help="where runs and study are written (default: outputs)")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print what would be run; write nothing")
    args = parser.parse_args(argv)
    try:
        from rlhf_recipes.sweeps.file import load_sweep
        from rlhf_recipes.sweeps.worker import plan, run_sweep

        sweep = load_sweep(args.file, args.seeds, args.study, args.output, args.trials)
        if sweep.note:
            print(f"warning: {sweep.note}", file=sys.stderr)
        if args.dry_run:
            print(plan(sweep))
            return None
        results = run_sweep(sweep)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Interrupted as interruption:
        print(f"sweep: {interruption}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None
    if results["best"] is None:
        print("error: no trial was finished; the last lines say why, and the logs are in the sweep's folder", file=sys.stderr)
        raise SystemExit(1)
    return results


if __name__ == "__main__":
    main()
