"""The default recipe's data, judge and shipped checkpoints: real reviews, real weights."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "recipes" / "imdb"


@pytest.fixture(scope="module")
def task():
    spec = importlib.util.spec_from_file_location("imdb_task", FOLDER / "task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_review_is_in_exactly_one_part(task):
    parts = {part: {text for text, _ in task.reviews(part)} for part in task.PARTS}
    assert sum(len(task.reviews(part)) for part in task.PARTS) == 25_000
    names = list(parts)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not parts[a] & parts[b], (a, b)
    assert sum(task.PARTS.values()) == pytest.approx(1.0)


def test_prompts_are_the_openings_of_held_out_reviews(task):
    prompts = task.load_prompts("eval")["prompt"]
    reviews = [text for text, _ in task.reviews("evaluation")]
    assert len(prompts) == len(reviews) >= 1000
    assert all(review.startswith(prompt) for prompt, review in zip(prompts, reviews, strict=True))
    assert {len(p.split(" ")) for p in prompts} == {3, 4, 5, 6}


def test_pairs_are_excerpts_of_equal_length_from_the_right_reviews(task):
    pairs = task.load_preferences("eval").select(range(200))
    sides = {label: [text for text, y in task.reviews("evaluation") if y == label] for label in (0, 1)}
    for row in pairs:
        assert len(row["chosen"].split(" ")) == len(row["rejected"].split(" ")) == row["words"]
        assert any(row["chosen"] in text for text in sides[1])
        assert any(row["rejected"] in text for text in sides[0])


def test_gold_judge_tells_held_out_reviews_apart(task):
    reviews = task.reviews("evaluation")
    scores = task.gold_reward([""] * len(reviews), [text for text, _ in reviews])
    assert sum((s > 0.5) == y for s, (_, y) in zip(scores, reviews, strict=True)) / len(reviews) > 0.87


def test_checkpoints_are_safetensors_and_small():
    files = [p for p in (FOLDER / "checkpoints").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12_000_000
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md", ".jsonl"}


def test_shipped_reward_prefers_praise():
    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.recipe.loading import load_recipe
    from rlhf_recipes.roles import build_roles

    recipe = load_recipe(FOLDER)
    tokenizer = load_tokenizer(recipe)
    reward = build_roles(recipe, tokenizer).reward.adapter
    texts = ["This movie is wonderful, one of the best I have ever seen.", "This movie is awful, a complete waste of time."]
    praise, pan = reward(tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]).tolist()
    assert praise > pan + 1


def test_two_updates_of_the_real_job(tmp_path):
    from scripts import ppo

    words = ["--ppo.total_episodes=128", "--evaluate.prompts=64", "--run.tracker=none", f"--run.output={tmp_path}"]
    summary = ppo.main(words)
    assert summary["prompts"] == 64
    assert 0.3 < summary["reference"]["gold"] < 0.7
    assert summary["policy"]["kl"] > 0
