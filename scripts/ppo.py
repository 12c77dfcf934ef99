"""Proximal policy optimisation of a LoRA policy, with TRL's PPOTrainer.

    accelerate launch scripts/ppo.py [--recipe recipes/imdb] [--section.key value ...] [--dry-run]

Policy, reference, value and reward share one frozen backbone. Ends with held-out prompts, reference and policy side by
side, and leaves adapter, metrics, samples and summary in outputs/<task>/ppo/<run>/.
"""

from rlhf_recipes.recipe import Recipe, command


@command("ppo", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.callbacks import watch
    from rlhf_recipes.configs import stage_config
    from rlhf_recipes.data import load_tokenizer, tokenize_prompts
    from rlhf_recipes.evaluation import judge_policy
    from rlhf_recipes.ppo_trainer import PPOConfig, PPOTrainer, episodes_per_update, shared_fields
    from rlhf_recipes.roles import build_roles
    from rlhf_recipes.runs import Run
    from rlhf_recipes.tasks import load_dataset, load_task, optional_gold

    task, tokenizer = load_task(recipe), load_tokenizer(recipe)
    longest = recipe.data.max_prompt_tokens
    prompts = load_dataset(task, "load_prompts", "train")
    train = tokenize_prompts(prompts, tokenizer, longest, at_least=episodes_per_update(recipe))
    held_out = tokenize_prompts(load_dataset(task, "load_prompts", "eval"), tokenizer, longest, recipe.evaluate.prompts)

    roles = build_roles(recipe, tokenizer, value=recipe.stages["ppo"].get("value", "trunk"))

    run = Run.prepare(recipe, "ppo")
    args = stage_config(PPOConfig, recipe, "ppo", run.folder, **shared_fields(recipe))
    run.start()
    trainer = PPOTrainer(args, roles, train)
    watch(trainer, run)
    trainer.train()

    trainer.save_model()
    return judge_policy(run, roles, held_out, optional_gold(task))


if __name__ == "__main__":
    main()
