"""The house as CONTRIBUTING draws it: a module imports from its own room or from floors below, and never in a circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rlhf_recipes"
FLOORS = [  # from the ground up: rooms that may stand beside each other, and do not import each other
    {"objective", "optimum", "metrics", "recipe"},
    {"environment", "interrupts", "data", "tasks"},
    {"models"},
    {"process"},
    {"rollouts"},
    {"rewards", "runs"},
    {"roles"},
    {"evaluation"},
    {"checks", "report", "publish"},
    {"command_line", "algorithms"},
    {"sweeps", "new", "launch"},
    {"__main__"},
]
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / PACKAGE).rglob("*.py"))
}


def imports_of(file: Path) -> set[str]:
    """The modules of the library that a file imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in whole if name in FILES} or {str(node.module)}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def test_every_room_has_a_floor():
    assert {room_of(module) for module in FILES} - {PACKAGE} == set(FLOOR_OF)


@pytest.mark.parametrize("module", [module for module in FILES if module != PACKAGE])
def test_imports_point_down(module):
    own = room_of(module)
    for other in imports_of(FILES[module]) - {PACKAGE}:
        room = room_of(other)
        assert room == own or FLOOR_OF[room] < FLOOR_OF[own], f"{module} imports {other}, which is not below it"


def test_no_module_imports_itself_by_way_of_others():
    packages = {module for module in FILES if FILES[module].name == "__init__.py"}  # they only offer what is in them
    graph = {module: imports_of(file) - packages for module, file in FILES.items() if module not in packages}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", FILES)
def test_files_are_short(module):
    assert len(FILES[module].read_text().splitlines()) <= 400


def test_nobody_asks_for_a_stages_name():
    """What differs from stage to stage is a column of its row."""
    names = {"sft", "reward", "preferences", "ppo", "a2c", "dpo", "evaluate", "merge", "report"}
    for module, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())) if room_of(module) != "recipe" else ():
            if isinstance(node, ast.Compare) and re.search(r"\b(stage|stage\.name|self\.stage)\b", ast.unparse(node.left)):
                said = {n.value for part in node.comparators for n in ast.walk(part) if isinstance(n, ast.Constant)}
                assert not said & names, f"{module}, line {node.lineno}"


def test_what_recipes_own_scripts_call_can_be_had_from_the_rooms(tiny):
    """Scripts in people's recipes stand on these names and calls."""
    import torch

    from rlhf_recipes.data import encode_completion, encode_prompt, load_tokenizer, tokenize_pairs
    from rlhf_recipes.recipe import DEFAULT_RECIPE, Recipe, RecipeError, load_recipe
    from rlhf_recipes.rewards import Samples
    from rlhf_recipes.tasks import load_dataset, load_task

    recipe = load_recipe(tiny)
    assert isinstance(recipe, Recipe)
    tokenizer = load_tokenizer(recipe)
    assert load_task(recipe) is load_task(tiny)
    pairs = tokenize_pairs(load_dataset(load_task(recipe), "load_preferences", "eval"), tokenizer, True)
    prompt, answer = encode_prompt(tokenizer, "the film was"), encode_completion(tokenizer, "the film was", " great")
    assert Samples(torch.tensor([prompt + answer]), len(prompt), tokenizer, ["the film was"]).texts == [" great"]
    assert {"chosen_ids", "rejected_ids"} <= set(pairs.column_names)
    with pytest.raises(RecipeError):
        load_recipe(DEFAULT_RECIPE / "nowhere")
