"""scripts/report.py on a synthetic evaluation: its numbers, what it draws, and that no text becomes markup."""

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from rlhf_recipes.report.data import load_report_data
from rlhf_recipes.report.drawing import Plot, Series, sqrt_ticks, svg
from rlhf_recipes.report.page import headline, render_html, render_markdown, table_metrics, write_report
from rlhf_recipes.report.plots import curve_plots, differing_settings, figures, frontier_plot, gold_plot, watch_plots

EVIL = "<script>alert(1)</script> </script> <!-- | `x` ![i](http://x.example/i.png)"
FOREIGN = "<b>foreign</b> $x$"  # HTML to a browser, a formula to matplotlib

# name: stage, beta, seed, reward, kl, gold
TRAINED = {
    "ppo-low": ("ppo", 0.05, 0, 3.0, 10.0, 0.80),
    "ppo-a": ("ppo", 0.2, 0, 2.0, 4.0, 0.90),
    "ppo-b": ("ppo", 0.2, 1, 2.2, 5.5, 0.92),
    "a2c": ("a2c", 0.2, 0, 1.8, 3.5, 0.85),
    "dpo": ("dpo", 0.2, 0, 1.5, 6.0, 0.70),
    FOREIGN: (None, None, None, 1.0, 2.0, 0.60),
}
UNTRAINED = {"reference": (0.5, 0.0, 0.5), "best-of-4": (1.2, 0.636, 0.6), "best-of-16": (1.6, 1.835, 0.65)}
BETA = 0.2


def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.2}


def metrics(reward, kl, gold):
    objective = reward - BETA * kl
    values = {"reward": reward, "kl": kl, "kl_k3": kl, "objective": objective, "win_rate": 0.7, "length": 31.5, "gold": gold}
    return {name: interval(value) for name, value in (values | {"fraction_of_optimum": 0.25, "distinct_2": 0.8}).items()}


def write_run(folder, stage, beta, seed):
    folder.mkdir(parents=True)
    finding = {"name": "reward hacking", "evidence": f"gold fell {EVIL}", "advice": "Raise `objective.beta`"}
    summary = {"task": "toy", "stage": stage, "seed": seed, "beta": beta, "findings": [finding] if stage == "ppo" else []}
    (folder / "summary.json").write_text(json.dumps(summary))
    resolved = {"objective": {"beta": beta}, "run": {"seed": seed}, stage: {"learning_rate": 1e-4}, "lora": {"r": 4}}
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(resolved))
    if stage == "dpo":
        rows = [{"step": s, "loss": 0.7 - s / 100, "rewards/margins": s / 10, "rewards/accuracies": 0.5} for s in (10, 20)]
    else:
        keys = ("objective/scores", "objective/kl", "objective/rlhf_reward", "policy/entropy_avg")
        rows = [{"step": s, "episode": 64 * s, **dict.fromkeys(keys, s / 2)} for s in (1, 2, 3)]
        rows[1]["objective/kl"] = float("nan")
        rows += [
            {"step": 10 * i, "eval/reward": r, "eval/reward_se": 0.1, "eval/gold": g, "eval/gold_se": 0.02, "eval/kl": kl}
            for i, (r, g, kl) in enumerate([(0.5, 0.5, -0.01), (2.0, 0.8, 4.0), (3.0, 0.6, 9.0)])
        ]
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*rows, {"step": 99, "eval/reward": 1.0}])


