"""Merges a policy's adapter into its backbone: a model of its own, with its tokenizer, generation config and a card.

    accelerate launch scripts/merge.py [--merge.adapter outputs/imdb/ppo/latest] [--merge.push ORG/NAME] [--dry-run]

Checks that the saved model says what backbone and adapter say. Writes outputs/<task>/merge/<run>/model, in `model.save_dtype`,
as safetensors; `--merge.push` uploads it to the Hub.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("merge", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.data.datasets import tokenize_prompts
    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.data.tokens import pad_left
    from rlhf_recipes.publish import adapter_to_merge, card, merge, own_evaluation, upload
    from rlhf_recipes.runs.fingerprint import fingerprint, recorded_fingerprint
    from rlhf_recipes.runs.folder import MODEL, Run
    from rlhf_recipes.tasks import load_dataset, load_task

    task, tokenizer = load_task(recipe), load_tokenizer(recipe)
    adapter = adapter_to_merge(recipe.merge.adapter, recipe.runs, recipe.folder, fingerprint(recipe, "merge"))
    prompts = load_dataset(task, "load_prompts", "eval")
    prompts = tokenize_prompts(prompts, tokenizer, recipe.data.max_prompt_tokens, limit=10)
    queries = pad_left(prompts["input_ids"][:], tokenizer.pad_token_id)

    run = Run.prepare(recipe, "merge")
    run.start()
    address = None
    if run.main:
        checked = merge(run, tokenizer, adapter, *queries)
        (run.folder / MODEL / "README.md").write_text(card(recipe, adapter, checked), encoding="utf-8")
        policy = recorded_fingerprint(adapter)
        run.record({"policy": policy})
        for line in own_evaluation(recipe.runs, adapter, policy)[1]:
            run.say(line)
        if recipe.merge.push:
            address = upload(run.folder / MODEL, recipe.merge.push, recipe.merge.private)
        run.say(f"merged: {run.folder / MODEL}" + (f", uploaded to {address}" if address else ""))
    return run.finish({"adapter": str(adapter), "pushed_to": address, **(checked if run.main else {})})


if __name__ == "__main__":
    main()
