"""The reward model with TRL's RewardTrainer: -log sigmoid(r(chosen) - r(rejected)) (Bradley and Terry 1952), a LoRA adapter and
score head on the backbone."""

from collections import Counter
from functools import partial
from typing import Any

import torch
import trl
from datasets import Dataset
from trl import RewardConfig

from rlhf_recipes.algorithms.trl_config import refused_by_trl, stage_config
from rlhf_recipes.checks.memory import memory_warning
from rlhf_recipes.checks.models import examine_reward
from rlhf_recipes.checks.saved import read_back_reward
from rlhf_recipes.data.datasets import tokenize_pairs
from rlhf_recipes.data.tokenizer import end_token_ids, load_tokenizer
from rlhf_recipes.evaluation.accuracy import pairwise_accuracy
from rlhf_recipes.evaluation.tables import print_rows
from rlhf_recipes.evaluation.watch import watch
from rlhf_recipes.models.adapters import load_with_new_adapter
from rlhf_recipes.process import say_left_out, warn
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.rewards.adapter import AdapterReward
from rlhf_recipes.runs.fingerprint import ADAPTER, made_by
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.sharding import whole_model
from rlhf_recipes.runs.trainer import Resumable
from rlhf_recipes.tasks import load_dataset, load_task


class RewardTrainer(Resumable, trl.RewardTrainer):
    """TRL's, resumable. It switches off the backbone's dropout, and not an adapter's, `lora.dropout`."""

    _signature_columns: list[str]

    def __init__(self, model: Any, **kwargs: Any) -> None:
        adapters = {m: m.p for name, m in model.named_modules() if "lora_dropout" in name and isinstance(m, torch.nn.Dropout)}
        super().__init__(model=model, **kwargs)
        for dropout, p in adapters.items():
            dropout.p = p

    def _prepare_dataset(self, dataset: Dataset, tokenizer: Any, args: Any, name: str) -> Dataset:
        kept = super()._prepare_dataset(dataset, tokenizer, args, name)
        if len(kept) == 0:
            raise RecipeError(f"`reward_training.max_length` {args.max_length}: all {len(dataset)} pairs are longer; raise it")
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "length"})  # `train_sampling_strategy` group_by_length


def train_reward(recipe: Recipe) -> dict[str, Any]:
    """Trains the reward adapter of `recipe` on the task's preferences and judges it on held-out ones; returns the summary."""
    task, tokenizer = load_task(recipe), load_tokenizer(recipe)
    ends, read_eos = end_token_ids(tokenizer, recipe.path(recipe.model.path)), recipe.reward.adapter_reads_eos
    train, evaluation = (
        tokenize_pairs(load_dataset(task, "load_preferences", split), tokenizer, read_eos, ends) for split in ("train", "eval")
    )

    build = partial(load_with_new_adapter, recipe.model, recipe.path(recipe.model.path), recipe.lora, "SEQ_CLS")
    model = build()
    model.config.pad_token_id = tokenizer.pad_token_id

    args = stage_config(RewardConfig, "reward_training", recipe.stages["reward_training"], recipe.run.seed, recipe.model.dtype)
    with refused_by_trl("reward_training"):
        trainer = RewardTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer)
        trainer.try_optimizer()
    trainer.refuse_no_batch("reward_training", len(trainer.train_dataset))
    examine_reward(trainer, tokenizer, recipe.model)
    warn(memory_warning(recipe, "reward", max(train["length"])))
    if args.max_length is not None:
        long = sum(length > args.max_length for length in train["length"])
        how = f"are longer than reward_training.max_length={args.max_length} tokens, left out"
        say_left_out(long, len(train), "pairs of load_preferences", how)

    run = Run.prepare(recipe, "reward")
    run.start()
    watch(trainer, run)
    trainer.train()

    model = whole_model(trainer, build)
    accuracy = pairwise_accuracy(AdapterReward(model.eval()), evaluation, recipe.evaluate.batch_size)
    run.save_adapter(model, run.folder / "adapter")
    if run.main:
        run.write_json(f"adapter/{ADAPTER}", made_by(recipe, run.folder / "adapter"))
        read_back_reward(run.folder / "adapter", model, evaluation)
        words = evaluation["words"] if "words" in evaluation.column_names else []
        counts = Counter(f"{number} words" for number in words) | Counter(all=len(evaluation))
        rows = [[name, f"{share:.3f}", str(counts[name])] for name, share in accuracy.items()]
        print_rows(["held-out pairs", "chosen scores higher", "pairs"], rows, title="pairwise accuracy; chance is 0.5")
    return run.finish({"train_pairs": len(train), "eval_pairs": len(evaluation), "eval_accuracy": accuracy})
