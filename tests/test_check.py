"""python -m rlhf_recipes check: what a task gives, as the stages will see it, and what is wrong with it."""

import shutil

import pytest

from rlhf_recipes.__main__ import main
from tests.conftest import TASK


@pytest.fixture
def mine(tiny, tmp_path):
    """A copy of the tiny recipe, to be edited."""
    return shutil.copytree(tiny, tmp_path / "mine")


def check(folder, capsys, *words):
    code = main(["check", str(folder), *words])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err.strip().splitlines()


def test_a_task_in_order(mine, capsys):
    code, shown, problems = check(mine, capsys)
    assert (code, problems) == (0, [])
    for function in ("load_prompts", "load_preferences", "load_demonstrations"):
        assert f"│ {function} │ train │ 48 │" in shown
    assert "what the model reads: '<s>" in shown
    assert "chosen, as it is learned: " in shown
    assert "gold_reward of 10 prompts with answers: " in shown
    assert "everything is in order" in shown


BROKEN = {
    "a column is missing": ('"chosen": g', '"chozen": g', "load_preferences('train')", "expected chosen, prompt, rejected"),
    "it raises": ("def load_prompts(split):", "def load_prompts(split):\n    1 / 0", "ZeroDivisionError", "task.py:"),
    "the judge says nothing": ("[float(sum(word in c for word in GOOD))", "[1.0", "gold_reward is 1 for all 10 answers", ""),
    "the judge fails": ("[float(sum(word in c for word in GOOD))", "[float('nan')", "gold_reward: returned nan", "10 of 10"),
    "held-out prompts are trained on": (
        "random.Random(split)",
        "random.Random(0)",
        "held-out prompts are training prompts",
        "",
    ),
}


@pytest.mark.parametrize(("old", "new", "first", "second"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_said_and_the_rest_still_shown(old, new, first, second, mine, capsys):
    assert old in TASK
    (mine / "task.py").write_text(TASK.replace(old, new))
    code, shown, problems = check(mine, capsys)
    assert code == 2
    assert any(first in line and second in line for line in problems), problems
    assert all(line.startswith("error: ") for line in problems)
    assert "│ load_demonstrations │ train │ 48 │" in shown


def test_absent_functions_long_prompts_and_a_missing_backbone(mine, capsys):
    (mine / "task.py").write_text(TASK.replace("def load_preferences", "def other"))
    code, shown, problems = check(mine, capsys, "--data.max_prompt_tokens=2")
    assert code == 2
    assert "load_preferences │ │ absent │" in shown
    assert "prompts are longer and would be left out" in problems[0]
    shutil.rmtree(mine / "checkpoints")
    code, shown, problems = check(mine, capsys)
    assert code == 2
    assert "texts are shown as they are" in problems[0]
    assert "│ load_prompts │ train │ 48 │" in shown


def test_made_up_answers_that_score_alike_are_no_mistake(mine, capsys):
    """A reward of certain words finds none in them."""
    text = TASK.replace("def load_preferences", "def other").replace("def load_demonstrations", "def another")
    (mine / "task.py").write_text(text)
    code, shown, problems = check(mine, capsys)
    assert (code, problems) == (0, [])
    assert "gold_reward of 10 prompts with made-up answers (task.py has none): 0, 0, 0, 0, 0, 0, 0, 0, 0, 0" in shown


def test_usage(capsys):
    assert main(["--help"]) == 0
    assert "python -m rlhf_recipes check recipes/mytask" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["check", "recipes/nowhere"]) == 2
    assert "no such recipe" in capsys.readouterr().err
