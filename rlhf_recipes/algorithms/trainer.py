"""PPO on a LoRA policy: TRL's PPOTrainer in its config, constructor and metric names, with its loop opened up.

The only file that imports `trl.experimental.ppo` (1.12.0 is the last release that has it). What differs from TRL's loop:

- the value function is a head on the policy's trunk, so a training step needs one forward pass and not two;
- policy, reference, value and reward share one frozen backbone (roles.py), and only what is trained is saved;
- logits exist for a chunk of response tokens at a time (models/logprobs.py), and generation keeps none;
- a loss is averaged over the tokens of its whole minibatch, so gradient accumulation equals the large batch;
- gradients are clipped at `max_grad_norm`, advantage whitening is a choice;
- held-out prompts are judged during training, and the best policy is kept;
- a run that was interrupted goes on bit for bit (runs/trainer.py).

`ppo.loop: trl` runs TRL's own loop on the same roles instead.
"""

import os
import time
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DataCollatorWithPadding
from transformers.trainer_utils import SaveStrategy

from rlhf_recipes.models.reference import SyncedReference
from rlhf_recipes.models.value import ValueAdapter, ValueHead
from rlhf_recipes.objective import (
    adapted_beta,
    correlation,
    explained_variance,
    generalized_advantages,
    masked_mean,
    token_kl,
    weighted_token_kl,
    whitening_scale,
)
from rlhf_recipes.process import stop_together
from rlhf_recipes.recipe.errors import RecipeError, StoppedError
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.rewards.total import Rewards, Scores
from rlhf_recipes.roles import Roles
from rlhf_recipes.rollouts.forward import ResponseOutput, predicting_inputs, response_forward
from rlhf_recipes.rollouts.sampler import Sampled
from rlhf_recipes.rollouts.samples import Samples
from rlhf_recipes.runs.checkpoints import prune, share, write_checkpoint
from rlhf_recipes.runs.state import random_state, restore_random_state
from rlhf_recipes.runs.trainer import Resumable

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental import ppo as trl_ppo
from trl.experimental.ppo import ppo_trainer as trl_ppo_trainer

_REFERENCE = "reference.safetensors"


@dataclass
class PPOConfig(trl_ppo.PPOConfig):
    """TRL's PPOConfig, with gradient clipping and choices that TRL's loop does not have."""

    save_steps: float = field(default=10, metadata={"help": "Updates between two checkpoints; an update is dear."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept; null keeps all."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients at this norm; 0 never clips, as TRL."})
    value: Literal["trunk", "adapter"] = field(
        default="trunk",
        metadata={"help": "The value function: a head on the policy's trunk, or its own LoRA adapter and head."},
    )
    full_kl: bool = field(
        default=False,
        metadata={
            "help": "Sum the KL over the vocabulary at every position instead of reading it off the sampled token: its own "
            "gradient becomes a loss term, and the reward of a token holds the KL of what follows it. "
            "Less noise near the reference, more near the optimum."
        },
    )
    reward_baseline: bool = field(
        default=False,
        metadata={"help": "V(s) is the reward model's score of the text so far plus what the value function learns beside it."},
    )
    kl_loss: bool = field(
        default=False,
        metadata={
            "help": "The KL by `kl_estimator` is a term of the loss, with the gradient of the KL at each state, and the reward "
            "of a token holds the KL of what follows it: `full_kl` from sampled tokens alone."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "beta starts at objective.beta and adapts so that the KL stays at this many nats a completion."},
    )
    kl_horizon: int = field(default=10000, metadata={"help": "Episodes in which `kl_target` changes beta by at most 20%."})
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Leave out an update's remaining epochs once it has moved the policy by this many nats a token."},
    )
    reference: Literal["frozen", "sync", "none"] = field(
        default="frozen",
        metadata={
            "help": "Whom the leash holds on to: the backbone, the policy itself as it was some updates ago, or nobody. "
            "Held-out KL and J are always to the backbone."
        },
    )
    reference_sync_steps: int = field(
        default=10, metadata={"help": "Updates after which `reference: sync` follows the policy."}
    )
    whiten_advantages: bool = field(default=True, metadata={"help": "Unit variance and zero mean, as TRL always does."})
    loop: Literal["lean", "trl"] = field(
        default="lean", metadata={"help": "This repository's training loop, or TRL's own with a value model of its own."}
    )

    load_best_model_at_end: bool = False

    def __post_init__(self) -> None:
        # transformers ties the best model to the checkpoints' steps; here it is kept by itself, at every evaluation
        best, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()
        self.load_best_model_at_end = best
        if self.loop == "trl":  # which cannot go on from a checkpoint
            self.save_strategy = SaveStrategy.NO


