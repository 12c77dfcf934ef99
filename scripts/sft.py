"""Supervised fine-tuning of the backbone with TRL's SFTTrainer.

    accelerate launch scripts/sft.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

With `sft.from_scratch: true` it trains a new tokenizer and a new model of `model.architecture`; otherwise it trains a
LoRA adapter on `model.path` and merges it: the result is the next stages' backbone, and so their reference.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import Recipe


@command("sft", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    import math
    from functools import partial

    from rlhf_recipes.algorithms.trl_config import (
        SFTConfig,
        refuse_unread,
        refused_by_trl,
        row_lengths,
        sft_fields,
        stage_config,
    )
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
    from rlhf_recipes.process import say_left_out, warn
    from rlhf_recipes.rollouts.lean import LeanSampler
    from rlhf_recipes.runs.folder import MODEL, Run
    from rlhf_recipes.runs.sharding import whole_model
    from rlhf_recipes.runs.trainer import SFTTrainer
    from rlhf_recipes.tasks import load_dataset, load_task

    task = load_task(recipe)
    train, evaluation = (load_dataset(task, "load_demonstrations", split) for split in ("train", "eval"))

    from_scratch = recipe.stages["sft"].get("from_scratch", False)
    if from_scratch:
        architecture = recipe.model.architecture
        tokenizer = train_readable_tokenizer(texts_of(train), architecture["vocab_size"], architecture["model_type"])
        complete_tokenizer(tokenizer, recipe)
        ends = Ends(tokenizer, [tokenizer.eos_token_id], recipe.sampling.stop)
        build = partial(build_backbone, architecture, tokenizer, recipe.run.seed)
    else:
        tokenizer = load_tokenizer(recipe)
        ends = load_ends(recipe, tokenizer)
        build = partial(load_with_new_adapter, recipe.model, recipe.path(recipe.model.path), recipe.lora, "CAUSAL_LM")
    model, sampler = build(), LeanSampler(ends, recipe.data.max_completion_tokens, recipe.sampling.temperature)
    args = stage_config(SFTConfig, recipe, "sft", **sft_fields(train, model, recipe))
    by_trl = any(recipe.stages["sft"].get(key) for key in ("assistant_only_loss", "chat_template_path"))
    train, evaluation = (tokenize_demonstrations(dataset, tokenizer, ends.tokens, by_trl) for dataset in (train, evaluation))
    with refused_by_trl("sft"):
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer
        )  # fmt: skip
        trainer.try_optimizer()
    if len(trainer.train_dataset) == 0:
        raise RecipeError("`sft.max_length`: every prompt of load_demonstrations fills it, and no row is left; raise it")
    refuse_unread(trainer, recipe, "sft")
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
    samples = sample_texts(model.eval(), tokenizer, sampler, task, recipe)
    run.write_lines("samples.jsonl", samples)
    run.save_backbone(model, tokenizer)
    if run.main:
        texts = [row["prompt"] + row["completion"] for row in samples]
        read_back_backbone(run.folder / MODEL, model, tokenizer, texts, recipe.model.trust_remote_code)
        print_rows(["prompt", "completion"], [list(row.values()) for row in samples[:2]], title="what it writes")
    run.say(f"held-out loss {loss:.3f} nats a token, perplexity {math.exp(loss):.1f}")
    return run.finish({"eval_loss": loss, "eval_perplexity": math.exp(loss), "train_rows": len(train)})


if __name__ == "__main__":
    main()
