"""What a report draws, once for two renderers: plotly in report.html and matplotlib in the PNGs of report.md.

All names and texts are escaped where they are rendered, not before.
"""

import html
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_recipes.evaluation.yardstick import SMALL_EFFECTIVE_SIZE
from rlhf_recipes.recipe.stages import JUDGED, Style
from rlhf_recipes.report.data import METRICS, Interval, OptimalPoint, Policy, ReportData

# Okabe and Ito's colours, as the stages have.
STYLES = {name: stage.style for name, stage in JUDGED.items() if stage.style is not None} | {
    "other": Style("other", "#CC79A7", "triangle-up", "top right"),
    "reference": Style("reference", "#222222", "x", "top right"),
    "best-of-n": Style("best-of-n", "#767676", "circle", "bottom right"),
}
TRAINED = (*JUDGED, "other")
OPTIMAL_COLOUR = "#222222"


@dataclass(frozen=True)
class Series:
    """One line or cloud of points, in a plot's own units; bars are (low, high) of each point."""

    name: str
    colour: str
    x: list[float]
    y: list[float]
    x_bars: list[tuple[float, float]] = field(default_factory=list)
    y_bars: list[tuple[float, float]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    label_sides: tuple[str, ...] = ("top right",)  # taken in turn
    hover: list[list[str]] = field(default_factory=list)  # lines of text
    marker: str = ""  # none
    hollow: bool = False
    dash: str = ""  # no line; or solid, dash, dot, ...
    legend: bool = True


@dataclass(frozen=True)
class Plot:
    x_title: str
    y_title: str
    series: list[Series]
    notes: list[str] = field(default_factory=list)
    title: str = ""


def frontier_plot(data: ReportData) -> Plot:
    """Reward against KL: every policy, best-of-n, and the optimum over beta."""
    optimal, best_of_n = data.evaluation.frontiers.optimal, data.evaluation.frontiers.best_of_n
    by_name = {policy.name: policy for policy in data.policies}
    measured = [by_name.get(f"best-of-{p.n}" if p.n > 1 else "reference") for p in best_of_n]
    rewards = [(policy.metrics["reward"] if policy else Interval(p.reward, p.reward, p.reward))
               for policy, p in zip(measured, best_of_n, strict=True)]  # fmt: skip
    style = STYLES["best-of-n"]
    curve = Series(
        style.label,
        style.colour,
        [p.kl for p in best_of_n],
        [p.reward for p in best_of_n],
        y_bars=[(r.low, r.high) for r in rewards],
        labels=[str(p.n) if p.n > 1 else "" for p in best_of_n],
        label_sides=(style.label_side,),
        hover=[[f"best-of-{p.n}", f"reward {p.reward:.3f}", f"KL {p.kl:.3f} nats"] for p in best_of_n],
        marker=style.marker,
        dash="dot",
    )
    stages, notes = _stage_series(data, "kl", "reward")
    series = [*_optimal_series(optimal), curve, *_reference_series(data, "kl", "reward"), *stages]
    if any(p.small for p in optimal):
        notes.insert(
            0,
            f"Hollow points on dashed lines: the optimum there rests on fewer than {SMALL_EFFECTIVE_SIZE} effective samples a "
            "prompt, so it is rough and probably too low.",
        )
    return Plot("KL to the reference, nats a sequence", "reward", series, notes)


def _optimal_series(points: Sequence[OptimalPoint]) -> list[Series]:
    """The frontier in order of beta: solid where the estimate holds; hollow and dashed, proposal by proposal, where not."""
    points = sorted(points, key=lambda p: p.beta)
    sound, weak = [p for p in points if not p.small], [p for p in points if p.small]

    def series(name: str, chosen: list[OptimalPoint], dash: str, legend: bool = True) -> Series:
        hover = [
            [
                f"optimum at β {p.beta:g}", f"reward {p.reward:.3f}", f"KL {p.kl:.3f} nats",
                f"effective sample size {p.effective_sample_size:.1f} a prompt, samples of {p.proposal}",
            ]
            for p in chosen
        ]  # fmt: skip
        x, y = [p.kl for p in chosen], [p.reward for p in chosen]
        hollow = dash != "solid"
        return Series(name, OPTIMAL_COLOUR, x, y, hover=hover, marker="circle", hollow=hollow, dash=dash, legend=legend)

    drawn = [series("optimum", sound, "solid")] if sound else []
    for at, proposal in enumerate(dict.fromkeys(p.proposal for p in weak)):
        name, chosen = "optimum, few effective samples", [p for p in weak if p.proposal == proposal]
        following = [p for p in sound if p.proposal == proposal and p.beta > chosen[-1].beta]
        if following:  # where dashed meets solid
            joint = [chosen[-1], following[0]]
            x, y = [p.kl for p in joint], [p.reward for p in joint]
            drawn.insert(0, Series(name, OPTIMAL_COLOUR, x, y, dash="dash", legend=False))
        drawn.append(series(name, chosen, "dash", legend=at == 0))
    return drawn


def _reference_series(data: ReportData, x: str, y: str) -> list[Series]:
    style = STYLES["reference"]
    found = [p for p in data.policies if p.kind == "reference"]
    return [_points(style, found, x, y, [""] * len(found))] if found else []


def _stage_series(data: ReportData, x: str, y: str) -> tuple[list[Series], list[str]]:
    """For each stage the points of its policies, a line through the mean of each beta in order of beta, and notes.

    A point is labelled with its beta, or with its name where it has none or where runs at one beta differ in more than seed.
    """
    drawn, notes = [], []
    for kind in TRAINED:
        style = STYLES[kind]
        members = [p for p in data.policies if p.kind == kind and x in p.metrics and y in p.metrics]
        if not members:
            continue
        by_beta: dict[float, list[Policy]] = {}
        for policy in sorted((p for p in members if p.beta is not None and kind != "other"), key=lambda p: p.beta or 0):
            by_beta.setdefault(policy.beta or 0.0, []).append(policy)
        differing = {beta: differing_settings(group) for beta, group in by_beta.items()}
        if by_beta:
            mean_x, mean_y = ([fmean(p.metrics[m].mean for p in group) for group in by_beta.values()] for m in (x, y))
            drawn.append(
                Series(
                    style.label,
                    style.colour,
                    mean_x,
                    mean_y,
                    labels=["" if differing[beta] else f"β {beta:g}" for beta in by_beta],
                    label_sides=(style.label_side,),
                    dash="solid" if len(by_beta) > 1 else "",
                    legend=False,
                )
            )
            averaged = "; the line takes their mean" if len(by_beta) > 1 else ""
            notes += [
                f"At β {beta:g} the {style.label} runs also differ in {', '.join(keys)}{averaged}."
                for beta, keys in differing.items()
                if keys
            ]
        named = [p.name if p.beta is None or kind == "other" or differing[p.beta] else "" for p in members]
        by_x = sorted(range(len(members)), key=lambda at: members[at].metrics[x].mean)
        left = set(by_x[: (len(by_x) + 1) // 2])  # names grow away from each other
        sides = tuple("top left" if at in left else "top right" for at in range(len(members)))
        drawn.append(_points(style, members, x, y, named, sides))
    return drawn, notes


def differing_settings(policies: Sequence[Policy]) -> list[str]:
    """The recipe keys, beta and seed aside, in which runs differ."""
    keys = sorted(set().union(*(p.settings for p in policies)))
    return [key for key in keys if any(p.settings.get(key) != policies[0].settings.get(key) for p in policies)]


def _points(
    style: Style, policies: Sequence[Policy], x: str, y: str, labels: list[str], sides: tuple[str, ...] = (), dash: str = ""
) -> Series:
    xs, ys = ([p.metrics[m] for p in policies] for m in (x, y))
    return Series(
        style.label,
        style.colour,
        [i.mean for i in xs],
        [i.mean for i in ys],
        x_bars=[(i.low, i.high) for i in xs],
        y_bars=[(i.low, i.high) for i in ys],
        labels=labels,
        label_sides=sides or (style.label_side,),
        hover=[_describe(p) for p in policies],
        marker=style.marker,
        dash=dash,
    )


def _describe(policy: Policy) -> list[str]:
    trained = ", ".join(f"{k} {v:g}" for k, v in (("β", policy.beta), ("seed", policy.seed)) if v is not None)
    shown = [m for m in ("reward", "kl", "objective", "gold") if m in policy.metrics]
    lines = [f"{METRICS[m]} {i.mean:.3f} ({i.low:.3f} to {i.high:.3f})" for m in shown for i in [policy.metrics[m]]]
    return [policy.name, *([trained] if trained else []), *lines]


def gold_plot(data: ReportData) -> Plot | None:
    """Gold against reward, which is what was maximised; None where the task has no gold_reward."""
    if not any("gold" in policy.metrics for policy in data.policies):
        return None
    n_of = {
        p.name: 1 if p.kind == "reference" else int(p.name.rpartition("-")[2]) for p in data.policies if p.kind not in TRAINED
    }
    best = sorted((p for p in data.policies if p.name in n_of and "gold" in p.metrics), key=lambda p: n_of[p.name])
    labels = [str(n_of[p.name]) if p.kind == "best-of-n" else "" for p in best]
    series = [_points(STYLES["best-of-n"], best, "reward", "gold", labels, dash="dot")] if best else []
    stages, notes = _stage_series(data, "reward", "gold")
    return Plot("reward", "gold", [*series, *_reference_series(data, "reward", "gold"), *stages], notes)


def curve_plots(data: ReportData) -> dict[str, Plot]:
    """Metric -> its curve for every policy that logged it."""
    colours = curve_colours(data)
    titles = {metric: (title, stage.online) for stage in JUDGED.values() for metric, title in stage.curves.items()}
    plots = {}
    for metric, (title, episodes) in titles.items():
        series = []
        for name, points in ((p.name, p.curves[metric]) for p in data.policies if metric in p.curves):
            colour, dash = colours[name]
            series.append(Series(name, colour, [x for x, _ in points], [y for _, y in points], dash=dash))
        if series:
            plots[metric] = Plot("episodes" if episodes else "optimizer steps", "", series, title=title)
    return plots


def watch_plots(data: ReportData) -> dict[str, Plot]:
    """Held-out reward and gold against KL while a policy trained, as in Gao et al. 2022 (arXiv 2210.10760), figure 1.

    The point of the highest gold is labelled with its step: past it, what the reward gains is over-optimisation.
    """
    colours = curve_colours(data)
    plots = {}
    for metric in ("reward", "gold"):
        series = []
        for policy in data.policies:
            rows = [row for row in policy.watched if f"eval/{metric}" in row]
            if not rows:
                continue
            colour, dash = colours[policy.name]
            peak = max(rows, key=lambda row: row.get("eval/gold", row["eval/reward"]))
            kl, y = [max(0.0, row["eval/kl"]) for row in rows], [row[f"eval/{metric}"] for row in rows]
            errors = [1.96 * row.get(f"eval/{metric}_se", 0.0) for row in rows]
            series.append(
                Series(
                    policy.name,
                    colour,
                    kl,
                    y,
                    y_bars=[(value - error, value + error) for value, error in zip(y, errors, strict=True)],
                    labels=[f"best gold: step {row['step']}" if row is peak and "eval/gold" in row else "" for row in rows],
                    label_sides=("top left",),
                    hover=[[policy.name, f"step {row['step']}", f"{metric} {row[f'eval/{metric}']:.3f}"] for row in rows],
                    marker=STYLES[policy.kind].marker,
                    dash=dash,
                )
            )
        if series:
            plots[metric] = Plot("KL to the reference, nats a sequence", metric, series, title=f"held-out {metric}")
    return plots


def curve_colours(data: ReportData) -> dict[str, tuple[str, str]]:
    """Policy -> colour and dash of its curve: its stage's colour, shaded and dashed to tell several runs apart."""
    styles = {}
    for kind in JUDGED:
        members = [p.name for p in data.policies if p.kind == kind]
        for at, name in enumerate(members):
            dash = ("solid", "dash", "dot", "dashdot")[at % 4]
            styles[name] = (_shade(STYLES[kind].colour, at / max(1, len(members) - 1)), dash)
    return styles


def _shade(colour: str, towards: float) -> str:
    """`colour` mixed with up to half white; 0 leaves it as it is."""
    channels = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * 0.5 * towards):02x}" for c in channels)


def sqrt_ticks(highest: float) -> list[float]:
    """About six round values from 0 to `highest`, evenly spread on a square-root axis."""
    if highest <= 0:
        return [0.0]
    values = (highest * (at / 6) ** 2 for at in range(1, 7))
    return sorted({0.0, *(float(f"{v:.{2 if f'{v:e}'[0] == '1' else 1}g}") for v in values)})


def _root(values: Iterable[float]) -> list[float]:
    """Square roots; an estimated KL may be a little below zero."""
    return [math.sqrt(max(0.0, value)) for value in values]


# --- plotly ------------------------------------------------------------------------------------------------------


def plotly_figure(plot: Plot, square_root_x: bool = False) -> dict[str, Any]:
    """The figure as plain JSON; plotly has no square-root axis, so x is transformed and the ticks are named."""
    import plotly.graph_objects as go

    axis = {"gridcolor": "#ececec", "zeroline": False, "linecolor": "#999999", "ticks": "outside", "tickcolor": "#999999"}
    axis |= {"automargin": True}
    ticks: dict[str, Any] = {}
    if square_root_x:
        values = sqrt_ticks(max((x for series in plot.series for x in _reach(series)), default=0.0))
        ticks = {"tickvals": _root(values), "ticktext": [f"{value:g}" for value in values]}
    figure = go.Figure(
        [_trace(series, square_root_x) for series in plot.series],
        {
            "xaxis": {"title": {"text": plot.x_title}, **axis, **ticks},
            "yaxis": {"title": {"text": plot.y_title, "standoff": 12}, **axis},
            "showlegend": False,
            "margin": {
                "l": 48,
                "r": 40 if any(any(s.labels) for s in plot.series) else 14,
                "t": 10,
                "b": 44,
            },  # room for a label
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": "#333333"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "hoverlabel": {"align": "left", "bgcolor": "#ffffff", "font": {"color": "#222222"}},
            "template": "none",
        },
    )
    return json.loads(figure.to_json())


def _reach(series: Series) -> list[float]:
    return [*series.x, *(high for _, high in series.x_bars)]


def _trace(series: Series, square_root_x: bool) -> Any:
    """A plotly scatter; its text is HTML to plotly, hence the escapes."""
    import plotly.graph_objects as go

    scale = _root if square_root_x else list
    x = scale(series.x)
    labelled = any(series.labels)
    parts = (("lines", series.dash), ("markers", series.marker or labelled), ("text", labelled))
    mode = "+".join(part for part, on in parts if on)
    fill = "#ffffff" if series.hollow else series.colour
    marker = {"symbol": series.marker, "size": 9 if series.name in {s.label for s in STYLES.values()} else 7, "color": fill,
              "line": {"color": series.colour, "width": 1.5 if series.hollow else 0}}  # fmt: skip
    bars = {}
    for axis, centre, pairs in (("x", x, [scale(p) for p in series.x_bars]), ("y", series.y, series.y_bars)):
        if pairs:
            bars[f"error_{axis}"] = {
                "type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": series.colour,
                "array": [high - c for c, (_, high) in zip(centre, pairs, strict=True)],
                "arrayminus": [c - low for c, (low, _) in zip(centre, pairs, strict=True)],
            }  # fmt: skip
    return go.Scatter(
        x=x,
        y=series.y,
        mode=mode or "none",
        name=_plotly_text(series.name),
        meta=series.name,
        showlegend=series.legend,
        line={"color": series.colour, "dash": series.dash or "solid", "width": 1.75},
        marker=marker if series.marker else {"size": 12, "opacity": 0},  # unseen, it keeps a label off its point
        text=[_plotly_text(label) for label in series.labels] or None,
        textposition=[side for side, _ in zip(itertools.cycle(series.label_sides), series.x, strict=False)],
        textfont={"color": series.colour, "size": 11},
        hovertext=["<br>".join(map(_plotly_text, lines)) for lines in series.hover] or None,
        hoverinfo="text" if series.hover else ("x+y" if not series.labels else "skip"),
        cliponaxis=False,
        **bars,
    )


def _plotly_text(text: str) -> str:
    return html.escape(text, quote=False)


# --- matplotlib --------------------------------------------------------------------------------------------------

_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X"}
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


def save_png(plots: Sequence[Plot], file: Path, square_root_x: bool = False) -> None:
    """Draws `plots` beside each other, up to three in a row, with one legend for all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(plots))
    rows = math.ceil(len(plots) / columns)
    size = (8, 5.2) if len(plots) == 1 else (4 * columns, 2.7 * rows + 0.5)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for at, plot in enumerate(plots):
        axes = figure.add_subplot(rows, columns, at + 1)
        axes.set_title(plot.title, fontsize=9)
        axes.set_xlabel(plot.x_title, fontsize=9)
        axes.set_ylabel(plot.y_title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#ececec")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for series in plot.series:
            handle = _draw(axes, series, square_root_x)
            if series.legend:
                handles.setdefault(_matplotlib_text(series.name), handle)
        if square_root_x:
            ticks = sqrt_ticks(max((x for series in plot.series for x in _reach(series)), default=0.0))
            axes.set_xticks(_root(ticks), [f"{tick:g}" for tick in ticks])
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Software": None})


def _draw(axes: Any, series: Series, square_root_x: bool) -> Any:
    scale = _root if square_root_x else list
    x = scale(series.x)
    errors = {}
    for name, centre, pairs in (("xerr", x, [scale(p) for p in series.x_bars]), ("yerr", series.y, series.y_bars)):
        if pairs:  # matplotlib refuses a negative length, plotly does not
            sides = [(max(0.0, c - low), max(0.0, high - c)) for c, (low, high) in zip(centre, pairs, strict=True)]
            errors[name] = list(map(list, zip(*sides, strict=True)))
    handle = axes.errorbar(
        x, series.y, color=series.colour, linestyle=_DASHES.get(series.dash, "none"), linewidth=1.3, elinewidth=0.8,
        marker=_MARKERS.get(series.marker, ""), markersize=5, markerfacecolor="white" if series.hollow else series.colour,
        **errors,
    )  # fmt: skip
    for at, (label, side) in enumerate(zip(series.labels, itertools.cycle(series.label_sides), strict=False)):
        vertical, _, horizontal = side.partition(" ")
        offset = ({"left": -5, "center": 0, "right": 5}[horizontal], 4 if vertical == "top" else -4)
        align = {"left": "right", "center": "center", "right": "left"}[horizontal]
        axes.annotate(
            _matplotlib_text(label), (x[at], series.y[at]), offset, textcoords="offset points", fontsize=8,
            color=series.colour, ha=align, va="bottom" if vertical == "top" else "top",
        )  # fmt: skip
    return handle


def _matplotlib_text(text: str) -> str:
    """`$` would start a formula, and a leading underscore hides a legend entry."""
    return re.sub(r"^_", "\u200b_", text.replace("$", r"\$"))