def write_evaluation(outputs: Path) -> Path:
    """outputs/evaluate/e and the runs it judged."""
    folders = {name: outputs / stage / name if stage else outputs / "gone" for name, (stage, *_) in TRAINED.items()}
    for name, (stage, beta, seed, *_) in TRAINED.items():
        if stage:
            write_run(folders[name], stage, beta, seed)
    policies = {name: metrics(*values) for name, values in UNTRAINED.items()}
    policies |= {name: metrics(*values[3:]) for name, values in TRAINED.items()}
    optimal = [
        {"beta": beta, "reward": 3.5 - beta, "kl": 4 - 3 * beta, "effective_sample_size": size, "proposal": proposal}
        for beta, size, proposal in ((1.0, 40, "reference"), (0.1, 1.5, "ppo-a"), (0.4, 20, "reference"), (0.2, 3, "reference"))
    ]
    evaluation = {
        "beta": BETA,
        "prompts": 12,
        "completions": 8,
        "optimum": {"objective": 2.75, "effective_sample_size": 3.25, "proposal": "ppo-a"},
        "policies": policies,
        "folders": {name: str(folder) for name, folder in folders.items()},
        "frontiers": {"optimal": optimal, "best_of_n": [{"n": n, "kl": n / 4, "reward": n / 3} for n in (1, 2, 4)]},
    }
    folder = outputs / "evaluate" / "e"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "summary.json").write_text(json.dumps({"task": "toy", "stage": "evaluate"}))
    with (folder / "samples.jsonl").open("w") as file:
        for i in range(12):
            row = {"prompt": EVIL if i == 0 else f"prompt {i}"}
            for at, name in enumerate(["reference", *TRAINED]):
                text = EVIL if i == 0 and at == 1 else f"text {i} of {at}\u2028"
                row |= {name: text, f"{name}_reward": i + at / 10, f"{name}_gold": 0.5}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (folder.parent / "latest").symlink_to("e")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_evaluation(tmp_path_factory.mktemp("outputs") / "toy")


@pytest.fixture(scope="module")
def data(folder):
    return load_report_data(folder)


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    target = tmp_path_factory.mktemp("report")
    write_report(data, target)
    return target


SVG = "{http://www.w3.org/2000/svg}"


def parsed(text):
    return ElementTree.fromstring(text)  # noqa: S314 - our own


# --- what is read and drawn --------------------------------------------------------------------------------------


def test_policies_know_their_stage_beta_and_seed(data):
    assert data.task == "toy"
    assert [p.name for p in data.policies] == [*UNTRAINED, *TRAINED]
    for policy in data.policies:
        if policy.name in TRAINED:
            stage, beta, seed, *_ = TRAINED[policy.name]
            assert (policy.kind, policy.beta, policy.seed) == (stage or "other", beta, seed)
    assert data.sides == ["reference", *TRAINED]


def test_a_run_that_has_no_summary_yet_is_known_by_its_resolved_recipe(tmp_path):
    folder = write_evaluation(tmp_path / "toy")
    (tmp_path / "toy/ppo/ppo-low/summary.json").unlink()
    policy = next(p for p in load_report_data(folder).policies if p.name == "ppo-low")
    assert (policy.kind, policy.beta, policy.seed) == ("ppo", 0.05, 0)


def by_legend(plot, name):
    return [s for s in plot.series if s.name == name]


def test_the_frontier_joins_the_betas_of_a_stage_in_order_and_averages_seeds(data):
    path, points = by_legend(frontier_plot(data), "PPO")
    assert path.labels == ["β 0.05", "β 0.2"]
    assert path.x == pytest.approx([10.0, 4.75])
    assert path.y == pytest.approx([3.0, 2.1])
    assert path.dash == "-"
    assert list(zip(points.x, points.y, strict=True)) == [(10.0, 3.0), (4.0, 2.0), (5.5, 2.2)]
    assert np.array(points.y_bars) == pytest.approx(np.array([(2.9, 3.2), (1.9, 2.2), (2.1, 2.4)]))
    [foreign] = by_legend(frontier_plot(data), "other")
    assert foreign.labels == [FOREIGN]


