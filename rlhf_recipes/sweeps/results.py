"""What a sweep found, one row for each point, ranked: the table, results.json, results.md and the reward-KL frontier."""

import json
import shlex
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from scipy.special import stdtrit

from rlhf_recipes.evaluation.tables import markdown_table, print_rows
from rlhf_recipes.metrics import label_of
from rlhf_recipes.report.drawing import Plot, Series, save_png
from rlhf_recipes.report.plots import KL_AXIS, LINE_STYLES, STYLES
from rlhf_recipes.sweeps.file import Sweep, text_of

FINISHED = "finished"
_STATES = {
    TrialState.COMPLETE: FINISHED,
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_SHOWN = ("reward", "kl", "gold")  # beside what a sweep is judged by


def interval(values: list[float], level: float = 0.95) -> dict[str, float]:
    """Mean of `values` and Student's t interval around it: mean +- t s / sqrt(n), n - 1 degrees of freedom.

    Args:
        values: one for each seed.

    Returns:
        mean, low, high; for a single value the mean alone.
    """
    mean = fmean(values)
    if len(values) < 2:
        return {"mean": mean}
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def row_of(sweep: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    """What is known about a point, as JSON; it is ranked by `value`, which is None where it did not finish."""
    runs = trial.user_attrs.get("runs", [])
    done = trial.state == TrialState.COMPLETE
    names = [name for name in runs[0]["policy"] if all(name in run["policy"] for run in runs)] if done else []
    reason = trial.user_attrs.get("reason")
    if trial.state == TrialState.PRUNED:
        step, value = max(trial.intermediate_values.items())
        reason = f"at evaluation {step}, with {sweep.title} {value:.3f}"
    return {
        "trial": trial.number,
        "state": _STATES[trial.state],
        "reason": reason,
        "parameters": trial.params,
        "value": interval([run["value"] for run in runs]) if done else None,
        "metrics": {name: interval([run["policy"][name] for run in runs]) for name in names},
        "seconds": round(sum(run["seconds"] for run in runs), 1) if done else None,
        "runs": runs,
    }


def results_of(sweep: Sweep, trials: list[FrozenTrial]) -> dict[str, Any]:
    """The content of results.json: the finished points, best first, then the others."""
    rows = [row_of(sweep, trial) for trial in trials]
    done = [row for row in rows if row["state"] == FINISHED]
    done.sort(key=lambda row: (-1 if sweep.maximize else 1) * row["value"]["mean"])
    ranked = [{"rank": at, **row} for at, row in enumerate(done, start=1)]
    others = [{"rank": None, **row} for row in rows if row["state"] != FINISHED]
    best = ranked[0] if ranked else None
    return {
        "sweep": sweep.name,
        "file": str(sweep.file),
        "task": sweep.recipe.task,
        "stage": sweep.stage,
        "method": sweep.method,
        "metric": f"eval/{sweep.metric}",
        "goal": "maximize" if sweep.maximize else "minimize",
        "judged_by": sweep.title,
        "seeds": sweep.seeds,
        "best": best and {"trial": best["trial"], "command": command_line(sweep, best["parameters"])},
        "trials": ranked + others,
    }


def command_line(sweep: Sweep, point: dict[str, Any]) -> str:
    """The command that runs a point by itself, ready to paste."""
    arguments = [word for name, value in (sweep.fixed | point).items() for word in (f"--{name}", str(value))]
    words = sweep.command[1:] if sweep.command[0] == "/usr/bin/env" else sweep.command
    named = ["python" if word == sys.executable else word for word in words]
    return shlex.join([word for part in named for word in (arguments if part == "${args}" else [part])])


def describe(sweep: Sweep, row: dict[str, Any]) -> str:
    """The line of a trial that has ended."""
    point = text_of(row["parameters"])
    if row["state"] != FINISHED:
        return f"trial {row['trial']}: {point}: {row['state']}" + (f": {row['reason']}" if row["reason"] else "")
    others = [f"{label_of(name)} {_cell(row['metrics'][name])}" for name in _others(sweep, [row])]
    measured = ", ".join([f"{sweep.title} {_cell(row['value'])}", *others])
    return f"trial {row['trial']}: {point}: {measured} ({row['seconds']:.0f} s)"


def _cell(known: dict[str, float]) -> str:
    mean = known["mean"]
    return f"{mean:.3f} ± {known['high'] - mean:.3f}" if "high" in known else f"{mean:.3f}"


def _others(sweep: Sweep, rows: list[dict[str, Any]]) -> list[str]:
    """The metrics that are shown beside what the sweep is judged by."""
    return [name for name in _SHOWN if name != sweep.metric and any(name in row["metrics"] for row in rows)]


def _table(sweep: Sweep, results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = results["trials"]
    shown = _others(sweep, rows)
    head = ["rank", *sweep.space, *map(label_of, shown), sweep.title, "s", "state", "run"]
    cells = [
        [
            str(row["rank"] or ""),
            *(str(row["parameters"].get(name, "")) for name in sweep.space),
            *(_cell(row["metrics"][name]) if name in row["metrics"] else "" for name in shown),
            _cell(row["value"]) if row["value"] else "",
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            row["state"],
            sweep.run_name(row["trial"], "*"),
        ]
        for row in rows
    ]  # fmt: skip
    return head, cells


def _notes(sweep: Sweep, results: dict[str, Any]) -> list[str]:
    """What to know about the table, one sentence each."""
    notes = []
    if len(sweep.seeds) > 1:
        seeds = ", ".join(map(str, sweep.seeds))
        notes.append(f"Means over the seeds {seeds}, ± half of Student's 95% interval.")
    if sweep.beta is not None:
        notes.append(
            f"J is taken at the recipe's beta, {sweep.beta:g}, whatever beta a policy was trained with: at their own betas, "
            f"the smallest would always win."
        )
    ended = [row for row in results["trials"] if row["reason"]]
    return notes + [f"Trial {row['trial']} {row['state']}: {row['reason']}" for row in ended]


def write_results(sweep: Sweep, results: dict[str, Any]) -> None:
    """results.json, results.md and, over beta, frontier.png into the sweep's folder, each written atomically."""
    plot = "objective.beta" in sweep.space and results["best"] is not None
    if plot:
        _write(sweep.folder / "frontier.png", lambda file: _save_frontier(sweep, results, file))
    head, cells = _table(sweep, results)
    lines = [
        f"# {sweep.name}", "",
        f"`python scripts/sweep.py {sweep.file}`: {len(cells)} points of {sweep.recipe.task} by `{sweep.program}`, "
        f"method {sweep.method}, ranked by {sweep.title} ({results['goal']}d).", "",
        *markdown_table(head, cells), "",
        *(line for note in _notes(sweep, results) for line in (note, "")),
        *(["The best:", "", "```bash", results["best"]["command"], "```", ""] if results["best"] else []),
        *(["![reward against KL](frontier.png)", ""] if plot else []),
    ]  # fmt: skip
    _write(sweep.folder / "results.md", lambda file: file.write_text("\n".join(lines), encoding="utf-8"))
    text = json.dumps(results, indent=2) + "\n"
    _write(sweep.folder / "results.json", lambda file: file.write_text(text, encoding="utf-8"))


def _write(file: Path, write: Any) -> None:
    """Replaces the file at once: two workers may finish together, and nobody reads half a file."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as folder:
        write(Path(folder) / file.name)
        (Path(folder) / file.name).replace(file)


def print_results(sweep: Sweep, results: dict[str, Any]) -> None:
    """The table, what to know about it, and the best point's command."""
    head, cells = _table(sweep, results)
    print_rows(head, cells, title=f"{sweep.name}: {len(cells)} points, by {sweep.title}")
    for note in _notes(sweep, results):
        print(note)
    print(f"sweep: {sweep.folder}")
    if results["best"]:
        print(f"the best: {results['best']['command']}")
        runs = [run["run"] for run in results["trials"][0]["runs"]]
        print(f"as it was run, for --merge.adapter and --evaluate.policies: {', '.join(runs)}")


def _save_frontier(sweep: Sweep, results: dict[str, Any], file: Path) -> None:
    """Reward against KL: one point for each beta with intervals over seeds; in a grid, one line for each other setting."""
    done = [row for row in results["trials"] if row["state"] == FINISHED]
    grid = sweep.method == "grid"
    others = [name for name in sweep.space if name != "objective.beta" and grid]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(done, key=lambda row: row["parameters"]["objective.beta"]):
        groups.setdefault(", ".join(f"{name} {row['parameters'][name]}" for name in others), []).append(row)
    style, drawn = STYLES[sweep.stage], []
    for at, (name, rows) in enumerate(groups.items()):
        kl, reward = ([row["metrics"][metric] for row in rows] for metric in ("kl", "reward"))
        drawn.append(
            Series(
                f"{style.label}, {name}" if name else style.label,
                style.colour,
                [i["mean"] for i in kl],
                [i["mean"] for i in reward],
                x_bars=_bars(kl),
                y_bars=_bars(reward),
                labels=[f"β {row['parameters']['objective.beta']:.3g}" for row in rows],
                label_sides=(style.label_side,),
                marker=style.marker,
                dash=LINE_STYLES[at % 4] if grid else "",
            )
        )
    style, known = STYLES["reference"], interval([run["reference"]["reward"] for run in done[0]["runs"]])
    drawn.append(Series(style.label, style.colour, [0.0], [known["mean"]], y_bars=_bars([known]), marker=style.marker))
    save_png([Plot(KL_AXIS, "reward", drawn, root=True)], file)


def _bars(known: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(i["low"], i["high"]) for i in known if "low" in i]
