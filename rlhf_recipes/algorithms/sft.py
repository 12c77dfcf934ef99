"""Supervised fine-tuning with TRL's SFTTrainer: of a new backbone from scratch, or of a LoRA adapter that is then merged."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.compute as pc
import trl
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rlhf_recipes.algorithms.trl_config import balances_experts, refuse_unread, refused_by_trl, stage_config
from rlhf_recipes.checks.memory import memory_warning
from rlhf_recipes.checks.models import examine_sft
from rlhf_recipes.checks.saved import read_back_backbone
from rlhf_recipes.data.datasets import tokenize_demonstrations
from rlhf_recipes.data.tokenizer import (
    Ends,
    complete_tokenizer,
    load_ends,
    load_tokenizer,
    texts_of,
    train_readable_tokenizer,
)
from rlhf_recipes.evaluation.judging import sample_texts
from rlhf_recipes.evaluation.tables import print_rows
from rlhf_recipes.evaluation.watch import watch
from rlhf_recipes.models.adapters import load_with_new_adapter
from rlhf_recipes.models.backbone import build_backbone
from rlhf_recipes.models.logprobs import Head
from rlhf_recipes.process import say_left_out, warn
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.rollouts.forward import trunk_and_head
from rlhf_recipes.rollouts.lean import LeanSampler
from rlhf_recipes.runs.folder import MODEL, Run
from rlhf_recipes.runs.sharding import whole_model
from rlhf_recipes.runs.trainer import Resumable
from rlhf_recipes.tasks import load_dataset, load_task


@dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's SFTConfig, and where the weights start."""

    from_scratch: bool = field(
        default=False,
        metadata={"help": "Train a new backbone and tokenizer of `model.architecture` instead of continuing `model.path`."},
    )


class SFTTrainer(Resumable, trl.SFTTrainer):
    """TRL's, resumable. TRL writes `router_aux_loss_coef` into the config, which a mixture of experts has read by then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.model.modules():
            if "router_aux_loss_coef" in vars(module):
                module.router_aux_loss_coef = self.args.router_aux_loss_coef

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Every held-out row counts, whatever `dataloader_drop_last` says of training."""
        with mock.patch.object(self.args, "dataloader_drop_last", False):
            return super().get_eval_dataloader(*args, **kwargs)


def sft_fields(train: Dataset, model: PreTrainedModel | PeftModel, given: dict[str, Any]) -> dict[str, Any]:
    """What the data and the model ask of TRL's SFT, where the recipe does not say otherwise.

    It trains on completions alone where it finds prompts beside them; we hand it their tokens. Its chunked loss makes logits of
    its own: as Cohere's and Gemma's are, not as Granite's, Falcon-H1's or ModernBERT's, and it fails where a mixture of experts
    has no `num_experts` in its config. It adds an auxiliary loss of routers, which DeepSeek's do not have.

    Args:
        given: the section's keys and values.

    Raises:
        RecipeError: `completion_only_loss` of data without completions.
    """
    if given.get("completion_only_loss") and "completion" not in train.column_names:
        raise RecipeError(
            f"`sft.completion_only_loss` needs columns `prompt` and `completion`, and load_demonstrations has "
            f"{', '.join(train.column_names)}"
        )
    config = model.config.get_text_config()
    _, head = trunk_and_head(model)
    scale, cap = getattr(config, "logit_scale", None) or 1.0, getattr(config, "final_logit_softcapping", None)
    followed = type(head.embedding) is nn.Linear and head == Head(head.embedding, scale, cap)
    fields: dict[str, Any] = {"completion_only_loss": True} if "completion" in train.column_names else {}
    if getattr(config, "output_router_logits", None) is not None:
        followed = followed and hasattr(config, "num_experts")
        if not balances_experts(model):
            fields["router_aux_loss_coef"] = 0.0
    return fields if followed else fields | {"loss_type": "nll"}


