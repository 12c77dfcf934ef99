"""One page for a task: what scripts/evaluate.py measured, the training curves behind it, and samples side by side.

data.py reads and checks everything, plots.py says what is drawn.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_recipes.evaluation.tables import fraction_bound, markdown_table, markdown_text, optimum_text
from rlhf_recipes.metrics import HELD_OUT, label_of
from rlhf_recipes.report.data import Interval, ReportData
from rlhf_recipes.report.drawing import save_png, svg
from rlhf_recipes.report.plots import STYLES, TRAINED, figures


def table_metrics(data: ReportData) -> list[str]:
    """The metrics that any policy has, the main ones first."""
    present = list(dict.fromkeys(metric for policy in data.policies for metric in policy.metrics))
    known, others = [m for m in HELD_OUT if m in present], [m for m in present if m not in HELD_OUT]
    terms = [metric for metric in others if metric.startswith("reward_")]  # of a sum
    at = known.index("reward") + 1
    return known[:at] + terms + known[at:] + [metric for metric in others if metric not in terms]


def optimum_sentence(data: ReportData) -> str:
    optimum = data.evaluation.optimum
    return optimum_text(optimum.objective, optimum.effective_sample_size, optimum.proposal, optimum.small)


def headline(data: ReportData) -> str:
    """The trained policy of the highest J, and what beats it without training; empty where none was judged."""
    trained = [p for p in data.policies if p.kind in TRAINED]
    if not trained:
        return ""
    best = max(trained, key=lambda p: p.metrics["objective"].mean)
    objective, fraction = best.metrics["objective"], best.metrics.get("fraction_of_optimum")
    most = "at most " if data.evaluation.optimum.small else ""
    far = f", {most}{fraction.mean:.0%} of the way from the reference to the optimum" if fraction else ""
    sentence = f"Highest J of the trained policies: {best.name}, {objective}{far}."
    untrained = max(
        (p for p in data.policies if p.kind not in TRAINED), key=lambda p: p.metrics["objective"].mean, default=best
    )
    if untrained.metrics["objective"].mean > objective.mean:
        sentence += f" Without training, {untrained.name} has {untrained.metrics['objective'].mean:.3f}."
    return sentence


def render_html(data: ReportData) -> str:
    """report.html: one file with its plots and all samples in it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rlhf_recipes.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = figures(data)
    drawn |= {"frontier-linear": [replace(plot, root=False) for plot in drawn["frontier"]]}
    content = {
        "sides": data.sides,
        "samples": [
            {
                "prompt": str(row["prompt"]),
                "sides": [{"text": str(row[s]), "reward": row.get(f"{s}_reward"), "gold": row.get(f"{s}_gold")}
                          for s in data.sides],
            }
            for row in data.samples
        ],
    }  # fmt: skip
    return environment.get_template("page.html.j2").render(
        data=data,
        evaluation=data.evaluation,
        colours={policy.name: STYLES[policy.kind].colour for policy in data.policies},
        columns={name: label_of(name) for name in table_metrics(data)},
        notes=drawn["frontier"][0].notes,
        figures={name: (svg(plots, name), svg(plots, f"{name}-narrow", narrow=True)) for name, plots in drawn.items()},
        headline=headline(data),
        optimum=optimum_sentence(data),
        fraction_bound=fraction_bound,
        content=_script_json(content),
    )


def _script_json(content: Any) -> str:
    """JSON that cannot end, or be read as, the script element around it; numbers that JSON has not become null."""
    text = json.dumps(_finite(content), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_markdown(data: ReportData, samples: int = 10) -> str:
    """report.md: the table, the plots that `write_report` saves beside it, and the first `samples` prompts."""
    evaluation = data.evaluation
    metrics = table_metrics(data)
    rows = [
        [
            p.name,
            "" if p.beta is None else f"{p.beta:g}",
            *(_cell(data, p.metrics.get(metric), metric) for metric in metrics),
            p.run,
        ]
        for p in data.policies
    ]
    lines = [
        f"# {markdown_text(data.task)}: report",
        "",
        f"{evaluation.prompts} held-out prompts, {evaluation.completions} completions each, J at β {evaluation.beta:g}"
        + (f", judged by {markdown_text(data.judged_by)}" if data.judged_by else "")
        + "; every number with its 95% interval.",
        "",
        *([markdown_text(headline(data)), ""] if headline(data) else []),
        markdown_text(optimum_sentence(data)),
        "",
        *markdown_table(["policy", "β", *map(label_of, metrics), "run"], rows),
        *(line for note in data.notes for line in ("", markdown_text(note))),
    ]
    drawn = figures(data)
    notes = drawn["frontier"][0].notes
    lines += ["", "## Reward against KL", "", "![reward against KL](frontier.png)", "", *map(markdown_text, notes)]
    if "gold" in drawn:
        lines += ["", "## Gold against reward", "", "![gold against reward](gold.png)"]
    if "watch" in drawn:
        lines += ["", "## Over-optimisation", "", "![held-out reward and gold against KL while training](watch.png)"]
    found = [[policy.name, f["name"], f["evidence"], f["advice"]] for policy in data.policies for f in policy.findings]
    if found:
        lines += ["", "## Findings", "", *markdown_table(["policy", "finding", "evidence", "advice"], found)]
    if "curves" in drawn:
        lines += ["", "## Training", "", "![training curves](curves.png)"]
    texts = [[str(row["prompt"]), *(_with_scores(row, side) for side in data.sides)] for row in data.samples[:samples]]
    lines += ["", "## Samples", "", *markdown_table(["prompt", *data.sides], texts), ""]
    return "\n".join(lines)


def _cell(data: ReportData, interval: Interval | None, metric: str) -> str:
    if interval is None:
        return ""
    if data.evaluation.optimum.small and metric == "fraction_of_optimum":
        return fraction_bound(interval.mean)
    return str(interval)


def _with_scores(row: dict[str, Any], side: str) -> str:
    scores = [f"{kind} {row[key]:.2f}" for kind in ("reward", "gold") if (key := f"{side}_{kind}") in row]
    return f"{row[side]}\n({', '.join(scores)})" if scores else str(row[side])


def write_report(data: ReportData, folder: Path) -> None:
    """report.html, report.md and its PNGs into `folder`."""
    (folder / "report.html").write_text(render_html(data), encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(data), encoding="utf-8")
    for name, plots in figures(data).items():
        save_png(plots, folder / f"{name}.png")
