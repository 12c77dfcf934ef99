"""Trains the reward model with TRL's RewardTrainer: a LoRA adapter and score head on the recipe's backbone.

    accelerate launch scripts/reward.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

Pairs come from the task's `load_preferences`; the loss is -log sigmoid(r(chosen) - r(rejected)). Ends with the held-out
pairwise accuracy, by length where the pairs name one in a column `words`.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("reward", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from collections import Counter
    from functools import partial

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
    from rlhf_recipes.rewards.adapter import AdapterReward
    from rlhf_recipes.runs.fingerprint import ADAPTER, made_by
    from rlhf_recipes.runs.folder import Run
    from rlhf_recipes.runs.sharding import whole_model
    from rlhf_recipes.runs.trainer import RewardTrainer
    from rlhf_recipes.tasks import load_dataset, load_task

    task, tokenizer = load_task(recipe), load_tokenizer(recipe)
    ends, read_eos = end_token_ids(tokenizer, recipe.path(recipe.model.path)), recipe.reward.adapter_reads_eos
    train, evaluation = (
        tokenize_pairs(load_dataset(task, "load_preferences", split), tokenizer, read_eos, ends) for split in ("train", "eval")
    )

    build = partial(load_with_new_adapter, recipe.model, recipe.path(recipe.model.path), recipe.lora, "SEQ_CLS")
    model = build()
    model.config.pad_token_id = tokenizer.pad_token_id

    args = stage_config(RewardConfig, recipe, "reward_training")
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


if __name__ == "__main__":
    main()
