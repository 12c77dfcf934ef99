"""--dry-run looks at the task: what would stop the run is said before it, within the time there is, and nothing is written."""

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_recipes.checks import memory
from rlhf_recipes.checks.files import backbone_vocabulary
from rlhf_recipes.checks.look import look
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from tests.test_scripts import run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def task(tiny, tmp_path):
    """Makes a copy of the tiny recipe with code behind its task.py; returns its recipe."""

    def make(code="", **overrides):
        folder = tmp_path / "mine"
        if not folder.exists():
            shutil.copytree(tiny, folder)
        (folder / "task.py").write_text((tiny / "task.py").read_text() + code)
        return load_recipe(folder, overrides)

    return make


def with_pairs(task, *rows, **overrides):
    recipe = task(**overrides)
    (recipe.folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_recipe(recipe.folder, {"preferences.path": "mine.jsonl", **overrides})


FUNCTION = {"reward.adapter": None, "reward.read_eos": True}
PAIR = {"prompt": "the film", "chosen": " was great", "rejected": " was dull"}


@pytest.mark.parametrize(
    ("stage", "code", "overrides", "message"),
    [
        ("ppo", "", FUNCTION | {"reward.function": "wrody"}, "needs a function `wrody`; did you mean `wordy`?"),
        ("evaluate", "\ndef one(text): return 1.0\n", FUNCTION | {"reward.function": "one"}, "has the parameter `text`"),
        ("a2c", "\ndef gold_reward(completions, stars): return [1.0]\n", {}, "has the parameter `stars`"),
        ("ppo", "\ndef strict(completions, anwser): return [1.0]\n_load = load_prompts\ndef load_prompts(split):\n"
                "    return _load(split).add_column('answer', ['x'] * 48)\n", FUNCTION | {"reward.function": "strict"},
         "another column of load_prompts (answer)"),
        ("ppo", "\ndef load_prompts(split): return Dataset.from_dict({'text': ['a']})\n", {},
         "`load_prompts('eval')` has the columns ['text'], expected prompt"),
        ("reward", "\n_all = load_preferences\ndef load_preferences(split):\n"
                   "    return _all(split).rename_column('chosen', 'good') if split == 'train' else _all(split)\n", {},
         "`load_preferences('train')` has the columns"),
        ("sft", "\ndel load_demonstrations\n", {}, "this stage needs a function `load_demonstrations`"),
        ("merge", "\nimport nowhere_to_be_found\n", {}, "No module named 'nowhere_to_be_found'"),
    ],
)  # fmt: skip
def test_what_would_stop_the_run_is_said(stage, code, overrides, message, task):
    recipe = task(code, **overrides)
    with pytest.raises(RecipeError) as refused:
        look(recipe, stage, seconds=60)
    assert message in str(refused.value)


def test_a_missing_function_is_found_however_long_the_task_takes(task):
    recipe = task("\nimport time\ntime.sleep(60)\n", **FUNCTION, **{"reward.function": "wrody"})
    with pytest.raises(RecipeError, match="needs a function `wrody`; did you mean `wordy`"):
        look(recipe, "ppo", seconds=0.2)
    dynamic = task("\nglobals()['found'] = wordy\n", **FUNCTION, **{"reward.function": "found"})
    assert look(dynamic, "ppo", seconds=60).lines[0].startswith("# data")


def test_a_task_in_order_is_counted(task):
    assert look(task(), "ppo", seconds=60).lines == ["# data: load_prompts('eval') 48 rows, load_prompts('train') 48 rows"]
    grpo = task("\ndef ours(completions, **kwargs): return [0.0]\n", **FUNCTION, **{"reward.function": "ours"})
    assert look(grpo, "ppo", seconds=60).lines[0].startswith("# data")
    assert look(task(), "report").lines == []


def test_what_takes_too_long_or_lies_elsewhere_is_not_looked_at_and_said(task):
    slow = task("\nimport time\n_load = load_prompts\ndef load_prompts(split):\n    if split == 'train': time.sleep(60)\n"
                "    return _load(split)\n")  # fmt: skip
    begun = time.perf_counter()
    looked, left = look(slow, "ppo", seconds=1.0).lines
    assert time.perf_counter() - begun < 10
    assert looked == "# data: load_prompts('eval') 48 rows"
    assert left.startswith("# not looked at: load_prompts('train'), which takes more than 1 s; `python -m rlhf_recipes check ")
    hub = task(
        "\ndef load_prompts(split):\n    import datasets\n    return datasets.load_dataset('org/prompts', split='train')\n"
    )
    [left] = look(hub, "ppo", seconds=60).lines
    assert "not looked at: load_prompts('eval'), whose data is not on this machine (Couldn't reach" in left


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2: not a pair: `rejected` is missing"),
        ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "`rejected` is missing; did you mean `rejectd`?"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "line 2: not a pair: `chosen`: expected text, got 3"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}, "`chosen`: expected text, got"),
        ([1], "line 2: not a pair: expected a JSON object"),
    ],
)
def test_a_bad_line_of_own_pairs_is_named(row, message, task, capsys):
    recipe = with_pairs(task, PAIR, row)
    with pytest.raises(RecipeError) as refused:
        look(recipe, "dpo", seconds=60)
    assert f"{recipe.folder}/mine.jsonl, " in str(refused.value)
    assert message in str(refused.value)