def test_optimal_points_on_few_effective_samples_are_hollow_and_said_so(data):
    plot = frontier_plot(data)
    [sound] = by_legend(plot, "optimum")
    assert (sound.x, sound.hollow, sound.dash) == (pytest.approx([2.8, 1.0]), False, "-")  # beta 0.4, 1
    weak = by_legend(plot, "optimum, few effective samples")
    assert sum(s.legend for s in weak) == 1
    assert all(s.dash == "--" for s in weak)
    assert [s.x for s in weak if s.marker] == [pytest.approx([3.7]), pytest.approx([3.4])]  # a proposal each
    assert all(s.hollow for s in weak if s.marker)
    assert [s.x for s in weak if not s.marker] == [pytest.approx([3.4, 2.8])]  # dashed from beta 0.2 to the solid line
    assert "fewer than 10 effective samples" in plot.notes[0]


def test_best_of_n_carries_the_intervals_that_were_measured(data):
    [curve] = by_legend(frontier_plot(data), "best-of-n")
    assert curve.labels == ["", "2", "4"]
    assert curve.y_bars[0] == pytest.approx((0.4, 0.7))  # the reference
    assert curve.y_bars[1] == (2 / 3, 2 / 3)  # not measured
    assert curve.y_bars[2] == pytest.approx((1.1, 1.4))


def test_gold_is_drawn_against_reward_for_every_policy(data):
    plot = gold_plot(data)
    drawn = {point for s in plot.series if s.marker for point in zip(s.x, s.y, strict=True)}
    assert drawn == {(p.metrics["reward"].mean, p.metrics["gold"].mean) for p in data.policies}
    assert by_legend(plot, "best-of-n")[0].labels == ["", "4", "16"]


def test_every_policy_that_logged_has_its_curve(data):
    plots = curve_plots(data)
    online = ["ppo-low", "ppo-a", "ppo-b", "a2c"]
    assert {metric: [s.name for s in plot.series] for metric, plot in plots.items()} == {
        **dict.fromkeys(("objective/scores", "objective/kl", "objective/rlhf_reward", "policy/entropy_avg"), online),
        **{metric: ["dpo"] for metric in ("loss", "rewards/margins", "rewards/accuracies")},
    }
    assert plots["objective/scores"].series[0].x == [64, 128, 192]  # episodes
    assert plots["loss"].series[0].x == [10, 20]  # steps
    looks = [(s.colour, s.dash) for s in plots["objective/scores"].series]
    assert len(set(looks)) == len(looks)


def test_runs_of_one_beta_that_differ_in_more_than_seed_are_named(tmp_path):
    folder = write_evaluation(tmp_path / "toy")
    file = tmp_path / "toy/ppo/ppo-b/recipe.resolved.yaml"
    file.write_text(file.read_text().replace("r: 4", "r: 8"))
    data = load_report_data(folder)
    assert differing_settings([p for p in data.policies if p.kind == "ppo"]) == ["lora.r"]
    path, points = by_legend(frontier_plot(data), "PPO")
    assert path.labels == ["β 0.05", ""]
    assert points.labels == ["", "ppo-a", "ppo-b"]
    assert frontier_plot(data).notes[1] == "At β 0.2 the PPO runs also differ in lora.r; the line takes their mean."


def test_the_square_root_axis(data):
    assert sqrt_ticks(14.0) == [0.0, 0.4, 1.6, 4.0, 6.0, 10.0, 14.0]
    assert sqrt_ticks(0.0) == [0.0]
    values = [0.0, 1.0, 4.0]  # each a tick in both scales
    for root, scaled in ((False, values), (True, np.sqrt(values))):
        series = Series("s", "#000000", values, values, hover=[["a"]] * 3, marker="o")
        drawn = parsed(svg([Plot("x", "", [series], root=root)], "it"))
        marks = [float(mark.get("x")) for mark in drawn.iter(f"{SVG}use") if len(mark)]
        assert np.diff(marks) / np.diff(scaled) == pytest.approx([(marks[2] - marks[0]) / scaled[2]] * 2)
        ticks = {float(text.text): float(text.get("x")) for text in drawn.iter(f"{SVG}text") if "middle" in text.get("style")
                 and re.fullmatch(r"[\d.]+", text.text)}  # fmt: skip
        assert marks == pytest.approx([ticks[value] for value in values])


