"""The PPO loop: what an update changes, what it must not, and its loss written out."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rlhf_recipes.algorithms.ppo import Advantages
from rlhf_recipes.algorithms.ppo_config import PPOConfig, ppo_fields
from rlhf_recipes.algorithms.trainer import PPOTrainer
from rlhf_recipes.algorithms.trl_config import stage_config
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.roles import build_roles
from rlhf_recipes.rollouts.sampler import Sampled
from rlhf_recipes.tasks import load_dataset, load_task


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def build_trainer(tiny, tmp_path, stage="ppo", judge=None, **overrides):
    recipe = load_recipe(tiny, {key.replace("__", "."): value for key, value in overrides.items()})
    tokenizer = load_tokenizer(recipe)
    prompts = tokenize_prompts(load_dataset(load_task(recipe), "load_prompts", "train"), tokenizer, 24)
    roles = build_roles(recipe, tokenizer, value=recipe.stages[stage].get("value", "trunk"))
    settings = recipe.stages[stage], recipe.run.seed, recipe.model.dtype
    args = stage_config(PPOConfig, stage, *settings, tmp_path, **ppo_fields(recipe, stage))
    return PPOTrainer(args, roles, prompts, callbacks=[Recorder()], judge=judge)


def logs_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Recorder)).logs


def rewards_of_the_next_kl(rollout, beta=0.05):
    """r_t = -beta KL_{t+1}, and the scores of two responses of 6 and 2 tokens where they end."""
    expected = torch.zeros_like(rollout.kl)
    expected[:, :-1] = -beta * rollout.kl[:, 1:]
    expected[0, 5] += rollout.scores.total[0]
    expected[1, 2] += rollout.scores.total[1]
    return expected


def test_full_kl_belongs_to_the_state_and_not_to_the_token(tiny, tmp_path):
    trainer = build_trainer(tiny, tmp_path, ppo__kl="full", ppo__whiten_advantages=False)
    for name, p in trainer.roles.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(2))
    query = trainer.processing_class("the film")["input_ids"]
    rollout = rollout_of(trainer, query, [[5, 6, 7, 8, 9, 10], [7, 2, 0, 0, 0, 0]])
    assert (rollout.kl[rollout.mask] > 1e-4).all()
    rewards = trainer.ppo.rewards(rollout)
    torch.testing.assert_close(rewards, rewards_of_the_next_kl(rollout))
    nothing = Advantages(torch.zeros_like(rewards), rollout.values, torch.tensor(1.0))
    loss, _ = trainer.ppo.loss(trainer.model, rollout, nothing, torch.arange(2), torch.tensor(8), torch.tensor(9))
    assert loss.item() == pytest.approx(0.05 * rollout.kl.sum().item() / 8, rel=1e-4)


def test_the_reward_of_the_text_so_far_is_part_of_the_value(tiny, tmp_path):
    """V(s) = r(text so far) + head: in the rollout, where V starts as the prefix's score, and in the loss alike."""
    trainer = build_trainer(tiny, tmp_path, ppo__reward_baseline=True, ppo__whiten_advantages=False, ppo__lam=0.0)
    query = trainer.processing_class("the film")["input_ids"]
    rollout = rollout_of(trainer, query, [[5, 6, 7, 8, 9, 10], [7, 2, 0, 0, 0, 0]])
    reward = trainer.roles.reward.adapter
    for row, length in ((0, 6), (1, 3)):  # the second has a state after its eos, worth its score
        for t in range(length):
            prefix = rollout.query_responses[row : row + 1, : len(query) + t]
            torch.testing.assert_close(rollout.values[row, t], reward(prefix)[0], atol=1e-5, rtol=1e-4)
    advantages = trainer.ppo.advantages(rollout, trainer.ppo.rewards(rollout))
    _, stats = trainer.ppo.loss(trainer.model, rollout, advantages, torch.arange(2), torch.tensor(8), torch.tensor(9))
    returns = (advantages.returns - rollout.values)[rollout.value_mask]
    assert stats["loss/value_avg"].item() == pytest.approx(0.5 * returns.square().mean().item(), rel=1e-4)
    # lambda 0: a token is worth what it adds to the score (no KL yet at the start), and the steps add up to r - r(prompt)
    steps = advantages.advantages[0].sum()
    torch.testing.assert_close(steps, rollout.scores.total[0] - rollout.values[0, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_training_moves_policy_and_value_and_nothing_else(tiny, tmp_path, value):
    trainer = build_trainer(tiny, tmp_path, ppo__value=value)
    modules = {"policy": trainer.roles.policy, "value": trainer.roles.value, "reward": trainer.roles.reward}
    before = {f"{m}.{n}": p.detach().clone() for m, module in modules.items() for n, p in module.named_parameters()}
    trainer.train()
    moved = set()
    for m, module in modules.items():
        for n, p in module.named_parameters():
            trained = m != "reward" and ("lora_" in n or (m == "value" and n.startswith("score.")))
            assert p.requires_grad == trained, n
            if not torch.equal(before[f"{m}.{n}"], p):
                assert trained, f"{m}.{n} moved"
                moved.add(f"{m}.{n}")
    assert any("lora_B" in name for name in moved if name.startswith("policy."))
    assert "value.score.weight" in moved
    assert any("lora_B" in name for name in moved if name.startswith("value.")) == (value == "adapter")


def test_rewards_put_the_score_after_the_last_token_and_the_kl_on_every_token(tiny, tmp_path):
    trainer = build_trainer(tiny, tmp_path)
    tokenizer = trainer.processing_class
    query = tokenizer("the film")["input_ids"]
    responses = [[5, 6, 7, 8, 9, 10], [5, 6, tokenizer.eos_token_id, 0, 0, 0], [tokenizer.eos_token_id, 0, 0, 0, 0, 0]]
    assert tokenizer.pad_token_id == 0
    rollout = rollout_of(trainer, query, responses)
    assert rollout.mask.sum(1).tolist() == [6, 3, 1]  # eos belongs to the response
    rewards = trainer.ppo.rewards(rollout)
    expected = -0.05 * rollout.kl * rollout.mask
    for row, last in enumerate([5, 3, 1]):
        expected[row, last] += rollout.scores.total[row]
    torch.testing.assert_close(rewards, expected)
    assert (rewards[~rollout.value_mask] == 0).all()

    trainer.roles.reward.missing_eos_penalty = 3.0
    penalised = trainer.ppo.rewards(rollout_of(trainer, query, responses))
    torch.testing.assert_close((rewards - penalised).sum(1), torch.tensor([3.0, 0.0, 0.0]))


def rollout_of(trainer, query, responses):
    """A rollout of given token ids: `PPOTrainer.rollout` with sampling replaced."""
    from unittest import mock

    queries = torch.tensor([query] * len(responses))
    with mock.patch.object(trainer.roles, "sampler", Scripted(drawn(query, responses))):
        return trainer.rollout(queries, torch.ones_like(queries), {"prompt": ["the film"] * len(responses)})


@dataclass
class Scripted:
    """A sampler that says what it is told, whoever asks."""

    said: Sampled
    temperature: float = 1.0

    def __call__(self, policy, queries, attention, length=None):
        return self.said


def drawn(query, responses, pad=0, eos=2):
    """What the sampler would return, had it drawn these responses; pads follow their end."""
    sequences = torch.tensor([query + response for response in responses])
    said = sequences[:, len(query) :]
    return Sampled(sequences, sequences != pad, torch.zeros(said.shape), (said == eos).any(1))


def test_loss_is_the_papers(tiny, tmp_path):
    """The clipped surrogate and value loss in plain Python loops, on a policy that has moved since the rollout."""
    trainer = build_trainer(tiny, tmp_path, ppo__vf_coef=0.3)
    tokenizer = trainer.processing_class
    rollout = rollout_of(trainer, tokenizer("the film")["input_ids"], [[5, 6, 7, 8, 9, 10], [7, 2, 0, 0, 0, 0]])
    advantages, returns = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0))
    judged = Advantages(advantages, returns, torch.tensor(1.0))
    for name, p in trainer.roles.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(2))
    loss, stats = trainer.ppo.loss(trainer.model, rollout, judged, torch.tensor([0, 1]), torch.tensor(8), torch.tensor(9))
    output, values = trainer.model(rollout.query_responses, rollout.attention, rollout.context_length, 1.0)
    policy_loss, value_loss, clipped = 0.0, 0.0, 0
    for i, length in enumerate([6, 2]):  # tokens; the second response ends and so has a state after its last token
        for t in range(length):
            ratio = (output.logprobs[i, t] - rollout.logprobs[i, t]).exp().item()
            a = advantages[i, t].item()
            surrogate = min(ratio * a, max(0.8, min(1.2, ratio)) * a)
            clipped += surrogate < ratio * a
            policy_loss -= surrogate / 8
        for t in range(min(6, length + 1)):
            v, old, target = (x[i, t].item() for x in (values, rollout.values, returns))
            near = max(old - 0.2, min(old + 0.2, v))
            value_loss += 0.5 * max((v - target) ** 2, (near - target) ** 2) / 9
    assert loss.item() == pytest.approx(policy_loss + 0.3 * value_loss, rel=1e-4)
    assert stats["policy/clipfrac_avg"].item() == pytest.approx(clipped / 8)
    assert clipped > 0