def row_lengths(train: Dataset) -> np.ndarray:
    """Tokens of each row that an SFTTrainer has made; of packed rows, of each of the texts in them."""
    if "input_ids" not in train.column_names:  # `dataset_kwargs` left them as they are
        return np.zeros(1, int)
    column = "seq_lengths" if "seq_lengths" in train.column_names else "input_ids"
    count = pc.list_flatten if column == "seq_lengths" else pc.list_value_length
    tables = train.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([count(table[column]).to_numpy() for table in tables])


def train_sft(recipe: Recipe) -> dict[str, Any]:
    """Trains the backbone of `recipe` on the task's demonstrations, and writes it and what it says; returns the summary."""
    task = load_task(recipe)
    train, evaluation = (load_dataset(task, "load_demonstrations", split) for split in ("train", "eval"))

    section = recipe.stages["sft"]
    from_scratch = section.get("from_scratch", False)
    if from_scratch:
        architecture = recipe.model.architecture or {}  # checks/files.py has refused a recipe without
        tokenizer = train_readable_tokenizer(texts_of(train), architecture["vocab_size"], architecture["model_type"])
        complete_tokenizer(tokenizer, recipe.model, recipe.folder)
        ends = Ends(tokenizer, [tokenizer.eos_token_id], recipe.sampling.stop)
        build = partial(build_backbone, architecture, tokenizer, recipe.run.seed)
    else:
        tokenizer = load_tokenizer(recipe)
        ends = load_ends(tokenizer, recipe.path(recipe.model.path), recipe.sampling.stop)
        build = partial(load_with_new_adapter, recipe.model, recipe.path(recipe.model.path), recipe.lora, "CAUSAL_LM")
    model: Any = build()
    sampler = LeanSampler(ends, recipe.data.max_completion_tokens, recipe.sampling.temperature)
    args = stage_config(SFTConfig, "sft", section, recipe.run.seed, recipe.model.dtype, **sft_fields(train, model, section))
    by_trl = any(section.get(key) for key in ("assistant_only_loss", "chat_template_path"))
    train, evaluation = (
        tokenize_demonstrations(dataset, tokenizer, list(ends.tokens), by_trl) for dataset in (train, evaluation)
    )
    with refused_by_trl("sft"):
        trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer)
        trainer.try_optimizer()
    if len(trainer.train_dataset) == 0:
        raise RecipeError("`sft.max_length`: every prompt of load_demonstrations fills it, and no row is left; raise it")
    refuse_unread(trainer, "sft", section, recipe.model.path)
    trainer.refuse_no_batch("sft", len(trainer.train_dataset))
    examine_sft(trainer, tokenizer, sampler, recipe.model)
    if not args.packing:
        filled = len(train) - len(trainer.train_dataset)
        say_left_out(filled, len(train), "rows of load_demonstrations", "have a prompt that fills sft.max_length, left out")
    lengths, most = row_lengths(trainer.train_dataset), args.max_length
    warn([] if args.packing else memory_warning(recipe, "sft", int(lengths.max())))
    if most is not None and not (args.packing and args.packing_strategy != "bfd"):  # others lose nothing
        full = int((lengths >= most).sum())
        say_left_out(
            full, len(lengths), "rows of load_demonstrations", f"fill sft.max_length={most} tokens, where rows are cut"
        )

    run = Run.prepare(recipe, "sft")
    run.start()
    watch(trainer, run)
    trainer.train()

    loss = trainer.evaluate()["eval_loss"]
    model = whole_model(trainer, build)
    model = model if from_scratch else model.merge_and_unload()
    samples = sample_texts(model.eval(), tokenizer, sampler, task, recipe.evaluate.samples, recipe.run.seed)
    run.write_lines("samples.jsonl", samples)
    run.save_backbone(model, tokenizer)
    if run.main:
        texts = [row["prompt"] + row["completion"] for row in samples]
        read_back_backbone(run.folder / MODEL, model, tokenizer, texts, recipe.model.trust_remote_code)
        print_rows(["prompt", "completion"], [list(row.values()) for row in samples[:2]], title="what it writes")
    run.say(f"held-out loss {loss:.3f} nats a token, perplexity {math.exp(loss):.1f}")
    return run.finish({"eval_loss": loss, "eval_perplexity": math.exp(loss), "train_rows": len(train)})