def test_a_mark_says_its_numbers_and_a_line_its_name(data):
    root = parsed(svg(figures(data)["frontier"], "it"))
    said = [title.text for title in root.iter(f"{SVG}title")]
    assert any(text.startswith(f"{FOREIGN}\n") for text in said)
    assert "ppo-b\nβ 0.2, seed 1\nreward 2.200 (2.100 to 2.400)\nKL, nats 5.500 (5.400 to 5.700)" in "\n\n".join(said)
    written = {text.text for text in root.iter(f"{SVG}text")}
    assert {"β 0.05", "β 0.2", FOREIGN, "4", "optimum, few effective samples"} <= written


def test_odd_names_and_numbers_are_drawn():
    """A name that XML has no place for, one that matplotlib would hide, one without an end, and a point that is nowhere."""
    said = [["first"], ["nowhere"], ["last"]]
    series = Series("_a\x1bb$", "#000000", [0.0, float("nan"), 2.0], [1.0] * 3, hover=said, marker="o")
    endless = Series("endless\n" * 9, "#000000", [0.0], [1.0], labels=["label " * 20])
    root = parsed(svg([Plot("x", "y", [series, endless])], "it", narrow=True))
    assert [title.text for title in root.iter(f"{SVG}title")] == ["_a\ufffdb$", "first", "last", endless.name]
    written = [text.text for text in root.iter(f"{SVG}text")]
    assert {"_a\ufffdb$", "endless endless endless endless…", "label label label label label l…"} <= set(written)


# --- the pages ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Start tags with attributes, and the cells of the first table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.rows, self.cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        self.cell = [""] if tag in ("td", "th") else self.cell
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
        if tag == "small":
            self.cell.append("")

    def handle_endtag(self, tag):
        self.cell = None if tag in ("td", "th") else self.cell

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "script" and self.scripts:
            self.scripts[-1] += text
        elif self.cell is not None:
            self.cell[-1] += text.strip()


def test_the_table_has_every_number(data, written):
    page = Page((written / "report.html").read_text())
    metric_names = table_metrics(data)
    assert set(metric_names) == set(data.policies[0].metrics)
    rows = {cells[0][0]: cells[1:] for cells in page.rows[1 : 1 + len(data.policies)]}
    assert list(rows) == [p.name for p in data.policies]
    for policy in data.policies:
        beta, *cells = rows[policy.name]
        assert beta[0] == ("" if policy.beta is None else str(policy.beta))
        for name, cell in zip(metric_names, cells, strict=True):
            m = policy.metrics[name]
            bound = [f"at most {m.mean:.3f}"]  # too few effective samples for an estimate
            assert cell == (bound if name == "fraction_of_optimum" else [f"{m.mean:.3f}", f"{m.low:.3f} to {m.high:.3f}"])
    text = (written / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| ppo-b |"))
    assert row.startswith("| ppo-b | 0.2 | 2.200 (2.100 to 2.400) | 5.500 (5.400 to 5.700) | 1.100 (1.000 to 1.300) |")
    for line in (
        "= 2.750, a bound from samples of ppo-a; effective sample size 3.2 a prompt, too few for an estimate",
        "Highest J of the trained policies: ppo-a, 1.200 (1.100 to 1.400), at most 25%",
    ):
        assert line in page_text(written / "report.html")
        assert line in text
    assert [re.findall(r"!\[.*?\]\((.*?)\)", line)[0] for line in text.splitlines() if line.startswith("![")] == [
        "frontier.png", "gold.png", "watch.png", "curves.png",
    ]  # fmt: skip
    assert sum(line.startswith("| prompt ") for line in text.splitlines()) == 1 + 9  # head, and EVIL is not named prompt
    assert headline(data).endswith("Without training, best-of-16 has 1.233.")


def page_text(file):
    return html.unescape(re.sub(r"<[^>]*>", "", file.read_text().split("<script", 1)[0]))


def test_no_text_becomes_markup(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert len(page.scripts) == text.count("<script") == text.count("</script") == 2
    content = json.loads(page.scripts[0])  # NaN would not be JSON to a browser
    assert content["samples"][0]["prompt"] == EVIL
    assert content["samples"][0]["sides"][1] == {"text": EVIL, "reward": 0.1, "gold": 0.5}
    assert "alert" not in page.scripts[1]
    assert "b" not in {tag for tag, _ in page.tags}  # the foreign policy's name
    for _, attributes in page.tags:
        assert not {"src", "href"} & attributes.keys()  # nothing is fetched
        assert attributes.get("xlink:href", "#").startswith("#")
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identities)) == len(identities)
    assert {attributes["xlink:href"][1:] for tag, attributes in page.tags if tag == "use"} <= set(identities)
    markdown = (written / "report.md").read_text()
    assert "<script" not in markdown
    assert "<b>" not in markdown
    assert "x.example/i.png)" in markdown
    assert "![i]" not in markdown
    widths = {line.count("|") for line in markdown.split("## Samples")[1].split("\n") if line.startswith("|")}
    assert widths == {len(TRAINED) + 3}


