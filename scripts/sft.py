"""Supervised fine-tuning of the backbone with TRL's SFTTrainer.

    accelerate launch scripts/sft.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

With `sft.from_scratch: true` it trains a new tokenizer and a new model of `model.architecture`; otherwise it trains a
LoRA adapter on `model.path` and merges it: the result is the next stages' backbone, and so their reference.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe import Recipe


@command("sft", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    import math
    from functools import partial

    from rlhf_recipes.callbacks import watch
    from rlhf_recipes.configs import SFTConfig, refused_by_trl, sft_fields, stage_config
    from rlhf_recipes.data import (
        complete_tokenizer,
        end_token_ids,
        load_tokenizer,
        texts_of,
        tokenize_demonstrations,
        train_tokenizer,
    )
    from rlhf_recipes.engines import whole_model
    from rlhf_recipes.evaluation import sample_texts
    from rlhf_recipes.resumable import SFTTrainer
    from rlhf_recipes.roles import build_backbone, load_with_new_adapter
    from rlhf_recipes.runs import Run
    from rlhf_recipes.tasks import load_dataset, load_task

    task = load_task(recipe)
    train, evaluation = (load_dataset(task, "load_demonstrations", split) for split in ("train", "eval"))

    from_scratch = recipe.stages["sft"].get("from_scratch", False)
    if from_scratch:
        tokenizer = train_tokenizer(texts_of(train), recipe.model.architecture["vocab_size"])
        complete_tokenizer(tokenizer, recipe)
        ends = [tokenizer.eos_token_id]
        build = partial(build_backbone, recipe, tokenizer)
    else:
        tokenizer = load_tokenizer(recipe)
        ends = end_token_ids(tokenizer, recipe.path(recipe.model.path))
        build = partial(load_with_new_adapter, recipe, "CAUSAL_LM")
    sft_keys = sft_fields(train)
    by_trl = any(recipe.stages["sft"].get(key) for key in ("assistant_only_loss", "chat_template_path"))
    train, evaluation = (tokenize_demonstrations(dataset, tokenizer, ends, by_trl) for dataset in (train, evaluation))
    model = build()

    args = stage_config(SFTConfig, recipe, "sft", **sft_keys)
    with refused_by_trl("sft"):
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer
        )  # fmt: skip
        trainer.try_optimizer()

    run = Run.prepare(recipe, "sft")
    run.start()
    watch(trainer, run)
    trainer.train()

    loss = trainer.evaluate()["eval_loss"]
    model = whole_model(trainer, build)
    model = model if from_scratch else model.merge_and_unload()
    run.write_lines("samples.jsonl", sample_texts(model.eval(), tokenizer, task, recipe))
    run.save_backbone(model, tokenizer)
    return run.finish({"eval_loss": loss, "eval_perplexity": math.exp(loss), "train_rows": len(train)})


if __name__ == "__main__":
    main()
