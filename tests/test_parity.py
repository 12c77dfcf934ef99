"""Our loop against stock TRL 1.12's: the same seed, models and settings give the same metrics at every update."""

import copy
import types
from dataclasses import fields
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from rlhf_recipes.algorithms.ppo_config import PPOConfig, ppo_fields, trl_ppo, trl_ppo_trainer
from rlhf_recipes.algorithms.trainer import PPOTrainer
from rlhf_recipes.algorithms.trl_config import stage_config
from rlhf_recipes.data.tokenizer import Ends, load_tokenizer
from rlhf_recipes.models.adapters import lora_config
from rlhf_recipes.models.backbone import load_backbone
from rlhf_recipes.models.value import ValueAdapter
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.rewards.total import Rewards, Term
from rlhf_recipes.roles import build_roles
from rlhf_recipes.rollouts.lean import LeanSampler
from tests.test_ppo_trainer import Recorder

# TRL averages the entropy over padding too; ours is over the response's tokens.
OURS_ONLY = {"policy/entropy_avg", "eps"}


class FullReward(nn.Module):
    """Stock TRL's reading of a sequence classifier."""

    def __init__(self, model, pad):
        super().__init__()
        self.model, self.pad = model, pad

    def score(self, samples):
        input_ids = samples.sequences
        logits, _, _ = trl_ppo_trainer.get_reward(self.model, input_ids, self.pad, 0)
        last = (torch.arange(input_ids.shape[1]) * (input_ids != self.pad)).amax(1)
        return logits[torch.arange(len(last)), last, 0], None


def as_generate_does(probabilities):
    """`sample_tokens` with the random numbers of transformers' `generate`, so that both loops draw the same tokens."""
    return torch.multinomial(probabilities, num_samples=1).squeeze(1)


def classifier(recipe, seed):
    torch.manual_seed(seed)
    config = load_backbone(recipe.model, recipe.path(recipe.model.path)).config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full fine-tuning"])
@pytest.mark.parametrize("settings", [{}, {"kl_estimator": "k3", "whiten_rewards": True, "missing_eos_penalty": 0.5}])
def test_metrics_equal_stock_trl(tiny, tmp_path, lora, settings):
    recipe = load_recipe(tiny)
    tokenizer = load_tokenizer(recipe)
    texts = ["the film was great"[: 1 + i % 18] for i in range(40)]
    prompts = Dataset.from_dict({"prompt": texts, "input_ids": tokenizer(texts)["input_ids"]})
    values = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 16, "num_mini_batches": 2, "num_ppo_epochs": 2,
        "total_episodes": 64, "response_length": 6, "temperature": 0.8, "learning_rate": 3e-3, "kl_coef": 0.1,
        "stop_token": "eos", "num_sample_generations": 0, "report_to": "none", "logging_steps": 1, "bf16": False,
        "save_strategy": "no", "local_rollout_forward_batch_size": 16, "disable_tqdm": True, **settings,
    }  # fmt: skip
    shared = [f.name for f in fields(trl_ppo.PPOConfig) if f.name in values]
    assert sorted(shared) == sorted(values)

    def models():
        policy = load_backbone(recipe.model, recipe.path(recipe.model.path))
        with torch.no_grad():  # eos often enough that responses of many lengths meet
            policy.get_output_embeddings().weight[tokenizer.eos_token_id] *= 3
        reference = copy.deepcopy(policy)
        torch.manual_seed(3)
        policy = get_peft_model(policy, lora_config(recipe.lora, "CAUSAL_LM")) if lora else policy.requires_grad_(True)
        return policy, reference, classifier(recipe, 1), classifier(recipe, 2)

    policy, reference, reward, value = models()
    stock, ids = Recorder(), prompts.select_columns(["input_ids"])
    trainer = trl_ppo.PPOTrainer(
        args=trl_ppo.PPOConfig(**values), processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=ids, eval_dataset=ids, data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[stock],
    )  # fmt: skip
    np.random.seed(0)
    trainer.train()

    policy, reference, reward, value = models()
    ours = Recorder()
    head = ValueAdapter(value.model, value.config.hidden_size)
    head.score = value.score
    roles = types.SimpleNamespace(
        tokenizer=tokenizer,
        policy=policy,
        reference=reference,
        value=head,
        sampler=LeanSampler(Ends(tokenizer, [tokenizer.eos_token_id]), 6, 0.8),
        reward=Rewards(
            {"reward": Term(FullReward(reward, tokenizer.pad_token_id))}, missing_eos_penalty=values.get("missing_eos_penalty")
        ),
    )
    trainer = PPOTrainer(PPOConfig(**values), roles, prompts, callbacks=[ours])
    np.random.seed(0)
    with mock.patch("rlhf_recipes.rollouts.lean.sample_tokens", as_generate_does):
        trainer.train()

    assert len(ours.logs) == len(stock.logs) == 4
    assert stock.logs[0]["val/num_eos_tokens"] > 3
    for step, (mine, theirs) in enumerate(zip(ours.logs, stock.logs, strict=True)):
        assert theirs.keys() <= mine.keys()
        apart = {
            name: (mine[name], theirs[name])
            for name in theirs.keys() - OURS_ONLY
            if mine[name] != pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
        }
        assert not apart, f"update {step}"