def test_pngs_show_every_stage(written):
    from PIL import Image

    for name, colours in {
        "frontier.png": ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#767676", "#222222"),
        "gold.png": ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#767676", "#222222"),
        "curves.png": ("#0072B2", "#E69F00", "#009E73"),
    }.items():
        pixels = np.asarray(Image.open(written / name).convert("RGB")).reshape(-1, 3)
        assert len(pixels) > 500_000
        for colour in colours:
            wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
            assert (pixels == wanted).all(1).sum() > 20, (name, colour)


def test_an_evaluation_of_foreign_models_without_gold_has_neither_gold_nor_curves(tmp_path):
    folder = write_evaluation(tmp_path / "toy")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["folders"] = {name: str(tmp_path / "gone") for name in evaluation["folders"]}
    for measured in evaluation["policies"].values():
        del measured["gold"]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    data = load_report_data(folder)
    assert {p.kind for p in data.policies} == {"reference", "best-of-n", "other"}
    (tmp_path / "report").mkdir()
    write_report(data, tmp_path / "report")
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"report.html", "report.md", "frontier.png"}
    assert "No policy here left training metrics" in page_text(tmp_path / "report/report.html")
    assert "gold.png" not in render_markdown(data)


# --- the script --------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """A recipe without checkpoints, and an evaluation of it."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/recipe.yaml").write_text(
        "model: {path: checkpoints/none}\nreward: {adapter: checkpoints/none}\nrun: {tracker: none}\n"
    )
    (tmp_path / "toy/task.py").write_text("")
    write_evaluation(tmp_path / "outputs/toy")
    return tmp_path / "toy"


def run_script(recipe, *words):
    from scripts import report

    return report.main(["--recipe", str(recipe), "--run.output", str(recipe.parent / "outputs"), "--run.name=r", *words])


def test_the_script_writes_the_latest_evaluation_and_loads_no_weights(recipe):
    summary = run_script(recipe)
    target = recipe.parent / "outputs/toy/report/r"
    assert {p.name for p in target.iterdir()} == {
        "report.html", "report.md", "frontier.png", "gold.png", "watch.png", "curves.png",
        "recipe.resolved.yaml", "run.json", "summary.json", "README.md",
    }  # fmt: skip
    assert summary["policies"] == [*UNTRAINED, *TRAINED]
    assert Path(summary["evaluation"]).name == "e"


def test_dry_run_writes_nothing(recipe, capsys):
    assert run_script(recipe, "--dry-run") is None
    assert "loads no weights" in capsys.readouterr().out
    assert not (recipe.parent / "outputs/toy/report").exists()


