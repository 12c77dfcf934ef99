"""The tables that a stage ends with, for the terminal and for Markdown."""

import html
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_recipes.metrics import label_of
from rlhf_recipes.runs.fingerprint import describe_reward

SIDES = ("reference", "policy")


def print_samples(rows: list[dict[str, Any]], sides: Sequence[str] = SIDES) -> None:
    """Prompts with the continuations of each of `sides` beside each other, with their rewards and gold scores."""
    table = Table("prompt", *sides, show_lines=True)
    for row in rows:
        table.add_row(_plain(row["prompt"]), *(_plain(_with_scores(row, side)) for side in sides))
    Console().print(table)


def print_summary(summary: dict[str, Any]) -> None:
    """Reference and policy on held-out prompts, one line each."""
    names = list(summary["policy"])
    table = Table("held-out", *map(label_of, names), title=f"{summary['prompts']} held-out prompts, {summary['seconds']:.0f} s")
    for side in SIDES:
        table.add_row(side, *(f"{summary[side].get(name, 0.0):.3f}" for name in names))
    _wide_console().print(table)


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """One row for each policy with its run, means and 95% intervals; then the optimum and the notes."""
    policies, runs, bound = evaluation["policies"], evaluation["runs"], evaluation["optimum"]["bound"]
    metrics = list(next(iter(policies.values())))
    judged_by = describe_reward(evaluation["judged_by"]["parts"]["reward"])
    title = (
        f"{evaluation['prompts']} held-out prompts, {evaluation['completions']} completions each, beta {evaluation['beta']}, "
        f"judged by {_plain(judged_by)}"
    )
    table = Table("policy", *map(label_of, metrics), title=title, show_lines=True)
    for name, measured in policies.items():
        cells = []
        for key in metrics:
            m = measured[key]
            own = f"{m['mean']:.3f}\n{m['low']:.2f} to {m['high']:.2f}"
            cells.append(fraction_bound(m["mean"]) if bound and key == "fraction_of_optimum" else own)
        table.add_row(escape(name + (f"\n{runs[name]}" if runs.get(name, name) != name else "")), *cells)
    _wide_console(20 * len(metrics)).print(table)
    optimum = evaluation["optimum"]
    print(optimum_text(optimum["objective"], optimum["effective_sample_size"], optimum["proposal"], bound))
    for note in evaluation["notes"]:
        print(note)


def optimum_text(objective: float, size: float, proposal: str, bound: bool) -> str:
    """J* and what it rests on, for the terminal and for the report."""
    rests = f"from samples of {proposal}; effective sample size {size:.1f} a prompt"
    if bound:
        return f"J* >= {objective:.3f}, a bound {rests}, too few for an estimate: fractions of the optimum are at most these."
    return f"J* is about {objective:.3f}, {rests}."


def fraction_bound(fraction: float) -> str:
    """A fraction of an optimum of which only a lower bound is known; of a policy below the reference it is one from below."""
    return f"{fraction:.3f}" if fraction == 0 else f"at {'most' if fraction > 0 else 'least'} {fraction:.3f}"


def print_rows(head: list[str], rows: list[list[str]], title: str) -> None:
    """Any table of texts, which cannot become markup."""
    table = Table(*map(_plain, head), title=_plain(title))
    for row in rows:
        table.add_row(*map(_plain, row))
    _wide_console().print(table)


def _wide_console(width: int = 200) -> Console:
    """A log file has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else max(200, width))


def _plain(text: str) -> str:
    """Text that neither rich nor the terminal obeys: an escape sequence can retitle, recolour or overwrite it."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text))


def markdown_samples(rows: list[dict[str, Any]]) -> str:
    """The same samples as a Markdown table."""
    cells = [[row["prompt"], *(_with_scores(row, side) for side in SIDES)] for row in rows]
    return "\n".join(markdown_table(["prompt", *SIDES], cells))


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table, whose texts cannot become markup."""
    first, *others = [f"| {' | '.join(map(markdown_text, row))} |" for row in [head, *rows]]
    return [first, "| --- " * len(head) + "|", *others]


def fenced(text: str, language: str) -> str:
    """Text as a block of code in Markdown, whose fence is longer than any in the text."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"


def markdown_text(text: str) -> str:
    """Text that is no markup in Markdown: neither HTML nor emphasis, code, links, images or a table's border."""
    escaped = re.sub(r"[|`*_\[\]\\~$]", lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))
    return re.sub(r"\r\n|\r|\n", "<br>", escaped)


def _with_scores(row: dict[str, Any], side: str) -> str:
    gold = f", gold {row[f'{side}_gold']:.2f}" if f"{side}_gold" in row else ""
    return f"{row[side]}\n(reward {row[f'{side}_reward']:.2f}{gold})"