def test_gradient_accumulation_equals_the_large_batch(tiny, tmp_path):
    """Rows of different lengths, so that a mean of micro batch means would differ."""
    gradients = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = build_trainer(
            tiny, tmp_path, ppo__per_device_train_batch_size=batch, ppo__gradient_accumulation_steps=accumulation,
            ppo__num_ppo_epochs=1,
        )  # fmt: skip
        query = trainer.processing_class("the film")["input_ids"]
        rollout = rollout_of(trainer, query, [[5 + i] * (1 + i % 6) + [0] * (5 - i % 6) for i in range(8)])
        advantages = trainer.ppo.advantages(rollout, trainer.ppo.rewards(rollout))
        seen = {}
        trainer.optimizer.zero_grad = lambda *a, trainer=trainer, seen=seen: seen.update(
            {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        )
        trainer.update(rollout, advantages)
        gradients.append(seen)
    large, accumulated = gradients
    assert large.keys() == accumulated.keys()
    assert any(g.abs().max() > 0 for g in large.values())
    for name, gradient in large.items():
        torch.testing.assert_close(accumulated[name], gradient, atol=1e-6, rtol=1e-4)


def test_gradient_clipping(tiny, tmp_path):
    norms = []
    for limit in (0.0, 1e-3):
        trainer = build_trainer(tiny, tmp_path, ppo__max_grad_norm=limit, ppo__num_ppo_epochs=1)
        step = trainer.optimizer.step

        def record(*args, trainer=trainer, step=step, **kwargs):
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
            return step(*args, **kwargs)

        trainer.optimizer.step = record
        torch.manual_seed(0)
        trainer.train()
    assert norms[0] > 1e-2
    assert norms[2] == pytest.approx(1e-3, rel=1e-2)


def test_prompts_longer_than_the_limit_are_left_out_not_cut(tiny, capsys):
    tokenizer = load_tokenizer(load_recipe(tiny))
    texts = ["film", "the film was great and superb and fine " * 4, "", "plot"]
    kept = tokenize_prompts(Dataset.from_dict({"prompt": texts, "extra": [1, 2, 3, 4]}), tokenizer, 8)
    assert kept["prompt"] == ["film", "", "plot"]  # an empty prompt is bos alone
    assert kept["extra"] == [1, 3, 4]
    assert "1 of 4 prompts are longer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "factors"),
    [({}, [1, 0.75, 0.5, 0.25]), ({"ppo__lr_scheduler_type": "constant_with_warmup", "ppo__warmup_steps": 2}, [0, 0.5, 1, 1])],
)
def test_learning_rate_schedule(tiny, tmp_path, settings, factors):
    """One step of the schedule an update, whatever the number of optimizer steps in it."""
    trainer = build_trainer(tiny, tmp_path, ppo__total_episodes=32, ppo__num_mini_batches=2, **settings)
    trainer.train()
    assert [log["lr"] for log in logs_of(trainer)] == pytest.approx([1e-3 * factor for factor in factors])


def test_the_best_policy_on_held_out_prompts_is_kept_and_loaded(tiny, tmp_path):
    seen = []

    def judge():
        assert not trainer.model.training
        seen.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        return {"objective": [0.1, 0.3, 0.2, 0.0][len(seen) - 1], "kl": 1.0}

    trainer = build_trainer(
        tiny, tmp_path, judge=judge, ppo__total_episodes=48, ppo__eval_strategy="steps", ppo__eval_steps=2,
        ppo__eval_on_start=True, ppo__metric_for_best_model="objective", ppo__load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    evaluations = [log for log in logs_of(trainer) if "eval/objective" in log]
    assert [log["eval/objective"] for log in evaluations] == [0.1, 0.3, 0.2, 0.0]
    assert sorted(p.name for p in tmp_path.glob("best-*")) == ["best-2"]
    now = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(now[name], seen[1][name]) for name in now)
    assert any(not torch.equal(seen[1][name], seen[2][name]) for name in now)
