"""Pairs: how they are labelled, that their tokens survive, and that a killed run resumes as if nothing had happened."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset

from rlhf_recipes.algorithms.pairs import label_pairs, load_pairs, tokenize_preferences
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.evaluation.judging import Completions
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
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
    assert "would be another run: `preferences.pairs_per_prompt` 1 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "not json", '{"prompt": "x"}', "[1]"])
def test_broken_pairs_are_named(content, tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(content)
    recipe = load_recipe(tiny)
    tokenizer = load_tokenizer(recipe)
    with pytest.raises(RecipeError, match=r"pairs\.jsonl"):
        load_pairs(tmp_path / "pairs.jsonl", 300, tokenizer, [tokenizer.eos_token_id], recipe.data)


def test_pairs_a_person_made_end_with_eos_and_keep_the_limits(tiny, capsys):
    recipe = load_recipe(tiny, {"data.max_prompt_tokens": 3})
    tokenizer = load_tokenizer(recipe)
    rows = [("film", " great", " dull"), ("film", " same", " same"), ("the film was great and fine", " a", " b")]
    pairs = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])
    kept = tokenize_preferences(
        pairs, tokenizer, [tokenizer.eos_token_id], load_recipe(tiny, {"data.max_prompt_tokens": 5}).data
    )
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


OWN = [("the film", " was great", " was dull"), ("the plot", " a superb fine film", " awful")] * 100


def test_two_hundred_own_pairs_just_train(tiny, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": p, "chosen": f"{c}{' great' * (i % 3)}", "rejected": r, "id": i} for i, (p, c, r) in enumerate(OWN)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    summary = run("dpo", tiny, tmp_path, f"--preferences.path={file}")
    said = capsys.readouterr().out
    assert summary["policy"]["kl"] != 0
    steps = [row for row in lines(tmp_path / "outputs/tiny/dpo/it/metrics.jsonl") if "rewards/margins" in row]
    assert len(steps) == 3 * 200 // 8
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert steps[-1]["rewards/accuracies"] > 0.9
    cut = r"warning: \d+ of 200 pairs of .*mine.jsonl \(\d+%\) have a completion of more than 6 tokens, cut there"
    assert re.search(cut, said)
    about = json.loads((tmp_path / "outputs/tiny/dpo/it/run.json").read_text())
    [term] = about["fingerprint"]["parts"]["reward"]["terms"]
    assert (term["kind"], term["path"]) == ("pairs", str(file))
    capsys.readouterr()

    run("merge", tiny, tmp_path, f"--merge.adapter={tmp_path}/outputs/tiny/dpo/it")
    card = (tmp_path / "outputs/tiny/merge/it/model/README.md").read_text()
    assert f"A policy trained by DPO on pairs {str(file).replace('_', '&#95;')}, at beta 0.05, by the recipe" in card
    assert "Judged by the reward adapter checkpoints/reward, J at beta 0.05." in card
    run("evaluate", tiny, tmp_path)
    assert "another objective" not in capsys.readouterr().out  # pairs are no reward to differ from
    run("merge", tiny, tmp_path, f"--merge.adapter={tmp_path}/outputs/tiny/dpo/it", "--run.name=2")
    assert "not on the card" not in capsys.readouterr().out
    assert "95% intervals" in (tmp_path / "outputs/tiny/merge/2/model/README.md").read_text()


def test_chat_pairs_and_those_without_a_prompt_become_the_same_tokens(tiny, tmp_path):
    recipe = load_recipe(tiny)
    tokenizer = load_tokenizer(recipe)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    turns = (("user", "x"), ("assistant", "ab"), ("assistant", "c"))
    prompt, good, bad = ([{"role": role, "content": text}] for role, text in turns)
    files = {
        "text": {"prompt": prompt, "chosen": "ab", "rejected": "c"},
        "messages": {"prompt": prompt, "chosen": good, "rejected": bad},
        "whole": {"chosen": prompt + good, "rejected": prompt + bad},
    }
    loaded = []
    for name, row in files.items():
        (tmp_path / name).write_text("\ufeff" + json.dumps(row) + "\n")
        loaded.append(load_pairs(tmp_path / name, 300, tokenizer, [tokenizer.eos_token_id], recipe.data)[0])
    assert loaded[0] == loaded[1] == loaded[2]
    assert tokenizer.decode(loaded[0]["chosen_ids"]) == "ab</s>"


def test_pairs_that_another_reward_labelled_are_said(tiny, tmp_path, capsys):
    words = ["--reward.adapter=null", "--reward.read_eos=true", "--reward.function=wordy"]
    run("preferences", tiny, tmp_path, *words)
    folder = tmp_path / "outputs/tiny/preferences/it"
    run("dpo", tiny, tmp_path, f"--preferences.path={folder}", "--dpo.max_steps=1")
    said = capsys.readouterr().out
    assert "were made with the reward function wordy, and here adapter checkpoints/reward" in said
    about = json.loads((tmp_path / "outputs/tiny/dpo/it/run.json").read_text())
    assert about["fingerprint"]["parts"]["reward"]["terms"][0]["path"] == "wordy"  # that is what it maximises


def test_what_a_stage_cuts_or_leaves_out_is_counted_and_what_it_learned_shown(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    with (folder / "task.py").open("a") as file:
        file.write("\n_all = load_preferences\ndef load_preferences(split):\n    rows = list(_all(split))\n"
                   "    return Dataset.from_list(rows[:47] + [rows[47] | {'chosen': 'great ' * 99}])\n")  # fmt: skip
    run("reward", folder, tmp_path, "--reward_training.max_length=64")
    said = capsys.readouterr().out
    assert "1 of 48 pairs of load_preferences (2%) are longer than reward_training.max_length=64 tokens, left out" in said
    table = said[said.index("pairwise accuracy; chance is 0.5") :]
    assert re.search(r"all +│ [01]\.\d{3} +│ 48 ", table)
    assert re.search(r"8 words +│ [01]\.\d{3} +│ 48 ", table)
    summary = run("sft", folder, tmp_path, "--sft.max_length=9")
    said = capsys.readouterr().out
    assert "warning: 48 of 48 rows of load_demonstrations (100%) fill sft.max_length=9 tokens, where rows are cut" in said
    assert f"held-out loss {summary['eval_loss']:.3f} nats a token, perplexity {summary['eval_perplexity']:.1f}" in said
