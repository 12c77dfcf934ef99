"""The checks before a run: each failure says what to change, and nothing is written."""

import os

import psutil
import pytest
import torch

from rlhf_recipes.checks import machine, memory, models
from rlhf_recipes.checks.models import examine
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.models.backbone import tokens_without_row
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.rewards.function import FunctionReward
from rlhf_recipes.rewards.total import Term
from rlhf_recipes.roles import build_roles
from rlhf_recipes.tasks import load_dataset, load_task


@pytest.fixture
def ready(tiny):
    """A recipe, new roles, and its tokenised prompts."""
    recipe = load_recipe(tiny)
    tokenizer = load_tokenizer(recipe)
    prompts = tokenize_prompts(load_dataset(load_task(recipe), "load_prompts", "train"), tokenizer, 24)
    return recipe, build_roles(recipe, tokenizer), prompts


def examined(ready, message=None):
    recipe, roles, prompts = ready
    if message is None:
        return examine(roles, prompts, recipe)
    with pytest.raises(RecipeError, match=message):
        examine(roles, prompts, recipe)


def test_a_healthy_start_passes_and_leaves_the_random_state_alone(ready, capsys):
    before = torch.get_rng_state()
    examined(ready)
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().err == ""


def test_a_policy_away_from_its_reference(ready):
    for name, parameter in ready[1].policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    examined(ready, "nats from the reference")


def test_rewards_that_are_not_finite_or_do_not_vary(ready, capsys):
    _, roles, _ = ready
    roles.reward.terms = {"c": Term(FunctionReward(lambda prompts, completions: [2.5] * len(prompts)))}
    examined(ready)
    assert "the reward is 2.5 for all completions of 10 prompts" in capsys.readouterr().err
    roles.reward.terms = {"c": Term(FunctionReward(lambda prompts, completions: [None] * len(prompts)))}
    examined(ready, "no reward has an opinion")
    roles.reward.terms = {"c": Term(FunctionReward(lambda prompts, completions: [1e30] * len(prompts)), weight=1e30)}
    examined(ready, "of 10 of 10 completions is not finite")


def test_tokenizer_and_backbone_that_do_not_agree(ready):
    _, roles, _ = ready
    eos = roles.backbone.config.eos_token_id
    roles.backbone.config.eos_token_id = 7
    examined(ready, "its config ends a text with token 7 .* its tokenizer with 2 .'</s>'.")
    roles.backbone.config.eos_token_id = [7, eos]  # several ends, as chat models have
    examined(ready)
    roles.tokenizer.add_tokens([f"<new {i}>" for i in range(400)])
    examined(ready, "resize the embedding")


@pytest.mark.parametrize("script", ["ppo", "preferences"])
def test_a_failed_check_writes_nothing(tiny, tmp_path, capsys, monkeypatch, script):
    import importlib

    monkeypatch.setitem(models.ROUNDING, torch.float32, -1.0)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"scripts.{script}").main(["--recipe", str(tiny), "--run.output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "nats from the reference" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_memory_and_disk(tiny, monkeypatch, tmp_path):
    recipe = load_recipe(tiny, {"run.output": str(tmp_path / "not" / "yet")})
    assert machine.warnings(recipe, "ppo") == []
    machine.check(recipe, "ppo")
    estimate = sum(memory.memory_estimate(recipe, "ppo").values())
    for available, warned in ((estimate * 0.9, True), (estimate * 1.1, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda a=available: type("M", (), {"available": a}))
        assert bool(machine.warnings(recipe, "ppo")) == warned
    monkeypatch.setattr(psutil, "disk_usage", lambda path: type("D", (), {"free": 1000}))
    with pytest.raises(RecipeError, match=rf"free in {tmp_path}; make room, or choose another place with --run.output"):
        machine.check(recipe, "ppo")


def test_a_token_that_stands_for_images_needs_no_row(ready):
    """Gemma 3 of 1B has one token more than rows."""
    _, roles, _ = ready
    roles.tokenizer.add_tokens([f"<new {i}>" for i in range(roles.backbone.config.vocab_size - len(roles.tokenizer))])
    assert tokens_without_row(roles.tokenizer, roles.backbone) == []
    roles.tokenizer.add_tokens(["<image>"])
    assert tokens_without_row(roles.tokenizer, roles.backbone) == ["<image>"]
    roles.tokenizer.image_token = "<image>"  # noqa: S105
    assert tokens_without_row(roles.tokenizer, roles.backbone) == []


def test_weights_that_only_their_owner_may_read_are_named(tiny, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".safetensors"))
    with pytest.raises(RecipeError, match=r"`model.path` checkpoints/backbone: .*model.safetensors may not be read by you"):
        machine.check(load_recipe(tiny), "ppo")
