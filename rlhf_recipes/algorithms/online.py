"""PPO and A2C: the stages that sample from the policy as it learns. They differ in their configuration alone."""

from typing import Any

from rlhf_recipes.algorithms.ppo_config import PPOConfig, episodes_per_update, ppo_fields
from rlhf_recipes.algorithms.trainer import PPOTrainer
from rlhf_recipes.algorithms.trl_config import refused_by_trl, stage_config
from rlhf_recipes.checks.models import examine
from rlhf_recipes.checks.saved import read_back_policy
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.evaluation.judging import complete, judge_policy, prepare_rewards
from rlhf_recipes.evaluation.watch import Watch, watch
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.online_settings import online_settings
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.roles import build_roles
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.tasks import load_dataset, load_task, optional_gold


def train_online(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Trains the policy of `recipe` by `stage` ("ppo" or "a2c") and judges it on held-out prompts; returns the summary."""
    task, tokenizer = load_task(recipe), load_tokenizer(recipe)
    settings, longest = online_settings(stage, recipe.stages[stage]), recipe.data.max_prompt_tokens
    prompts = load_dataset(task, "load_prompts", "train")
    train = tokenize_prompts(prompts, tokenizer, longest, at_least=episodes_per_update(settings))
    held_out = tokenize_prompts(load_dataset(task, "load_prompts", "eval"), tokenizer, longest, recipe.evaluate.prompts)

    gold = optional_gold(task, train)
    for key, value, needs_gold in (
        (f"{stage}.metric_for_best_model", settings.metric_for_best_model, "gold"),
        ("watch.on_over_optimisation", recipe.watch.on_over_optimisation, "rollback"),
    ):
        if gold is None and value == needs_gold:
            raise RecipeError(f"`{key}` {value}: {task.__file__} has no `gold_reward`")
    roles = build_roles(recipe, tokenizer, value=settings.value)
    examine(roles, train, recipe)

    watched = held_out.select(range(min(recipe.watch.prompts, len(held_out))))

    def judge() -> dict[str, float]:
        judged = complete(roles.policy, roles, watched, recipe.run.seed, recipe.evaluate.batch_size, gold)
        return judged.means(recipe.objective.beta) | judged.standard_errors()

    args = stage_config(
        PPOConfig, stage, recipe.stages[stage], recipe.run.seed, recipe.model.dtype, **ppo_fields(recipe, stage)
    )
    with refused_by_trl(stage):
        trainer = PPOTrainer(args, roles, train, judge=judge)

    run = Run.prepare(recipe, stage)
    run.start()
    prepare_rewards(roles, task, run)
    watch(trainer, run)
    trainer.add_callback(Watch(run))
    trainer.train()

    trainer.save_model()
    if run.main:
        read_back_policy(run.folder, roles, held_out)
    return judge_policy(run, roles, held_out, gold)
