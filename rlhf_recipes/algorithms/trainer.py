"""The loop of PPO and A2C: TRL's PPOTrainer in its config, constructor and metric names, with its loop opened up.

What an update computes is in ppo.py. What differs from TRL's loop:

- the value function is a head on the policy's trunk, so a training step needs one forward pass and not two;
- policy, reference, value and reward share one frozen backbone (roles.py), and only what is trained is saved;
- logits exist for a chunk of response tokens at a time (models/logprobs.py), and generation keeps none;
- a loss is averaged over the tokens of its whole minibatch, so gradient accumulation equals the large batch;
- gradients are clipped at `max_grad_norm`, advantage whitening is a choice;
- held-out prompts are judged during training, and the best policy is kept;
- a run that was interrupted resumes bit for bit (runs/trainer.py).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DataCollatorWithPadding

from rlhf_recipes.algorithms.experience import PolicyAndValue, Rollout, roll_out
from rlhf_recipes.algorithms.leash import Leash
from rlhf_recipes.algorithms.ppo import PPO, Advantages
from rlhf_recipes.algorithms.ppo_config import PPOConfig, trl_ppo, trl_ppo_trainer
from rlhf_recipes.objective import correlation, explained_variance, masked_mean, whitening_scale
from rlhf_recipes.process import stop_together
from rlhf_recipes.recipe.errors import StoppedError
from rlhf_recipes.roles import Roles
from rlhf_recipes.runs.checkpoints import prune, share, write_checkpoint
from rlhf_recipes.runs.state import random_state, restore_random_state
from rlhf_recipes.runs.trainer import Resumable


class PPOTrainer(Resumable, trl_ppo.PPOTrainer):
    """Maximises E[r] - beta * KL by PPO (ppo.py).

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
        self.leash = Leash(args, roles)
        self.batches_seen = 0  # of the current pass over the data
        # TRL's constructor wraps policy and value in a class whose forward runs two trunks; ours takes its place.
        with mock.patch.object(trl_ppo_trainer, "PolicyAndValueWrapper", PolicyAndValue):
            super().__init__(
                args=args,
                processing_class=roles.tokenizer,
                model=roles.policy,
                ref_model=roles.reference,
                reward_model=roles.reward,
                value_model=roles.value,
                train_dataset=train_dataset.select_columns(["input_ids"]).add_column("row", range(len(train_dataset))),
                data_collator=DataCollatorWithPadding(roles.tokenizer),
                callbacks=callbacks,
            )
        self.ppo = PPO(args, self.leash, self.accelerator.gather)

    # --- the loop ------------------------------------------------------------------------------------------------

    def _train(self, checkpoint: Path | None) -> None:
        """Runs `num_total_batches` updates: rollout, rewards, advantages, update."""
        args = self.args
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
            advantages = self.ppo.advantages(rollout, self.ppo.rewards(rollout))
            stats = self.update(rollout, advantages)

            self.state.global_step += 1
            self.state.episode += args.batch_size
            self.state.epoch = self.state.episode / self.train_dataset_len
            metrics = self._metrics_of(rollout, advantages, stats, seconds=time.perf_counter() - started)
            self.log(dict(metrics))
            self.leash.after_update(metrics["objective/kl"], self.state.global_step)
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

    def rollout(self, queries: Tensor, attention: Tensor, rows: dict[str, list]) -> Rollout:
        """Experience with the policy as it is now; the arguments are `_batches`'s."""
        model = self.accelerator.unwrap_model(self.model)
        return roll_out(model, self.leash, self.roles, self.args, queries, attention, rows)

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
                        loss, step_stats = self.ppo.loss(self.model, rollout, advantages, rows, tokens, states)
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
            "objective/kl_coef": self.leash.beta,
            "objective/non_score_reward": mean(-self.leash.beta * masked_mean(sequence_kl, valid)),
            "objective/rlhf_reward": mean(masked_mean(scores - self.leash.beta * sequence_kl, valid)),
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
        self.leash.save(folder)

    def load_weights(self, folder: Path) -> None:
        self.load_model(folder)
        self.leash.load(folder)

    @property
    def data_generator(self) -> torch.Generator | None:
        return getattr(self.dataloader, "synchronized_generator", None)

    def own_state(self) -> dict[str, Any]:
        rewards = {name: [term.mean, term.std] for name, term in self.roles.reward.terms.items()}
        return {"batches_seen": self.batches_seen, "kl_coef": self.leash.beta, "rewards": rewards}

    def restore_own_state(self, own: dict[str, Any]) -> None:
        self.leash.beta = own["kl_coef"]
        for name, (mean, std) in own["rewards"].items():
            self.roles.reward.terms[name].mean, self.roles.reward.terms[name].std = mean, std

    def load_model(self, folder: Path) -> None:
        """Reads what `save_model` wrote into policy and value."""
        set_peft_model_state_dict(self.roles.policy, load_file(folder / "adapter_model.safetensors"))
        self.roles.value.load_state_dict(load_file(folder / "value.safetensors"), strict=False)
