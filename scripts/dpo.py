"""Direct preference optimisation of a LoRA policy, with TRL's DPOTrainer.

    accelerate launch scripts/dpo.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

Trains on `preferences.path` (a folder of scripts/preferences.py, or a .jsonl file of prompt, chosen and rejected), on the
task's own pairs (`preferences.source: task`), or on pairs that it samples first; with `dpo.rounds` above 1 it samples anew
from the policy before each further round. Leaves adapter, metrics, samples and summary in outputs/<task>/dpo/<run>/.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("dpo", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.algorithms import pairs as preferences
    from rlhf_recipes.algorithms.dpo import DPOTrainer, dpo_fields, fitting_pairs
    from rlhf_recipes.algorithms.trl_config import DPOConfig, refuse_unread, refused_by_trl, stage_config
    from rlhf_recipes.checks.look import made_for_others
    from rlhf_recipes.checks.models import examine
    from rlhf_recipes.checks.saved import read_back_policy
    from rlhf_recipes.data.datasets import tokenize_prompts
    from rlhf_recipes.data.pair_files import pairs_file
    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.evaluation.judging import judge_policy, prepare_rewards
    from rlhf_recipes.evaluation.watch import watch
    from rlhf_recipes.roles import build_roles
    from rlhf_recipes.runs.folder import Run
    from rlhf_recipes.tasks import load_dataset, load_task, optional_gold

    task, tokenizer, longest = load_task(recipe), load_tokenizer(recipe), recipe.data.max_prompt_tokens
    prompts, pairs = None, None
    given = recipe.preferences.path
    if given is None and recipe.preferences.source == "task":
        pairs = preferences.tokenize_preferences(load_dataset(task, "load_preferences", "train"), tokenizer, recipe)
    if (pairs is None and given is None) or recipe.stages["dpo"].get("rounds", 1) > 1:
        prompts = tokenize_prompts(load_dataset(task, "load_prompts", "train"), tokenizer, longest, recipe.preferences.prompts)
    held_out = tokenize_prompts(load_dataset(task, "load_prompts", "eval"), tokenizer, longest, recipe.evaluate.prompts)
    gold = optional_gold(task, held_out)

    roles = build_roles(recipe, tokenizer)
    examine(roles, held_out, recipe)
    vocabulary = roles.policy.get_input_embeddings().num_embeddings
    if given is not None:
        pairs = preferences.load_pairs(pairs_file(recipe), vocabulary, tokenizer, recipe)

    args = stage_config(DPOConfig, recipe, "dpo", **dpo_fields(recipe))
    pairs = None if pairs is None else fitting_pairs(pairs, args)
    with refused_by_trl("dpo"):
        trial = DPOTrainer(args, roles, preferences.sample_of(pairs, tokenizer))  # before anything is written
        trial.try_optimizer()
    refuse_unread(trial, recipe, "dpo")
    if pairs is not None:
        trial.refuse_no_batch("dpo", len(pairs))

    run = Run.prepare(recipe, "dpo")
    run.start()
    for line in made_for_others(recipe, pairs_file(recipe)) if given is not None else ():
        run.say(line)
    prepare_rewards(roles, task, run)
    first = run.memory.get("round", 0)  # above 0 in a run that goes on
    pairs = None if first else pairs
    for number in range(first, args.rounds):
        if pairs is None:
            policy, name = (roles.policy, f"pairs-{number + 1}.jsonl") if number else (roles.reference, "pairs.jsonl")
            run.say(f"no pairs given: sampling them first, into {run.folder / name}" if number == 0 else "sampling new pairs")
            preferences.sample_pairs(policy, roles, prompts, run, name, seed=recipe.run.seed + number)
            pairs = preferences.load_pairs(run.folder / name, vocabulary, tokenizer, recipe)
        run.memory["round"] = number
        trainer = DPOTrainer(args, roles, pairs, fresh=number == 0 and run.checkpoint is None)
        trainer.refuse_no_batch("dpo", len(pairs))
        watch(trainer, run)
        trainer.train()
        pairs = None

    roles = trainer.whole_roles(recipe)  # see engines.py
    run.save_adapter(roles.policy, run.folder)
    if run.main:
        read_back_policy(run.folder, roles, held_out)
    return judge_policy(run, roles, held_out, gold)


if __name__ == "__main__":
    main()
