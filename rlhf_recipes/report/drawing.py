"""Plots drawn by matplotlib: a PNG beside a Markdown page, an SVG inside an HTML page.

Names and texts are escaped here, not before.
"""

import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SVG = "http://www.w3.org/2000/svg"
PIXELS = 1.4  # of the page for each of matplotlib's 72 units an inch, which makes its 9 points the page's 12.6 pixels


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
    marker: str = ""  # matplotlib's; none
    hollow: bool = False
    dash: str = ""  # matplotlib's line style; no line
    legend: bool = True


@dataclass(frozen=True)
class Plot:
    x_title: str
    y_title: str
    series: list[Series]
    notes: list[str] = field(default_factory=list)
    title: str = ""
    root: bool = False  # x on a square-root axis, as in Gao et al. 2022 (arXiv 2210.10760)


def save_png(plots: Sequence[Plot], file: Path) -> None:
    """Draws `plots` beside each other, up to three in a row, with one legend for all."""
    _figure(plots).savefig(file, metadata={"Software": None})


def svg(plots: Sequence[Plot], name: str, narrow: bool = False) -> str:
    """The same as an <svg> element whose text is text; a line under the pointer shows its name, a mark its numbers.

    Args:
        name: unique in the page; the ids of the clip paths and marks within the element are derived from it.
        narrow: for a phone, one plot in a row.
    """
    import matplotlib

    text = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans"}):
        _figure(plots, narrow).savefig(text, format="svg", transparent=True, metadata=nothing)
    for prefix, namespace in (("", SVG), ("xlink", "http://www.w3.org/1999/xlink")):  # the prefixes that HTML knows
        ElementTree.register_namespace(prefix, namespace)
    root = ElementTree.fromstring(text.getvalue())  # noqa: S314 - matplotlib wrote it
    groups = {group.attrib.pop("id", ""): group for group in root.iter(f"{{{SVG}}}g")}  # those ids recur in the page
    for at, series in enumerate(series for plot in plots for series in plot.series):
        line = groups[f"series-{at}"]
        marks = line.findall(f".//{{{SVG}}}use")
        drawn = [said for x, y, said in zip(series.x, series.y, series.hover, strict=False) if math.isfinite(x + y)]
        for element, said in [(line, [series.name]), *zip(marks, drawn, strict=False)]:
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = _readable("\n".join(said))
            element.insert(0, title)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib |= {"width": f"{PIXELS * width:.0f}"}
    del root.attrib["height"]
    return ElementTree.tostring(root, encoding="unicode")


def sqrt_ticks(highest: float) -> list[float]:
    """About six round values from 0 to `highest`, evenly spread on a square-root axis."""
    if highest <= 0:
        return [0.0]
    values = (highest * (at / 6) ** 2 for at in range(1, 7))
    return sorted({0.0, *(float(f"{v:.{2 if f'{v:e}'[0] == '1' else 1}g}") for v in values)})


def _figure(plots: Sequence[Plot], narrow: bool = False) -> Any:
    """A matplotlib figure, its series numbered through all plots as series-0, series-1, ..."""
    from matplotlib.figure import Figure

    columns = 1 if narrow else min(3, len(plots))
    rows = math.ceil(len(plots) / columns)
    width, height, single = (3.6, 2.5, (3.6, 3.8)) if narrow else (4 * columns, 2.7, (8, 5.2))
    figure = Figure(figsize=single if len(plots) == 1 else (width, height * rows + 0.5), dpi=150, layout="constrained")
    handles: dict[str, Any] = {}
    number = itertools.count()
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
            handle = _draw(axes, series, plot.root)
            handle[0].set_gid(f"series-{next(number)}")
            if series.legend:
                handles.setdefault(_short(series.name), handle)
        if plot.root:
            ticks = sqrt_ticks(max((x for s in plot.series for x in (*s.x, *(high for _, high in s.x_bars))), default=0.0))
            axes.set_xticks(_root(ticks), [f"{tick:g}" for tick in ticks])
    _add_legend(figure, handles)
    return figure


def _add_legend(figure: Any, handles: dict[str, Any]) -> None:
    """Above all plots, in as many columns as fit, up to four."""
    for columns in (4, 3, 2, 1):
        legend = figure.legend(
            list(handles.values()), ["-"] * len(handles), loc="outside upper center", ncols=columns, frameon=False, fontsize=8,
        )  # fmt: skip
        for text, name in zip(legend.get_texts(), handles, strict=True):
            text.set(text=name, parse_math=False)  # here, since as a label a leading underscore would hide it
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _draw(axes: Any, series: Series, root: bool) -> Any:
    scale = _root if root else list
    x = scale(series.x)
    errors = {}
    for name, centre, pairs in (("xerr", x, [scale(p) for p in series.x_bars]), ("yerr", series.y, series.y_bars)):
        if pairs:  # matplotlib refuses a negative length
            sides = [(max(0.0, c - low), max(0.0, high - c)) for c, (low, high) in zip(centre, pairs, strict=True)]
            errors[name] = list(map(list, zip(*sides, strict=True)))
    handle = axes.errorbar(
        x, series.y, color=series.colour, linestyle=series.dash or "none", linewidth=1.3, elinewidth=0.8,
        marker=series.marker, markersize=5, markerfacecolor="white" if series.hollow else series.colour, **errors,
    )  # fmt: skip
    for at, (label, side) in enumerate(zip(series.labels, itertools.cycle(series.label_sides), strict=False)):
        vertical, _, horizontal = side.partition(" ")
        offset = ({"left": -5, "center": 0, "right": 5}[horizontal], 4 if vertical == "top" else -4)
        align = {"left": "right", "center": "center", "right": "left"}[horizontal]
        axes.annotate(
            _short(label), (x[at], series.y[at]), offset, textcoords="offset points", fontsize=8, parse_math=False,
            color=series.colour, ha=align, va="bottom" if vertical == "top" else "top",
        )  # fmt: skip
    return handle


def _root(values: Iterable[float]) -> list[float]:
    """Square roots; an estimated KL may be a little below zero."""
    return [math.sqrt(max(value, 0.0)) for value in values]


def _short(text: str) -> str:
    """A name on one line, cut where it would leave no room for the plot."""
    line = " ".join(_readable(text).split())
    return line if len(line) <= 32 else f"{line[:31]}…"


def _readable(text: str) -> str:
    """Text without the characters that XML does not allow."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", text)
