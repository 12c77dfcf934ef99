"""Pairs: how they are labelled, that their tokens survive, and that a killed run goes on as if nothing had happened."""

import json

import pytest
import torch
from datasets import Dataset

from rlhf_recipes.data import load_tokenizer
from rlhf_recipes.evaluation import Completions
from rlhf_recipes.preferences import label_pairs, load_pairs, tokenize_preferences
from rlhf_recipes.recipe import RecipeError, load_recipe
from tests.test_scripts import lines, run


def judged(rewards, ids=None):
    rewards = torch.tensor(rewards)
    ids = ids or [[[10 * i + k] for k in range(rewards.shape[1])] for i in range(len(rewards))]
    texts = [[str(row) for row in rows] for rows in ids]
    nothing = torch.zeros_like(rewards)
    return Completions(ids, texts, rewards, nothing, nothing, nothing, None, nothing, nothing)


def prompts(n):
    return Dataset.from_dict({"prompt": [f"p{i}" for i in range(n)], "input_ids": [[1, i + 3] for i in range(n)]})


def test_bradley_terry_labels_have_their_probability():
    n, gap = 4000, 1.2
    pairs, dropped = label_pairs(prompts(n), judged([[gap, 0.0]] * n), "bradley_terry", seed=0)
    assert (len(pairs), dropped) == (n, {"identical": 0, "unjudged": 0})
    share = sum(p["chosen_reward"] > p["rejected_reward"] for p in pairs) / n
    expected = torch.sigmoid(torch.tensor(gap)).item()
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / n) ** 0.5)


def test_argmax_chooses_the_better_and_pairs_keep_their_own_tokens():
    pairs, dropped = label_pairs(prompts(2), judged([[0.0, 1.0, 5.0, 2.0], [3.0, 1.0, 0.0, 0.5]]), "argmax", seed=0)
    assert dropped["identical"] == 0
    chosen = [(p["prompt"], p["prompt_ids"], p["chosen_ids"], p["rejected_ids"], p["chosen_reward"]) for p in pairs]
    assert chosen == [
        ("p0", [1, 3], [1], [0], 1.0), ("p0", [1, 3], [2], [3], 5.0),
        ("p1", [1, 4], [10], [11], 3.0), ("p1", [1, 4], [13], [12], 0.5),
    ]  # fmt: skip
    assert all(p["chosen"] == str(p["chosen_ids"]) for p in pairs)


def test_identical_pairs_are_dropped_and_counted():
    pairs, dropped = label_pairs(prompts(1), judged([[1.0, 1.0, 0.0, 2.0]], [[[7], [7], [8], [9]]]), "bradley_terry", 0)
    assert dropped["identical"] == 1
    assert len(pairs) == 1
    assert sorted(pairs[0]["chosen_ids"] + pairs[0]["rejected_ids"]) == [8, 9]


def test_the_script_writes_judged_pairs_and_a_resumed_run_the_same(tiny, tmp_path):
    words = ["--preferences.batch_size=8", "--preferences.pairs_per_prompt=2"]  # 8 prompts a slice
    summary = run("preferences", tiny, tmp_path, *words)
    folder = tmp_path / "outputs/tiny/preferences/it"
    pairs = lines(folder / "pairs.jsonl")
    assert summary["pairs"] == len(pairs) > 80
    assert summary["pairs"] + summary["identical"] == 2 * summary["prompts"] == 96
    assert summary["label_agreement"] == sum(p["chosen_reward"] > p["rejected_reward"] for p in pairs) / len(pairs)
    assert {len(p["prompt_ids"]) for p in pairs} != {1}

    torn = tmp_path / "outputs/tiny/preferences/torn"
    torn.mkdir()
    progress = (folder / "progress.jsonl").read_text().splitlines(keepends=True)
    whole = (folder / "pairs.jsonl").read_bytes()
    (torn / "recipe.resolved.yaml").write_text((folder / "recipe.resolved.yaml").read_text())
    (torn / "progress.jsonl").write_text("".join(progress[:2]) + '{"half a')
    (torn / "pairs.jsonl").write_bytes(whole[: json.loads(progress[1])["end"] + 17])
    again = run("preferences", tiny, tmp_path, *words, "--resume", str(torn))
    assert (torn / "pairs.jsonl").read_bytes() == whole
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}


def test_a_run_is_resumed_only_as_it_was(tiny, tmp_path, capsys):
    run("preferences", tiny, tmp_path)
    for words, message in (
        (["--resume"], "is finished"),
        (["--resume", str(tmp_path)], "not a run's folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("preferences", tiny, tmp_path, *words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    (tmp_path / "outputs/tiny/preferences/it/summary.json").unlink()
    with pytest.raises(SystemExit):
        run("preferences", tiny, tmp_path, "--resume", "--preferences.pairs_per_prompt=3")
    assert "would go on as another run: `preferences.pairs_per_prompt` 1 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "not json", '{"prompt": "x"}', "[1]"])
def test_broken_pairs_are_named(content, tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(RecipeError, match=r"pairs\.jsonl"):
        load_pairs(tmp_path / "pairs.jsonl", 300, load_tokenizer(load_recipe(tiny)), load_recipe(tiny))


def test_pairs_a_person_made_end_with_eos_and_keep_the_limits(tiny, capsys):
    recipe = load_recipe(tiny, {"data.max_prompt_tokens": 3})
    tokenizer = load_tokenizer(recipe)
    rows = [("film", " great", " dull"), ("film", " same", " same"), ("the film was great and fine", " a", " b")]
    pairs = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])
    kept = tokenize_preferences(pairs, tokenizer, load_recipe(tiny, {"data.max_prompt_tokens": 5}))
    assert len(kept) == 1
    assert "2 of 3 pairs" in capsys.readouterr().out
    assert kept[0]["prompt_ids"] == tokenizer("film")["input_ids"]
    assert kept[0]["chosen_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(kept[0]["chosen_ids"], skip_special_tokens=True) == " great"


def test_expected_labels_choose_the_better_and_say_how_likely_it_is_not():
    pairs, _ = label_pairs(prompts(1), judged([[0.0, 1.0, 2.0, 2.0]]), "expected", seed=0)
    assert [p["chosen_reward"] for p in pairs] == [1.0, 2.0]
    assert pairs[0]["label_smoothing"] == pytest.approx(1 / (1 + 2.718281828))
    assert pairs[1]["label_smoothing"] == 0.5
    drawn, _ = label_pairs(prompts(1), judged([[0.0, 1.0]]), "bradley_terry", seed=0)
    assert drawn[0]["label_smoothing"] == 0
