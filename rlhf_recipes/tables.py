"""What a stage shows at its end: tables for the terminal and for Markdown."""

import html
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

SIDES = ("reference", "policy")


def print_samples(rows: list[dict[str, Any]], sides: Sequence[str] = SIDES) -> None:
    """Prompts with the continuations of each of `sides` beside each other, with their rewards and gold scores."""
    table = Table("prompt", *sides, show_lines=True)
    for row in rows:
        table.add_row(escape(row["prompt"]), *(escape(_with_scores(row, side)) for side in sides))
    Console().print(table)


def print_summary(summary: dict[str, Any]) -> None:
    """Reference and policy on held-out prompts, one line each."""
    names = list(summary["policy"])
    table = Table("held-out", *names, title=f"{summary['prompts']} held-out prompts, {summary['seconds']:.0f} s")
    for side in SIDES:
        table.add_row(side, *(f"{summary[side].get(name, 0.0):.3f}" for name in names))
    _wide_console().print(table)


def print_evaluation(evaluation: dict[str, Any], small: float) -> None:
    """A row a policy, mean and 95% interval; then the optimum, flagged where its effective sample size is under `small`."""
    policies = evaluation["policies"]
    metrics = list(next(iter(policies.values())))
    title = f"{evaluation['prompts']} held-out prompts, {evaluation['completions']} completions each, beta {evaluation['beta']}"
    table = Table("policy", *metrics, title=title, show_lines=True)
    for name, measured in policies.items():
        cells = (f"{m['mean']:.3f}\n{m['low']:.2f} to {m['high']:.2f}" for m in (measured[k] for k in metrics))
        table.add_row(escape(name), *cells)
    _wide_console().print(table)
    for name, measured in evaluation.get("exact", {}).items():
        print(f"{name} by enumeration: " + ", ".join(f"{key} {value:.4f}" for key, value in measured.items()))
    optimum = evaluation["optimum"]
    size = optimum["effective_sample_size"]
    flag = f": SMALL (under {small}), so J* is probably higher and the fractions lower" if size < small else ""
    print(
        f"J* {optimum['objective']:.3f}, from samples of {optimum['proposal']}; effective sample size {size:.1f} a prompt{flag}"
    )


def _wide_console() -> Console:
    """A log file has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else 200)


def markdown_samples(rows: list[dict[str, Any]]) -> str:
    """The same samples as a Markdown table; model output cannot become markup."""
    lines = ["| prompt | reference | policy |", "| --- | --- | --- |"]
    for row in rows:
        cells = [row["prompt"], *(_with_scores(row, side) for side in SIDES)]
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")


def _with_scores(row: dict[str, Any], side: str) -> str:
    gold = f", gold {row[f'{side}_gold']:.2f}" if f"{side}_gold" in row else ""
    return f"{row[side]}\n(reward {row[f'{side}_reward']:.2f}{gold})"
