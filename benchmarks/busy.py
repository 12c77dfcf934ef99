"""What one other busy process costs the default job, beside free cores and one thread on one free core.

    python benchmarks/busy.py [--runs 2] [--updates 1] [--settings default GOMP_SPINCOUNT=300000] [--json FILE]

Runs scripts/ppo.py of recipes/imdb in turn, under each setting of the environment with two cores free and with one of them
taken by a busy loop, and with the first setting on one free core. Prints medians of episodes a second (of the updates after
each run's first), and their ratios to one free core and to two free ones. As it is it takes nine minutes on a machine that has
nothing else to do, most of it libgomp's own setting beside the busy loop.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf_recipes.recipe.loading import DEFAULT_RECIPE, load_recipe

ROOT = Path(__file__).resolve().parent.parent
PPO = load_recipe(DEFAULT_RECIPE).stages["ppo"]
BATCH = PPO["per_device_train_batch_size"] * PPO.get("gradient_accumulation_steps", 1)  # episodes an update
LIBGOMPS = "GOMP_SPINCOUNT=300000"  # what libgomp does where nothing is set
BUSY = [sys.executable, "-c", "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"]
KEYS = [
    "--run.tracker=none",
    "--ppo.eval_strategy=no",
    "--ppo.save_strategy=no",
    "--evaluate.prompts=4",
    "--evaluate.samples=1",
]


def episodes_a_second(cores: set[int], setting: str, updates: int) -> list[float]:
    """Of each update after the first."""
    given = {} if setting == "default" else dict(word.split("=") for word in setting.split())
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    with tempfile.TemporaryDirectory() as output:
        words = [*KEYS, f"--run.output={output}", "--run.name=it", f"--ppo.total_episodes={BATCH * (updates + 1)}"]
        subprocess.run(
            [sys.executable, "scripts/ppo.py", *words], cwd=ROOT, env=keep | given, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
        rows = [json.loads(line) for line in (Path(output) / "imdb/ppo/it/timing.jsonl").read_text().splitlines()]
    return [BATCH / row["seconds"] for row in rows[1:]]


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="processes of each kind, in turn")
    parser.add_argument("--updates", type=int, default=1, help="timed ones, after one that warms up")
    parser.add_argument(
        "--settings", nargs="+", default=["default", LIBGOMPS], help="of the environment; `default` is what the project chooses"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)

    cores = sorted(os.sched_getaffinity(0))[:2]
    kinds = {f"{setting}, {state}": (setting, set(cores), state == "one taken")
             for setting in args.settings for state in ("free", "one taken")}  # fmt: skip
    one = f"{args.settings[0]}, one free core"
    kinds[one] = (args.settings[0], {cores[0]}, False)
    measured: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(args.runs):
        for kind, (setting, mine, taken) in kinds.items():
            busy = subprocess.Popen([*BUSY, str(cores[-1])]) if taken else None
            try:
                measured[kind] += episodes_a_second(mine, setting, args.updates)
            finally:
                if busy is not None:
                    busy.kill()
                    busy.wait()
            print(f"run {number + 1}: {kind}: {statistics.median(measured[kind]):.1f}", file=sys.stderr)

    free = f"{args.settings[0]}, free"
    medians = {kind: statistics.median(values) for kind, values in measured.items()}
    figures = {kind: {"episodes_per_second": value, "to_one_free_core": value / medians[one], "to_free": value / medians[free]}
               for kind, value in medians.items()}  # fmt: skip
    print("| environment, cores | episodes/s | lowest | highest | to one free core | to all free |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, figure in figures.items():
        low, high = min(measured[kind]), max(measured[kind])
        ratios = f"{figure['to_one_free_core']:.2f} | {figure['to_free']:.2f}"
        print(f"| {kind} | {figure['episodes_per_second']:.1f} | {low:.1f} | {high:.1f} | {ratios} |")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