class StockReward(nn.Module):
    """Our reward adapter as TRL's own loop reads a reward model: a sequence classifier that scores every position."""

    base_model_prefix = "trunk"

    def __init__(self, adapter):
        super().__init__()
        self.prefix_scores = adapter.prefix_scores

    def trunk(self, input_ids, attention_mask, **kwargs):
        return types.SimpleNamespace(hidden_states=[self.prefix_scores(input_ids, attention_mask)])

    def score(self, scores):
        return scores.unsqueeze(-1)


def stock_trainer(args, roles, prompts, callbacks):
    """TRL's own loop on our roles: reference, value adapter and reward adapter on the shared backbone, read by TRL's code."""
    roles.value.base_model_prefix = "trunk"  # where it looks for the value model's trunk
    ids = prompts.select_columns(["input_ids"])
    return trl_ppo.PPOTrainer(
        args=args, processing_class=roles.tokenizer, model=roles.policy, ref_model=roles.reference,
        reward_model=StockReward(roles.reward.adapter), value_model=roles.value, train_dataset=ids, eval_dataset=ids,
        data_collator=DataCollatorWithPadding(roles.tokenizer), callbacks=callbacks,
    )  # fmt: skip


def test_trls_own_loop_on_our_roles_gives_the_same_metrics(tiny, tmp_path):
    logs = {}
    for loop, trainer_of in (("trl", stock_trainer), ("ours", PPOTrainer)):
        recipe = load_recipe(
            tiny,
            {"ppo.value": "adapter", "ppo.total_episodes": 24, "ppo.learning_rate": 3e-3, "ppo.save_strategy": "no"},
        )
        tokenizer = load_tokenizer(recipe)
        texts = ["the film was"[: 1 + i % 12] for i in range(24)]
        prompts = Dataset.from_dict({"prompt": texts, "input_ids": tokenizer(texts)["input_ids"]})
        roles = build_roles(recipe, tokenizer, value="adapter")
        torch.manual_seed(1)
        with torch.no_grad():  # away from zero, where Adam turns rounding errors into steps of full length
            for name, parameter in [*roles.policy.named_parameters(), *roles.value.named_parameters()]:
                if "lora_B" in name or name == "score.weight":
                    parameter.normal_(std=0.1)
        recorder = Recorder()
        settings = recipe.stages["ppo"], recipe.run.seed, recipe.model.dtype
        args = stage_config(PPOConfig, "ppo", *settings, tmp_path, **ppo_fields(recipe, "ppo"))
        trainer = trainer_of(args, roles, prompts, callbacks=[recorder])
        np.random.seed(0)
        with mock.patch("rlhf_recipes.rollouts.lean.sample_tokens", as_generate_does):
            trainer.train()
        logs[loop] = recorder.logs
    trainer.save_model(tmp_path / "ours")
    assert (tmp_path / "ours" / "value.safetensors").is_file()
    assert len(logs["trl"]) == len(logs["ours"]) == 3
    for mine, theirs in zip(logs["ours"], logs["trl"], strict=True):
        for name in theirs.keys() - OURS_ONLY:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert logs["ours"][-1]["objective/kl"] > 1e-3
