"""Samples pairs of completions from the reference and labels them with the shared reward model, for scripts/dpo.py.

    accelerate launch scripts/preferences.py [--recipe recipes/imdb] [--section.key value ...] [--resume] [--dry-run]

Writes pairs.jsonl (prompt, chosen, rejected, both rewards, and the token ids that were sampled) to
outputs/<task>/preferences/<run>/. `--resume` resumes the latest run, `--resume FOLDER` that one.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("preferences", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.algorithms.pairs import sample_pairs
    from rlhf_recipes.checks.models import examine
    from rlhf_recipes.data.datasets import tokenize_prompts
    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.evaluation.judging import prepare_rewards
    from rlhf_recipes.roles import build_roles
    from rlhf_recipes.runs.folder import Run
    from rlhf_recipes.tasks import load_dataset, load_task

    task, tokenizer = load_task(recipe), load_tokenizer(recipe)
    prompts = load_dataset(task, "load_prompts", "train")
    train = tokenize_prompts(prompts, tokenizer, recipe.data.max_prompt_tokens, recipe.preferences.prompts)

    roles = build_roles(recipe, tokenizer)
    examine(roles, train, recipe)

    run = Run.prepare(recipe, "preferences")
    run.start()
    prepare_rewards(roles, task, run)
    counts = sample_pairs(roles.reference, roles, train, run, seed=recipe.run.seed)
    return run.finish(counts)


if __name__ == "__main__":
    main()