def test_pairs_of_another_vocabulary_or_tokenizer_are_refused_before_the_run(task):
    recipe = task()
    tokenizer = load_tokenizer(recipe)
    ids = {
        "prompt_ids": [5],
        "label_smoothing": 0.0,
        **{f"{s}_ids": tokenizer(PAIR[s])["input_ids"] for s in ("chosen", "rejected")},
    }
    own = with_pairs(task, PAIR | ids)
    assert look(own, "dpo", seconds=60).lines[0].startswith(f"# data: {own.folder}/mine.jsonl 1 pairs")
    for other, message in (
        (
            {"chosen_ids": [5000]},
            "line 1: not pairs of scripts/preferences.py: chosen_ids has the token 5000 of another",
        ),
        ({"chosen_ids": [7, 8, 9]}, "chosen_ids are of another tokenizer: the backbone's reads"),
    ):
        with pytest.raises(RecipeError) as refused:
            look(with_pairs(task, PAIR | ids | other), "dpo", seconds=60)
        assert message in str(refused.value)


def test_the_longest_row_is_what_the_memory_estimate_counts(task, capsys):
    long = task(
        "\n_all = load_preferences\ndef load_preferences(split):\n    if split != 'train': return _all(split)\n"
        "    return Dataset.from_dict({'prompt': [''] * 3, 'chosen': ['great'] * 2 + ['great ' * 40], 'rejected': ['a'] * 3})\n"
    )
    tokens = look(long, "reward", seconds=60).longest
    assert tokens == len(load_tokenizer(long)("great " * 40)["input_ids"]) + 1
    assert run("reward", long.folder, long.folder, "--dry-run") is None
    known = capsys.readouterr().out
    assert "the most that" not in known
    assert run("reward", long.folder, long.folder, "--dry-run", "--reward_training.max_length=16") is None
    shorter = capsys.readouterr().out
    assert "the most that" not in shorter
    sums = [re.search(r"activations +([\d,]+) MiB", text)[1] for text in (known, shorter)]
    estimates = [memory.memory_estimate(long, "reward", longest)["activations"] for longest in (tokens, 16)]
    assert sums == [f"{estimate / 2**19:,.0f}" for estimate in estimates]  # twice that on a CPU


def test_rows_of_token_ids_are_counted_as_they_are(task):
    given = task("\ndef load_demonstrations(split): return Dataset.from_dict({'input_ids': [[5] * 3, [5] * 9]})\n")
    assert look(given, "sft", seconds=60).longest == 9


def test_a_vocabulary_that_the_config_does_not_name_refuses_no_pairs(task):
    """As that of google/gemma-3-4b-it, whose text_config holds what differs from the defaults alone."""
    recipe = task()
    assert backbone_vocabulary(recipe) == 300
    file = recipe.folder / "checkpoints/backbone/config.json"
    file.write_text(json.dumps({"model_type": "gemma3", "text_config": {"hidden_size": 2560}}))
    assert backbone_vocabulary(recipe) is None


def test_a_dry_run_of_imdb_looks_writes_nothing_and_is_quick():
    before = {file: file.stat().st_mtime_ns for file in (ROOT / "recipes/imdb").rglob("*") if "__pycache__" not in file.parts}
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "scripts/ppo.py", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime < 4  # 2 s of a core, whoever else is at work on it
    assert re.search(r"# data: load_prompts\('eval'\) 1022 rows|# not looked at: ", done.stdout)
    assert done.stdout.endswith("# nothing was written\n")
    after = {file: file.stat().st_mtime_ns for file in (ROOT / "recipes/imdb").rglob("*") if "__pycache__" not in file.parts}
    assert {file: at for file, at in after.items() if file.name != "imdb"} == {
        file: at for file, at in before.items() if file.name != "imdb"
    }
