"""Makes a recipe of one's own, checks its task.py before anything is trained, or launches a script.

    python -m rlhf_recipes new recipes/mytask [--from imdb]
    python -m rlhf_recipes check recipes/mytask [--section.key value ...]
    python -m rlhf_recipes launch [accelerate's options] scripts/ppo.py [--section.key value ...]

`new` copies recipes/template, or another recipe without what came of it. `check` runs every function of task.py, shows ten
rows as the stages will see them, and says what is wrong. Exit code 2 if anything is. `launch` is `accelerate launch`, and
ends with the script's exit code where that ends with 1.
"""

import os
import sys
from pathlib import Path

from rlhf_recipes import environment
from rlhf_recipes.command_line import parse_command_line
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe


def main(argv: list[str] | None = None) -> int:
    environment.prepare()
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["launch"]:
        from rlhf_recipes.launch import main as launch

        return launch(words[1:])
    asked = bool({"--help", "-h"} & set(words))
    if words[:1] == ["new"] and len(words) > 1 and not asked:
        from rlhf_recipes.new import main as new

        return new(words[1:])
    if not words or words[0] != "check" or len(words) < 2 or asked:
        print(__doc__.strip())
        return 0 if asked else 2
    try:
        recipe = load_recipe(words[1], parse_command_line(words[2:]).overrides)
        from rich.console import Console  # what follows takes seconds to import

        from rlhf_recipes.checks.task import check_task
        from rlhf_recipes.process import configure
        from rlhf_recipes.runs.fingerprint import rewards_of_others
        from rlhf_recipes.sweeps.file import sweeps_of_others

        for note in [*rewards_of_others(recipe), *sweeps_of_others(Path(os.path.relpath(recipe.folder)))]:
            print(f"warning: {note}", file=sys.stderr)
        configure(recipe.run.seed)
        problems = check_task(recipe, Console())
    except RecipeError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    print("\neverything is in order; next: accelerate launch scripts/ppo.py --recipe", words[1], "--dry-run")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
