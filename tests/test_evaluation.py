"""Held-out evaluation: what its numbers are."""

import pytest
import torch

from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.evaluation.judging import complete, distinct_n
from rlhf_recipes.evaluation.tables import markdown_samples
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.tasks import load_dataset, load_task, optional_gold


def test_distinct_n():
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a", ""], 2) == 0


def test_complete_judges_every_sample_of_every_prompt(tiny, roles):
    recipe, task = load_recipe(tiny), load_task(tiny)
    prompts = tokenize_prompts(load_dataset(task, "load_prompts", "eval"), roles.tokenizer, 24, limit=5)
    before = torch.random.get_rng_state()
    judged = complete(
        roles.policy, roles, prompts, recipe.run.seed, recipe.evaluate.batch_size, optional_gold(task), "policy", samples=3
    )
    assert torch.equal(torch.random.get_rng_state(), before)  # training goes on as if nothing had been sampled
    for tensor in (judged.reward, judged.kl, judged.kl_k3, judged.length, judged.gold):
        assert tensor.shape == (5, 3)
    assert (judged.kl_k3 >= 0).all()
    assert judged.kl_k3.mean() > 0
    gold = task.gold_reward([], [text for row in judged.texts for text in row])
    assert judged.gold.flatten().tolist() == gold
    means = judged.means(beta=0.5)
    assert means["objective"] == pytest.approx(means["reward"] - 0.5 * means["kl"])


def test_the_reference_has_no_kl_to_itself(tiny, roles):
    recipe, task = load_recipe(tiny), load_task(tiny)
    prompts = tokenize_prompts(load_dataset(task, "load_prompts", "eval"), roles.tokenizer, 24, limit=3)
    judged = complete(roles.reference, roles, prompts, recipe.run.seed, recipe.evaluate.batch_size, None, "reference")
    assert torch.equal(judged.kl, torch.zeros(3, 1))
    assert judged.gold is None


def test_model_output_cannot_become_markup():
    row = {"prompt": "a | b", "reference": "<script>alert(1)</script>", "policy": "x\ny"}
    text = markdown_samples([row | {"reference_reward": 0.0, "policy_reward": 1.0}])
    assert "<script>" not in text
    assert text.splitlines()[2].count("|") == 4
