"""Judges any policies on the same held-out prompts: reward, gold, KL, J, fraction of the optimum, win rates, length, diversity.

    accelerate launch scripts/evaluate.py [--recipe recipes/imdb] [--section.key value ...] [--dry-run]

By default the reference, best-of-n and the run of each policy stage that finished last, trials of sweeps aside; any others by
name:

    --evaluate.policies '[best-of-16, mine=outputs/imdb/ppo/latest, outputs/imdb/dpo/latest]'

Every number has a 95% interval. Writes evaluation.json and samples.jsonl to outputs/<task>/evaluate/<run>/.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("evaluate", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.checks.models import examine, examine_judged
    from rlhf_recipes.data.datasets import tokenize_prompts
    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.evaluation.judged import judged_policy
    from rlhf_recipes.evaluation.judging import complete, prepare_rewards, side_by_side
    from rlhf_recipes.evaluation.tables import print_evaluation, print_samples
    from rlhf_recipes.evaluation.yardstick import evaluation_of, left_out, policies_to_judge, trained_for_others
    from rlhf_recipes.roles import build_roles
    from rlhf_recipes.runs.fingerprint import fingerprint
    from rlhf_recipes.runs.folder import Run
    from rlhf_recipes.tasks import load_dataset, load_task, optional_gold

    task, tokenizer = load_task(recipe), load_tokenizer(recipe)
    section, held_out = recipe.evaluate, load_dataset(task, "load_prompts", "eval")
    prompts = tokenize_prompts(held_out, tokenizer, recipe.data.max_prompt_tokens, section.prompts)
    gold = optional_gold(task, prompts)
    policies, judged_by = policies_to_judge(section, recipe.runs, recipe.folder), fingerprint(recipe, "evaluate")
    notes = [*left_out(section, recipe.runs), *trained_for_others(policies, judged_by)]

    roles = build_roles(recipe, tokenizer)
    for policy in policies:
        with judged_policy(policy.folder, roles, recipe.model) as model:  # one that does not fit is refused before a run
            if policy.folder is not None:
                examine_judged(policy.name, model, roles, prompts)
    examine(roles, prompts, recipe)

    run = Run.prepare(recipe, "evaluate")
    run.start()
    for note in notes:
        run.say(note)
    prepare_rewards(roles, task, run)
    judged = {}
    for policy in policies:
        if policy.best_of is None:
            k = section.completions if policy.folder else section.reference_completions
            with judged_policy(policy.folder, roles, recipe.model) as model:
                judged[policy.name] = complete(model, roles, prompts, recipe.run.seed, section.batch_size, gold, policy.name, k)

    evaluation = evaluation_of(judged, policies, recipe.objective.beta, section, judged_by, notes)
    rows = side_by_side(prompts, judged)
    run.write_json("evaluation.json", evaluation)
    run.write_samples(rows)
    if run.main:
        print_samples(rows[: section.samples], list(judged))
        print_evaluation(evaluation)
    return run.finish({"prompts": len(prompts), "policies": [policy.name for policy in policies]})


if __name__ == "__main__":
    main()