class PolicyAndValue(nn.Module):
    """What is trained, as one module, so that one `accelerator.prepare` and one DDP wrapper hold it."""

    def __init__(self, policy: nn.Module, value: ValueHead) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    def forward(
        self,
        sequences: Tensor,
        attention: Tensor,
        context_length: int,
        temperature: float,
        reference_hidden: Tensor | None = None,
    ) -> tuple[ResponseOutput, Tensor]:
        """Returns the policy's view of the response and V before each of its tokens, [batch, response]."""
        output = response_forward(self.policy, sequences, attention, context_length, temperature, reference_hidden)
        if isinstance(self.value, ValueAdapter):
            hidden = self.value.hidden(**predicting_inputs(sequences, attention))
            return output, self.value(hidden[:, context_length - 1 :])
        return output, self.value(output.hidden)


class StockReward(nn.Module):
    """The reward model as TRL's own loop reads one: a sequence classifier that scores every position."""

    base_model_prefix = "trunk"

    def __init__(self, rewards: Rewards) -> None:
        super().__init__()
        adapter = rewards.adapter
        assert adapter is not None, "TRL's own loop takes one reward adapter; checks/settings.py refuses others"
        self.prefix_scores = adapter.prefix_scores

    def trunk(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(hidden_states=[self.prefix_scores(input_ids, attention_mask)])

    def score(self, scores: Tensor) -> Tensor:
        return scores.unsqueeze(-1)


@dataclass
class Rollout:
    """One batch of experience; all but the first three, `scores` and `ended` are [batch, response].

    `mask` marks the response's tokens, eos included, of rows that have a score. `value_mask` marks one position more where
    there is room: the state after the last token, where TRL puts the score.
    """

    query_responses: Tensor  # [batch, context + response]
    attention: Tensor  # which of them are tokens, [batch, context + response]
    context_length: int
    mask: Tensor
    logprobs: Tensor  # as the training pass computes them; the ratio starts at exactly 1
    sampling_logprobs: Tensor  # as the tokens were drawn, with a cache and merged adapters
    values: Tensor
    baseline: Tensor | None  # the reward model's score of the text so far, with `reward_baseline`; part of `values`
    kl: Tensor  # by `kl_estimator` or `full_kl`
    reference_logprobs: Tensor
    reference_hidden: Tensor | None  # [batch, response, hidden], for `full_kl`
    scores: Scores
    ended: Tensor  # whether a response has an end, [batch]

    @property
    def responses(self) -> Tensor:
        return self.query_responses[:, self.context_length :]

    @property
    def value_mask(self) -> Tensor:
        return after_mask(self.mask, self.scores.valid)


def after_mask(mask: Tensor, valid: Tensor) -> Tensor:
    """`mask` and one position more where there is room, of the rows that are `valid` [batch]; [batch, response]"""
    return torch.cat([valid.unsqueeze(1), mask[:, :-1]], dim=1)


@dataclass
class Advantages:
    """What the rollout's tokens were worth. `scale` is by how much whitening stretched the advantages (1 without)."""

    advantages: Tensor  # [batch, response]
    returns: Tensor  # [batch, response]
    scale: Tensor  # scalar


class PPOTrainer(Resumable, trl_ppo.PPOTrainer):
    """Maximises E[r] - beta * KL by PPO (Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593).

    Args:
        args: the config; `kl_coef` is beta.
        roles: policy, reference, value and reward (roles.py).
        train_dataset: with columns `prompt` and `input_ids`, its token ids; others reach python rewards.
        callbacks: transformers callbacks.
        judge: returns the metrics of the policy on held-out prompts, for `eval_strategy: steps`.
    """

    args: PPOConfig

    def __init__(
        self,
        args: PPOConfig,
        roles: Roles,
        train_dataset: Dataset,
        callbacks: list | None = None,
        judge: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.roles, self.judge, self.prompts = roles, judge, train_dataset
        self.kl_coef = args.kl_coef  # beta, which `kl_target` adapts
        self.batches_seen = 0  # of the current pass over the data
        reference = SyncedReference(roles.policy) if args.reference == "sync" else roles.reference
        stock = args.loop == "trl"
        # TRL's constructor wraps policy and value in a class whose forward runs two trunks; ours takes its place.
        wrapper = trl_ppo_trainer.PolicyAndValueWrapper if stock else PolicyAndValue
        with mock.patch.object(trl_ppo_trainer, "PolicyAndValueWrapper", wrapper):
            super().__init__(
                args=args,
                processing_class=roles.tokenizer,
                model=roles.policy,
                ref_model=reference,
                reward_model=StockReward(roles.reward) if stock else roles.reward,
                value_model=roles.value,
                train_dataset=train_dataset.select_columns(["input_ids"]).add_column("row", range(len(train_dataset))),
                data_collator=DataCollatorWithPadding(roles.tokenizer),
                callbacks=callbacks,
            )

    # --- the loop ------------------------------------------------------------------------------------------------

    def _train(self, checkpoint: Path | None) -> None:
        """Runs `num_total_batches` updates: rollout, rewards, advantages, update."""
        args = self.args
        if args.loop == "trl":
            return trl_ppo.PPOTrainer.train(self)
        if checkpoint is not None:
            self.load_state(checkpoint)
            self._load_optimizer_and_scheduler(str(checkpoint))
        self.state.max_steps = args.num_total_batches
        self.state.num_train_epochs = args.total_episodes / self.train_dataset_len
        self.state.logging_steps = args.logging_steps
        self.state.save_steps, self.state.eval_steps = args.save_steps, args.eval_steps
        self.model.train()
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start and checkpoint is None:
            self.evaluate()
        batches = self._batches()
        while self.state.global_step < args.num_total_batches and not self.control.should_training_stop:
            started = time.perf_counter()
            rollout = self.rollout(*next(batches))
            rewards = self.rewards(rollout)
            advantages = self.advantages(rollout, rewards)
            stats = self.update(rollout, advantages)

            self.state.global_step += 1
            self.state.episode += args.batch_size
            self.state.epoch = self.state.episode / self.train_dataset_len
            metrics = self._metrics_of(rollout, advantages, stats, seconds=time.perf_counter() - started)
            self.log(dict(metrics))
            self._move_leash(metrics["objective/kl"])
            self.lr_scheduler.step()
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            if self.control.should_evaluate:
                self.control.should_evaluate = False
                self.evaluate()
            if self.control.should_save:
                self.control.should_save = False
                self.save_checkpoint()
        if args.load_best_model_at_end and not self.interrupted and self.state.best_model_checkpoint is not None:
            self.accelerator.wait_for_everyone()
            self.load_model(Path(self.state.best_model_checkpoint))
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)

    def _move_leash(self, kl: float) -> None:
        """Adapts beta to `kl_target`, and lets a synced reference follow the policy, where the recipe says so."""
        args = self.args
        if args.kl_target is not None:
            self.kl_coef = adapted_beta(self.kl_coef, kl, args.kl_target, args.batch_size, args.kl_horizon)
        if isinstance(self.ref_model, SyncedReference) and self.state.global_step % args.reference_sync_steps == 0:
            self.ref_model.sync()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Judges the policy on held-out prompts, logs `eval/<metric>`, and keeps the best by `metric_for_best_model`."""
        assert self.judge is not None, "eval_strategy needs a judge"
        self.model.eval()
        metrics = {f"eval/{name}": value for name, value in self.judge().items()}
        self.model.train()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.args.metric_for_best_model is not None:
            self._keep_if_best(metrics[f"eval/{self.args.metric_for_best_model}"])
        return metrics

    def _keep_if_best(self, value: float) -> None:
        """Saves the policy as `best-<step>` if it is the best so far; the one before stays while a checkpoint needs it."""
        args, state = self.args, self.state
        if state.best_metric is not None and value <= state.best_metric:
            return
        state.best_metric, state.best_global_step = value, state.global_step
        state.best_model_checkpoint = str(Path(args.output_dir) / f"best-{state.global_step}")
        failure = None
        if self.accelerator.is_main_process:
            trained = (p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
            try:
                write_checkpoint(Path(state.best_model_checkpoint), lambda folder: self.save_model(str(folder)), sum(trained))
                prune(Path(args.output_dir), args.save_total_limit, state.best_model_checkpoint)
            except StoppedError as error:
                failure = error
        stop_together(failure)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, dict[str, list]]]:
        """Queries and which of them are tokens, [batch, context], and their rows of the dataset, from where a checkpoint ended.

        The order of a pass is drawn again from the random state it was drawn from, and what was seen is passed over.
        """
        seen = 0
        if self._restored is not None:
            own, generator = self.mine["own"], self.data_generator
            seen = own["batches_seen"] % len(self.dataloader)
            restore_random_state(self.mine["epoch_random" if seen else "random"], generator)
        while True:
            self.epoch_random = random_state(self.data_generator)
            self.batches_seen = 0
            for batch in self.dataloader:
                self.batches_seen += 1
                if self.batches_seen <= seen:
                    if self.batches_seen == seen:
                        restore_random_state(self.mine["random"])
                    continue
                queries, attention = (batch[key].to(self.accelerator.device) for key in ("input_ids", "attention_mask"))
                yield queries, attention, self.prompts[batch["row"].tolist()]
            seen = 0

    @torch.no_grad()
    def rollout(self, queries: Tensor, attention: Tensor, rows: dict[str, list]) -> Rollout:
        """Samples a response to each query and reads what every role says of it.

        Args:
            queries: padded on the left, [batch, context].
            attention: which of them are tokens, [batch, context].
            rows: the dataset's columns of the same prompts.
        """
        args, size = self.args, self.args.local_rollout_forward_batch_size
        policy_and_value = self.accelerator.unwrap_model(self.model)
        context = queries.shape[1]
        sampled = Sampled.joined([
            self.roles.sampler(policy_and_value.policy, *chunk)
            for chunk in zip(queries.split(size), attention.split(size), strict=True)
        ])  # fmt: skip
        parts = []
        for chunk in zip(sampled.sequences.split(size), sampled.attention.split(size), strict=True):
            if args.reference == "none":
                output, values = policy_and_value(*chunk, context, args.temperature)
                reference = output
            else:
                reference = response_forward(self.ref_model, *chunk, context, args.temperature)
                hidden = reference.hidden if args.full_kl else None
                output, values = policy_and_value(*chunk, context, args.temperature, hidden)
            kl = output.kl if args.full_kl else token_kl(output.logprobs, reference.logprobs, args.kl_estimator)
            parts.append((output.logprobs, kl, reference.logprobs, reference.hidden, values))
        logprobs, kl, reference_logprobs, reference_hidden, values = (torch.cat(part) for part in zip(*parts, strict=True))
        columns = {name: values for name, values in rows.items() if name not in ("prompt", "input_ids")}
        samples = Samples(
            sampled.sequences, context, self.processing_class, rows["prompt"], columns, sampled.attention, sampled.ended
        )
        scores = self._scores_of(samples)
        baseline = torch.zeros_like(values) if scores.prefix is None else scores.prefix[:, context - 1 : -1]
        mask = samples.mask & scores.valid.unsqueeze(1)
        return Rollout(
            query_responses=sampled.sequences,
            attention=sampled.attention,
            context_length=context,
            mask=mask,
            logprobs=logprobs,
            sampling_logprobs=sampled.logprobs,
            kl=kl * mask,
            reference_logprobs=reference_logprobs,
            reference_hidden=reference_hidden if args.full_kl else None,
            values=(values + baseline) * after_mask(mask, scores.valid),
            baseline=None if scores.prefix is None else baseline,
            scores=scores,
            ended=sampled.ended,
        )

    def _scores_of(self, samples: Samples) -> Scores:
        """The rewards of this process's rollout; a failing one stops all processes."""
        args, scores, failure = self.args, None, None
        try:
            scores = self.reward_model(samples, args.local_rollout_forward_batch_size, prefix=args.reward_baseline)
        except RecipeError as error:
            failure = error
        stop_together(failure)
        assert scores is not None
        return scores

    def rewards(self, rollout: Rollout) -> Tensor:
        """r_t = -beta * KL_t, plus the score in the state after the response's last token; [batch, response].

        A response that fills all its positions has no such state; there the score goes to its last token, as in TRL.
        With `full_kl` or `kl_loss`, r_t holds KL_{t+1}: the KL at t does not depend on the token chosen at t, and its gradient
        is a term of the loss.
        """
        args, scores = self.args, rollout.scores.total
        rewards = -self.kl_coef * rollout.kl
        if args.full_kl or args.kl_loss:
            rewards = nn.functional.pad(rewards[:, 1:], (0, 1))
        rewards[torch.arange(len(scores)), rollout.value_mask.sum(1) - 1] += scores
        if args.whiten_rewards:
            mean, scale = self._whitening(rewards, rollout.value_mask)
            rewards = ((rewards - mean) * scale + mean) * rollout.value_mask
        return rewards

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """GAE advantages, whitened over the batch if `whiten_advantages`, and the returns V is fitted to."""
        raw = generalized_advantages(rewards, rollout.values, self.args.gamma, self.args.lam)
        returns = raw + rollout.values
        if not self.args.whiten_advantages:
            return Advantages(raw * rollout.mask, returns, torch.ones_like(raw[0, 0]))
        mean, scale = self._whitening(raw, rollout.mask)
        return Advantages((raw - mean) * scale * rollout.mask, returns, scale)

    def _whitening(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and inverse deviation under `mask` over the rollouts of all processes, as if they were one batch."""
        values, mask = self.accelerator.gather(values), self.accelerator.gather(mask.float())
        return masked_mean(values, mask), whitening_scale(values, mask)

    def update(self, rollout: Rollout, advantages: Advantages) -> dict[str, Tensor]:
        """`num_ppo_epochs` passes over the rollout in minibatches; returns each statistic of every micro batch, [steps].

        With `target_kl` an epoch that has gone too far, by the mean over its steps and all processes, is the last.
        """
        args = self.args
        stats: dict[str, list[Tensor]] = {}
        for epoch in range(args.num_ppo_epochs):
            order = torch.from_numpy(np.random.permutation(args.local_batch_size)).to(rollout.mask.device)
            for minibatch in order.split(args.local_mini_batch_size):
                tokens = self._count(rollout.mask[minibatch])
                states = self._count(rollout.value_mask[minibatch])
                micro_batches = minibatch.split(args.per_device_train_batch_size)
                for rows in micro_batches:
                    last = rows is micro_batches[-1]
                    self.accelerator.sync_gradients = last  # one optimizer step a minibatch
                    with nullcontext() if last else self.accelerator.no_sync(self.model):
                        self.batch = {"rows": rows, "advantages": advantages.advantages, **vars(rollout)}
                        loss, step_stats = self.loss(rollout, advantages, rows, tokens, states)
                        self.accelerator.backward(loss * args.gradient_accumulation_steps)  # which divides by it
                    for name, value in step_stats.items():
                        stats.setdefault(name, []).append(value)
                if args.max_grad_norm:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
                    stats.setdefault("policy/grad_norm", []).append(norm)
                self.control = self.callback_handler.on_pre_optimizer_step(args, self.state, self.control)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if args.target_kl is not None:
                steps = len(stats["policy/step_kl"]) // (epoch + 1)
                step_kl = torch.stack(stats["policy/step_kl"][-steps:]).mean()
                if self.accelerator.reduce(step_kl, "mean") > args.target_kl:
                    break
        stats["policy/epochs"] = [torch.tensor(epoch + 1.0)]
        return {name: torch.stack(values) for name, values in stats.items()}

    def _count(self, mask: Tensor) -> Tensor:
        """The mean over processes of how many positions `mask` marks, so that DDP's mean gradient is the large batch's; at
        least 1, since a minibatch may have no row with a score."""
        return self.accelerator.reduce(mask.sum().float(), "mean").clamp(min=1)

    def loss(
        self, rollout: Rollout, advantages: Advantages, rows: Tensor, tokens: Tensor, states: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate (arXiv 1707.06347, eq. 7), `vf_coef` times the clipped value loss, and the full KL if chosen.

        Args:
            rows: which rows of the rollout, [micro batch].
            tokens, states: how many the whole minibatch has, over which policy and value loss are averaged.

        Returns:
            the loss, and its statistics averaged over this micro batch's own tokens.
        """
        args = self.args
        mask, value_mask = rollout.mask[rows], rollout.value_mask[rows]
        advantage, target = advantages.advantages[rows], advantages.returns[rows]
        output, values = self.model(
            rollout.query_responses[rows],
            rollout.attention[rows],
            rollout.context_length,
            args.temperature,
            None if rollout.reference_hidden is None else rollout.reference_hidden[rows],
        )
        if rollout.baseline is not None:
            values = values + rollout.baseline[rows]
        difference = (output.logprobs - rollout.logprobs[rows]) * mask
        ratio = difference.exp()
        unclipped = -advantage * ratio
        clipped = -advantage * ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
        policy_loss = torch.max(unclipped, clipped) * mask
        kl = output.kl
        if args.kl_loss:
            reference = rollout.reference_logprobs[rows]
            kl = weighted_token_kl(output.logprobs, rollout.logprobs[rows], reference, args.kl_estimator)
        if kl is not None:
            policy_loss = policy_loss + self.kl_coef * advantages.scale * kl * mask

        old_values = rollout.values[rows]
        near = values.clamp(old_values - args.cliprange_value, old_values + args.cliprange_value)
        error, near_error = (values - target).square(), (near - target).square()
        value_loss = 0.5 * torch.max(error, near_error) * value_mask

        loss = policy_loss.sum() / tokens + args.vf_coef * value_loss.sum() / states
        with torch.no_grad():
            stats = {
                "policy/approxkl_avg": 0.5 * difference.square().mean(),
                "policy/step_kl": masked_mean(0.5 * difference.square(), mask),
                "policy/clipfrac_avg": masked_mean((clipped > unclipped).float(), mask),
                "loss/policy_avg": masked_mean(policy_loss, mask),
                "loss/value_avg": masked_mean(value_loss, value_mask),
                "val/clipfrac_avg": masked_mean((near_error > error).float(), value_mask),
                "policy/entropy_avg": masked_mean(output.entropy, mask),
                "val/ratio": ratio.mean(),
            }
        return loss, stats

    # --- what a run leaves behind --------------------------------------------------------------------------------

    def _metrics_of(
        self, rollout: Rollout, advantages: Advantages, stats: dict[str, Tensor], seconds: float
    ) -> dict[str, float]:
        """TRL's metrics by TRL's names and some more: means over the rollout, the update's steps, and all processes."""
        args, accelerator = self.args, self.accelerator

        def mean(values: Tensor) -> float:
            return accelerator.gather_for_metrics(values.float().mean()).nanmean().item()

        scores, valid = rollout.scores.total, rollout.scores.valid
        sequence_kl, entropy = rollout.kl.sum(1), -(rollout.logprobs * rollout.mask).sum(1)
        length, mask = rollout.mask.sum(1), rollout.attention[:, rollout.context_length :]
        ratios = accelerator.gather_for_metrics(stats["val/ratio"])
        return {
            "objective/kl": mean(masked_mean(sequence_kl, valid)),
            "objective/entropy": mean(masked_mean(entropy, valid)),
            "objective/kl_coef": self.kl_coef,
            "objective/non_score_reward": mean(-self.kl_coef * masked_mean(sequence_kl, valid)),
            "objective/rlhf_reward": mean(masked_mean(scores - self.kl_coef * sequence_kl, valid)),
            "objective/scores": mean(masked_mean(scores, valid)),
            "objective/scores_std": mean(whitening_scale(scores, valid).reciprocal()),
            "completions/mean_length": mean(masked_mean(length, valid)),
            "completions/clipped_ratio": mean((~rollout.ended).float()),
            "completions/length_score_correlation": mean(correlation(length[valid], scores[valid])),
            **{name: mean(value) for name, value in rollout.scores.metrics().items()},
            **{name: mean(values) for name, values in stats.items()},
            "val/ratio_var": ratios.var().item() if len(ratios) > 1 else 0.0,
            "val/num_eos_tokens": int(accelerator.reduce((self.roles.sampler.ends.are(rollout.responses) & mask).sum())),
            "val/explained_variance": mean(explained_variance(rollout.values, advantages.returns, rollout.value_mask)),
            "val/sampling_gap": mean(masked_mean((rollout.logprobs - rollout.sampling_logprobs).abs(), rollout.mask)),
            "lr": self.lr_scheduler.get_last_lr()[0],
            "episode": self.state.episode,
            "eps": int(args.batch_size / seconds),
            "seconds": seconds,
            "tokens_per_second": int(accelerator.reduce(rollout.mask.sum())) / seconds,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the policy's adapter (PEFT's format) and the value function (value.safetensors), once."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.roles.policy.save_pretrained(folder, save_embedding_layers=False)
        value = {name: p.detach().cpu() for name, p in self.roles.value.named_parameters() if p.requires_grad}
        save_file(value, folder / "value.safetensors")
        share(folder)

    def save_weights(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        self.save_model(str(folder))
        if isinstance(self.ref_model, SyncedReference):
            save_file({str(i): then.cpu() for i, (_, then) in enumerate(self.ref_model.adapter)}, folder / _REFERENCE)

    def load_weights(self, folder: Path) -> None:
        self.load_model(folder)
        if isinstance(self.ref_model, SyncedReference):
            then = load_file(folder / _REFERENCE)
            for i, (_, data) in enumerate(self.ref_model.adapter):
                data.copy_(then[str(i)])

    @property
    def data_generator(self) -> torch.Generator | None:
        return getattr(self.dataloader, "synchronized_generator", None)

    def own_state(self) -> dict[str, Any]:
        rewards = {name: [term.mean, term.deviation] for name, term in self.roles.reward.terms.items()}
        return {"batches_seen": self.batches_seen, "kl_coef": self.kl_coef, "rewards": rewards}

    def restore_own_state(self, own: dict[str, Any]) -> None:
        self.kl_coef = own["kl_coef"]
        for name, (mean, deviation) in own["rewards"].items():
            self.roles.reward.terms[name].mean, self.roles.reward.terms[name].deviation = mean, deviation

    def load_model(self, folder: Path) -> None:
        """Reads what `save_model` wrote into policy and value."""
        set_peft_model_state_dict(self.roles.policy, load_file(folder / "adapter_model.safetensors"))
        self.roles.value.load_state_dict(load_file(folder / "value.safetensors"), strict=False)


def episodes_per_update(recipe: Recipe, stage: str) -> int:
    """The rollout's size over all processes: TRL's `batch_size`."""
    section = recipe.stages[stage]
    local = section.get("per_device_train_batch_size", 8) * section.get("gradient_accumulation_steps", 1)
    return local * PartialState().num_processes


def ppo_fields(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The facts that PPO shares with other stages, under TRL's field names; and what makes it A2C."""
    section, roll_back = recipe.stages[stage], recipe.watch.on_over_optimisation == "rollback"
    by_gold = {"metric_for_best_model": "gold"} if roll_back else {}
    one_step = {"num_ppo_epochs": 1, "num_mini_batches": 1} if stage == "a2c" else {}
    return {
        "kl_coef": recipe.objective.beta,
        "response_length": recipe.data.max_completion_tokens,
        "temperature": recipe.sampling.temperature,
        "missing_eos_penalty": recipe.reward.missing_eos_penalty,  # of TRL's own loop; in ours it is the reward's
        "stop_token": "eos",
        "num_sample_generations": 0,
        "eval_on_start": section.get("eval_strategy") == "steps",  # what the others are compared with
        **by_gold,
        **one_step,
    }
