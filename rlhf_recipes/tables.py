"""What a stage shows at its end: tables for the terminal and for Markdown."""

import html
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

SIDES = ("reference", "policy")


def print_samples(rows: list[dict[str, Any]]) -> None:
    """Prompts with the continuations of reference and policy side by side, each with its reward and gold score."""
    table = Table("prompt", *SIDES, show_lines=True)
    for row in rows:
        table.add_row(escape(row["prompt"]), *(escape(_with_scores(row, side)) for side in SIDES))
    Console().print(table)


def print_summary(summary: dict[str, Any]) -> None:
    """Reference and policy on held-out prompts, one line each."""
    names = list(summary["policy"])
    table = Table("held-out", *names, title=f"{summary['prompts']} held-out prompts, {summary['seconds']:.0f} s")
    for side in SIDES:
        table.add_row(side, *(f"{summary[side].get(name, 0.0):.3f}" for name in names))
    Console().print(table)


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
