"""One page for a task: reward-KL frontier, gold against reward, training curves, the table of all policies, and samples.

    python scripts/report.py [--recipe recipes/imdb] [--section.key value ...] [--dry-run]

By default of the latest run of scripts/evaluate.py; of any other one with

    --report.evaluation outputs/imdb/evaluate/RUN

Writes report.html (one file, works offline) and report.md with its plots as PNG to outputs/<task>/report/<run>/.
"""

from rlhf_recipes.command_line import command
from rlhf_recipes.recipe.sections import Recipe


@command("report", __doc__)
def main(recipe: Recipe) -> dict:
    # torch and TRL take seconds to import: a mistake in the recipe is answered before that
    from rlhf_recipes.report.data import evaluation_folder, load_report_data
    from rlhf_recipes.report.page import write_report
    from rlhf_recipes.runs.fingerprint import fingerprint
    from rlhf_recipes.runs.folder import Run

    data = load_report_data(evaluation_folder(recipe), fingerprint(recipe, "evaluate"))

    run = Run.prepare(recipe, "report")
    run.start()
    if run.main:
        write_report(data, run.folder)
    run.say(f"open {run.folder / 'report.html'}")
    return run.finish({"evaluation": str(data.folder), "policies": [policy.name for policy in data.policies]})


if __name__ == "__main__":
    main()
