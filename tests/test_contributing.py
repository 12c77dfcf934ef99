"""CONTRIBUTING's "How to add", followed to the letter on a copy of the library: the toys are found at work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"```python\n# (rlhf_recipes/\S+?\.py)(?:, (below|above|in place of|at its end) ?([^\n]*))?\n(.*?)```", re.DOTALL
)
INSTRUCTIONS = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())


def followed(text: str, how: str, anchor: str, code: str) -> str:
    """A file's text after one instruction."""
    if how == "at its end":
        return f"{text}\n\n{code}"
    lines = [line for line in text.splitlines(keepends=True) if anchor in line]
    assert len(lines) == 1, f"{anchor!r} stands in {len(lines)} lines"
    if how == "in place of":
        return text.replace(anchor, code.strip())
    return text.replace(lines[0], lines[0] + code if how == "below" else code + lines[0])


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the library and its scripts with all that CONTRIBUTING adds, and how many lines each file got."""
    folder = tmp_path_factory.mktemp("house")
    for name in ("rlhf_recipes", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, how, anchor, code in INSTRUCTIONS:
        file = folder / path
        file.write_text(followed(file.read_text(), how, anchor, code) if how else code)
    return folder


def test_each_toy_takes_two_files_at_most():
    reward, tracker, finding = (
        {path for path, *_, code in INSTRUCTIONS if re.search(words, code)}
        for words in ("length|LengthReward", "[Pp]lain", "beta_is_small")
    )
    assert reward == {"rlhf_recipes/recipe/sections.py", "rlhf_recipes/rewards/length.py"}
    assert tracker == {"rlhf_recipes/recipe/sections.py", "rlhf_recipes/runs/trackers.py"}
    assert finding == {"rlhf_recipes/evaluation/diagnosis.py"}


def test_the_toys_are_at_work(extended, tiny, tmp_path):
    given = {
        "reward.length": 5, "run.tracker": "plain", "run.name": "toys", "run.output": tmp_path, "ppo.total_episodes": 64,
        "ppo.per_device_train_batch_size": 8, "ppo.gradient_accumulation_steps": 1, "ppo.reward_baseline": "false",
        "ppo.eval_strategy": "no",
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in given.items()]
    done = subprocess.run(
        [sys.executable, "scripts/ppo.py", "--recipe", str(tiny), *words],
        cwd=extended, env=os.environ | {"PYTHONPATH": str(extended)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "tiny/ppo/toys"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["objective/scores"] for line in lines if "objective/scores" in line]
    assert len(scores) == 8
    assert all(-27 <= score <= 0 for score in scores)
    plain = (run / "plain.txt").read_text().splitlines()
    assert plain[0].startswith("step 1 ")
    assert plain[-1] == "finished"
    assert "beta is small" in [finding["name"] for finding in json.loads((run / "summary.json").read_text())["findings"]]


def test_an_unknown_tracker_is_answered_with_the_new_one_too(extended, tiny):
    done = subprocess.run(
        [sys.executable, "scripts/ppo.py", "--recipe", str(tiny), "--run.tracker=plane"],
        cwd=extended, env=os.environ | {"PYTHONPATH": str(extended)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "'plain'" in done.stderr
