"""The list of metrics: docs/metrics.md shows it, and whatever a run logs is in it."""

import re
from pathlib import Path

import pytest

from rlhf_recipes.metrics import BEST_BY, HELD_OUT, ONLINE, SUPERVISED, TRAINING, label_of
from tests.test_scripts import lines, run

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {
    "PPO and A2C": ONLINE,
    "SFT, reward model, DPO": SUPERVISED,
    "Held-out prompts": {name: metric for name, metric in HELD_OUT.items() if not metric.several},
    "Several completions a prompt": {name: metric for name, metric in HELD_OUT.items() if metric.several},
}


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_page_shows_the_list(heading):
    """After a change, paste what is expected here."""
    section = (ROOT / "docs/metrics.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    shown = [line.replace("\\|", "|") for line in section.splitlines() if line.startswith("| `")]
    rows = [f"| `{name}` | {metric.meaning} | {metric.unit} |" for name, metric in SECTIONS[heading].items()]
    assert shown == [row.replace("|  |", "| |") for row in rows]


def test_labels_have_a_unit():
    assert label_of("kl") == "KL, nats"
    assert label_of("reward_wordy") == "reward_wordy"  # one of several rewards
    assert TRAINING["objective/kl"].label == "KL, nats a sequence"
    assert set(BEST_BY) <= HELD_OUT.keys()
    assert all(metric.title for metric in HELD_OUT.values())


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_whatever_a_run_logs_is_in_the_list(stage, tiny, tmp_path):
    evaluating = ["--ppo.eval_strategy=steps", "--ppo.eval_steps=1", "--ppo.max_grad_norm=1"] if stage == "ppo" else []
    run(stage, tiny, tmp_path, *evaluating)
    held_out = {f"eval/{name}" for name, metric in HELD_OUT.items() if not metric.several}
    known = TRAINING.keys() | held_out | {f"eval_{name}" for name in SUPERVISED}
    logged = {name for row in lines(tmp_path / f"outputs/tiny/{stage}/it/metrics.jsonl") for name in row}
    assert {re.sub("rewards/.*/", "rewards/<name>/", name) for name in logged} <= known
    if stage == "ppo":
        assert held_out <= logged
        timed = {name for row in lines(tmp_path / f"outputs/tiny/{stage}/it/timing.jsonl") for name in row}
        assert timed <= TRAINING.keys()