def broken(change):
    def apply(folder):
        evaluation = json.loads((folder / "evaluation.json").read_text())
        change(evaluation)
        (folder / "evaluation.json").write_text(json.dumps(evaluation))

    return apply


MISTAKES = {
    "none yet": (lambda folder: (folder.parent / "latest").unlink(), [], "run scripts/evaluate.py of toy first"),
    "no such folder": (lambda folder: None, ["--report.evaluation=nowhere"], "`report.evaluation` nowhere: no such folder"),
    "no evaluation": (lambda folder: None, ["--report.evaluation=/"], "it has no evaluation.json; run scripts/evaluate.py"),
    "cut short": (lambda folder: (folder / "evaluation.json").write_text('{"beta": 0.'), [], "evaluation.json: not valid JSON"),
    "a list": (lambda folder: (folder / "evaluation.json").write_text("[]"), [], "scripts/evaluate.py writes: its content"),
    "key missing": (broken(lambda e: e.pop("frontiers")), [], "writes: frontiers: Field required; evaluate again"),
    "wrong type": (
        broken(lambda e: e["policies"]["a2c"]["kl"].update(mean="high")), [], "writes: policies.a2c.kl.mean: Input should be",
    ),
    "no kl": (broken(lambda e: e["policies"]["a2c"].pop("kl")), [], "policies.a2c has no kl; evaluate again"),
    "no folder": (broken(lambda e: e["folders"].pop("a2c")), [], "`folders` does not say where a2c is"),
    "no samples": (lambda folder: (folder / "samples.jsonl").unlink(), [], "no samples.jsonl, so the evaluation did not"),
    "broken curve": (
        lambda folder: (folder.parent.parent / "a2c/a2c/metrics.jsonl").write_text('{"step": 1}\n{"st'), [],
        "a2c/metrics.jsonl, line 2: not valid JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("breaks", "words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(breaks, words, message, recipe, capsys):
    breaks(recipe.parent / "outputs/toy/evaluate/e")
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_script(recipe, *words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(recipe.parent.rglob("*")) == before


# --- in a browser ------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# What a reader does, done inside the page; the outcome is left in the title.
ACTIONS = """
<script>
const page = document.querySelector("iframe");
page.addEventListener("load", () => setTimeout(() => {
  const doc = page.contentDocument, all = selector => [...doc.querySelectorAll(selector)];
  const text = selector => doc.querySelector(selector).textContent;
  const shown = all("[data-plot] svg").filter(svg => svg.getBoundingClientRect().width > 0);
  const ticks = () => all("[data-plot^=frontier] text").filter(t => t.getBoundingClientRect().width).map(t => t.textContent);
  const seen = {
    width: doc.documentElement.clientWidth, scroll: doc.documentElement.scrollWidth,
    plots: shown.map(svg => [svg.closest("[data-plot]").dataset.plot, svg.getBoundingClientRect().width]),
    letters: shown.map(svg => svg.querySelector("text").getBoundingClientRect().height),
    scripts: all("script").length, bold: all("b").length, root: ticks(),
    prompt: text("#sample blockquote"), answers: all("#sample .card p").map(p => p.textContent),
  };
  const key = name => doc.body.dispatchEvent(new page.contentWindow.KeyboardEvent("keydown", {key: name, bubbles: true}));
  key("ArrowRight"); key("ArrowRight"); key("ArrowLeft");
  seen.second = [text("#sample blockquote"), doc.querySelector("#prompts").value, text("#sample .card .soft")];
  const sort = () => { all("#policies thead button")[2].click(); return all("#policies tbody th").map(th => th.textContent); };
  seen.sorted = [sort(), sort()];
  doc.querySelector("[data-scale=frontier-linear]").click();
  seen.linear = ticks();
  doc.querySelector("[data-scale=frontier]").click();
  key("ArrowLeft");
  document.title = JSON.stringify(seen);
}, 500));
</script>
"""


@pytest.fixture(scope="module")
def browse(written, tmp_path_factory):
    """width -> (what ACTIONS saw, pixels [height, width, 3]).

    The page is in a frame of that width, since a headless window is never narrower than 500 pixels.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on this machine")
    from PIL import Image

    def run(width, height):
        home = tmp_path_factory.mktemp("browser")
        source = html.escape((written / "report.html").read_text())
        frame = f'<iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{source}"></iframe>'
        (home / "frame.html").write_text(f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">{frame}{ACTIONS}')
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=8000 --dump-dom"
        result = subprocess.run(
            [CHROMIUM, *flags.split(), f"--user-data-dir={home / 'profile'}", f"--window-size={max(width, 500)},{height}",
             f"--screenshot={home / 'shot.png'}", (home / "frame.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", result.stdout)[1]))
        return seen, np.asarray(Image.open(home / "shot.png").convert("RGB"))[:, :width]

    return run


@pytest.mark.parametrize(("width", "height"), [(1280, 2400), (390, 2400)], ids=["laptop", "phone"])
def test_the_page_works_in_a_browser_without_a_network(browse, data, width, height):
    seen, pixels = browse(width, height)
    assert seen["width"] == width
    assert seen["scroll"] == width  # no sideways scrolling
    assert [name for name, _ in seen["plots"]] == ["frontier", "gold", "watch", "curves"]
    assert all(300 < drawn <= width for _, drawn in seen["plots"])
    assert all(9 < height < 24 for height in seen["letters"])  # can be read
    assert seen["scripts"] == 2
    assert seen["bold"] == 0
    names = {"optimum", "optimum, few effective samples", "best-of-n", "reference", "PPO", "A2C", "DPO", "other"}
    assert {"β 0.05", "β 0.2", FOREIGN, "4"} | names <= set(seen["root"])
    assert seen["prompt"] == seen["answers"][1] == EVIL
    assert seen["second"] == ["prompt 1", "1", "reward 1.00 · gold 0.50"]
    ascending = sorted(data.policies, key=lambda p: p.metrics["reward"].mean)
    assert seen["sorted"] == [[p.name for p in order] for order in (ascending[::-1], ascending)]
    assert seen["root"] != seen["linear"]
    assert pixels.std() > 10
    for top in range(0, height, 600):  # no blank stretch
        assert pixels[top : top + 600].std() > 5, top
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73)):
        assert (pixels == colour).all(2).sum() > 30


def test_rendering_does_not_change_what_was_read(data):
    before = copy.deepcopy(data)
    assert render_html(data) == render_html(data)
    assert data == before


def test_over_optimisation_is_drawn_with_its_turning_point(data):
    plots = watch_plots(data)
    assert list(plots) == ["reward", "gold"]
    assert [s.name for s in plots["gold"].series] == ["ppo-low", "ppo-a", "ppo-b", "a2c"]
    for metric, values in (("reward", [0.5, 2.0, 3.0]), ("gold", [0.5, 0.8, 0.6])):
        series = plots[metric].series[0]
        assert series.x == [0.0, 4.0, 9.0]
        assert series.y == values
        assert series.labels == ["", "best gold: step 10", ""]
    assert plots["gold"].series[0].y_bars[1] == pytest.approx((0.8 - 1.96 * 0.02, 0.8 + 1.96 * 0.02))


def test_findings_are_shown_and_no_markup(data, written):
    page, text = (written / "report.html").read_text(), (written / "report.md").read_text()
    assert page.count("<strong>ppo-a: reward hacking.</strong>") == 1
    assert html.escape(EVIL) in page.replace("&#34;", "&quot;")
    assert "## Findings" in text
    assert "Raise &#96;objective.beta&#96;" in text
    assert (written / "watch.png").is_file()
