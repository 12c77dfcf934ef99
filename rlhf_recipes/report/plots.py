"""What a report draws: the reward-KL frontier, gold against reward, training curves, over-optimisation."""

from collections.abc import Sequence
from statistics import fmean

from rlhf_recipes.metrics import HELD_OUT, SMALL_EFFECTIVE_SIZE, TRAINING
from rlhf_recipes.recipe.stages import JUDGED, Style
from rlhf_recipes.report.data import Interval, OptimalPoint, Policy, ReportData
from rlhf_recipes.report.drawing import Plot, Series

# Okabe and Ito's colours, as the stages have.
STYLES = {name: stage.style for name, stage in JUDGED.items() if stage.style is not None} | {
    "other": Style("other", "#CC79A7", "^", "top right"),
    "reference": Style("reference", "#222222", "X", "top right"),
    "best-of-n": Style("best-of-n", "#767676", "o", "bottom right"),
}
TRAINED = (*JUDGED, "other")
OPTIMAL_COLOUR = "#222222"
LINE_STYLES = ("-", "--", ":", "-.")  # of several runs of a stage, in turn
KL_AXIS = f"KL to the reference, {TRAINING['objective/kl'].unit}"


def figures(data: ReportData) -> dict[str, list[Plot]]:
    """Figure -> the plots in it, without figures that would be empty."""
    gold = gold_plot(data)
    found = {
        "frontier": [frontier_plot(data)],
        "gold": [gold] if gold else [],
        "watch": list(watch_plots(data).values()),
        "curves": list(curve_plots(data).values()),
    }
    return {name: plots for name, plots in found.items() if plots}


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
        dash=":",
    )
    stages, notes = _stage_series(data, "kl", "reward")
    series = [*_optimal_series(optimal), curve, *_reference_series(data, "kl", "reward"), *stages]
    if any(p.small for p in optimal):
        notes.insert(
            0,
            f"Hollow points on dashed lines: the optimum there rests on fewer than {SMALL_EFFECTIVE_SIZE} effective samples a "
            "prompt, so it is rough and probably too low.",
        )
    return Plot(KL_AXIS, "reward", series, notes, root=True)


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
        hollow = dash != "-"
        return Series(name, OPTIMAL_COLOUR, x, y, hover=hover, marker="o", hollow=hollow, dash=dash, legend=legend)

    drawn = [series("optimum", sound, "-")] if sound else []
    for at, proposal in enumerate(dict.fromkeys(p.proposal for p in weak)):
        name, chosen = "optimum, few effective samples", [p for p in weak if p.proposal == proposal]
        following = [p for p in sound if p.proposal == proposal and p.beta > chosen[-1].beta]
        if following:  # where dashed meets solid
            joint = [chosen[-1], following[0]]
            x, y = [p.kl for p in joint], [p.reward for p in joint]
            drawn.insert(0, Series(name, OPTIMAL_COLOUR, x, y, dash="--", legend=False))
        drawn.append(series(name, chosen, "--", legend=at == 0))
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
                    dash="-" if len(by_beta) > 1 else "",
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
    return [policy.name, *([trained] if trained else []), *(f"{HELD_OUT[m].label} {policy.metrics[m]}" for m in shown)]


def gold_plot(data: ReportData) -> Plot | None:
    """Gold against reward, which is what was maximised; None where the task has no gold_reward."""
    if not any("gold" in policy.metrics for policy in data.policies):
        return None
    n_of = {
        p.name: 1 if p.kind == "reference" else int(p.name.rpartition("-")[2]) for p in data.policies if p.kind not in TRAINED
    }
    best = sorted((p for p in data.policies if p.name in n_of and "gold" in p.metrics), key=lambda p: n_of[p.name])
    labels = [str(n_of[p.name]) if p.kind == "best-of-n" else "" for p in best]
    series = [_points(STYLES["best-of-n"], best, "reward", "gold", labels, dash=":")] if best else []
    stages, notes = _stage_series(data, "reward", "gold")
    return Plot("reward", "gold", [*series, *_reference_series(data, "reward", "gold"), *stages], notes)


def curve_plots(data: ReportData) -> dict[str, Plot]:
    """Metric -> its curve for every policy that logged it."""
    colours = curve_colours(data)
    curves = {metric: stage.online for stage in JUDGED.values() for metric in stage.curves}
    plots = {}
    for metric, online in curves.items():
        series = []
        for name, points in ((p.name, p.curves[metric]) for p in data.policies if metric in p.curves):
            colour, dash = colours[name]
            series.append(Series(name, colour, [x for x, _ in points], [y for _, y in points], dash=dash))
        if series:
            x_title = "episodes" if online else "optimizer steps"
            plots[metric] = Plot(x_title, "", series, title=f"{TRAINING[metric].label}\n{metric}")
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
            plots[metric] = Plot(KL_AXIS, metric, series, title=f"held-out {metric}", root=True)
    return plots


def curve_colours(data: ReportData) -> dict[str, tuple[str, str]]:
    """Policy -> colour and dash of its curve: its stage's colour, shaded and dashed to tell several runs apart."""
    styles = {}
    for kind in JUDGED:
        members = [p.name for p in data.policies if p.kind == kind]
        for at, name in enumerate(members):
            dash = LINE_STYLES[at % 4]
            styles[name] = (_shade(STYLES[kind].colour, at / max(1, len(members) - 1)), dash)
    return styles


def _shade(colour: str, towards: float) -> str:
    """`colour` mixed with up to half white; 0 leaves it as it is."""
    channels = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * 0.5 * towards):02x}" for c in channels)
