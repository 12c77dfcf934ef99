"""A recipe of one's own: what `new` and `cp -r` make of another, whose reward it has, and docs/your-own-task.md."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_recipes.__main__ import main
from rlhf_recipes.new import new
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.runs.fingerprint import ADAPTER, made_by, rewards_of_others
from rlhf_recipes.sweeps.file import another_recipe, load_sweep
from rlhf_recipes.tasks import load_task
from tests.test_fingerprint import change_weights

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(p.parent for p in ROOT.glob("recipes/*/recipe.yaml"))
PAGE = (ROOT / "docs" / "your-own-task.md").read_text()
each_recipe = pytest.mark.parametrize("source", RECIPES, ids=lambda p: p.name)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def sweeps_of(folder):
    return sorted([*folder.glob("sweep.yaml"), *folder.glob("sweeps/*.yaml")])


# --- python -m rlhf_recipes new ----------------------------------------------------------------------------------


@each_recipe
def test_a_new_recipe_is_the_other_without_what_came_of_it(source, tmp_path):
    target = tmp_path / "mytask"
    new(target, source)
    kept = {p.relative_to(target) for p in target.rglob("*") if p.is_file()}
    results = {Path("README.md"), *(p.relative_to(source) for p in source.rglob("*") if {".md", ".png"} & {p.suffix})}
    assert not kept & results - {Path("README.md")}
    assert not {"checkpoints", "__pycache__"} & {p.name for p in target.rglob("*")}
    assert {"task.py", "recipe.yaml", "sweep.yaml"} <= {p.name for p in kept}
    assert (target / "task.py").read_bytes() == (source / "task.py").read_bytes()
    assert "nothing has been run yet" in (target / "README.md").read_text()

    theirs, ours = load_recipe(source), load_recipe(target)
    assert ours.task == "mytask"
    assert (ours.lora, ours.stages, ours.data) == (theirs.lora, theirs.stages, theirs.data)
    for old, path in [(theirs.model.path, ours.model.path)] + [
        (getattr(a, kind), getattr(b, kind))
        for a, b in zip(theirs.reward.all_terms(), ours.reward.all_terms(), strict=True)
        for kind in ("adapter", "model")
        if getattr(a, kind)
    ]:
        assert ours.path(path) == theirs.path(old)
    if theirs.model.chat_template:
        assert (target / ours.model.chat_template).is_file()  # its own
    for file in sweeps_of(target):
        assert another_recipe(file) is None
        assert yaml.safe_load(file.read_text())["name"].startswith("mytask-")
        assert load_sweep(file, output=str(tmp_path / "outputs"), trials=2).recipe.folder == target
    assert len(sweeps_of(target)) == len(sweeps_of(source))


def test_the_next_commands_are_three_and_in_order(tmp_path, monkeypatch, capsys):
    import importlib

    target = tmp_path / "mytask"
    assert main(["new", str(target), "--from=imdb"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{target}: made from recipes/imdb"
    assert "`reward.adapter` is the adapter of recipes/imdb" in said[1]
    assert said[-3:] == [
        f"python -m rlhf_recipes check {target}",
        f"accelerate launch scripts/ppo.py --recipe {target} --dry-run",
        f"accelerate launch scripts/ppo.py --recipe {target}",
    ]
    assert "\n".join(said[-3:]) in (target / "README.md").read_text()
    assert said[1] in (target / "recipe.yaml").read_text()
    importlib.import_module("scripts.ppo").main(said[-2].split()[3:])
    assert "nothing was written" in capsys.readouterr().out


def test_paths_are_seen_from_wherever_the_copy_is(tiny, tmp_path):
    source = shutil.copytree(tiny, tmp_path / "tiny")
    (source / "pairs.jsonl").write_text("{}")
    (tmp_path / "beyond").mkdir()
    content = yaml.safe_load((source / "recipe.yaml").read_text())
    content["reward"] = {"terms": [{"adapter": "checkpoints/reward", "weight": 2.0}, {"adapter": "../beyond", "name": "b"}]}
    content["preferences"]["path"] = "pairs.jsonl"
    content["model"]["chat_template"] = "checkpoints/hub"  # stands for what is not there
    (source / "recipe.yaml").write_text(yaml.safe_dump(content))
    (source / "long.yaml").write_text("# long\nmodel: {path: 'checkpoints/backbone'}   # kept\nreward: {function: wordy}\n")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    target = tmp_path / "deep" / "er" / "mytask"
    notes = new(target, source)
    ours = load_recipe(target)
    assert ours.model.path == "../../../tiny/checkpoints/backbone"
    assert [term.adapter for term in ours.reward.all_terms()] == ["../../../tiny/checkpoints/reward", "../../../beyond"]
    assert ours.preferences.path == "pairs.jsonl"
    assert (target / "pairs.jsonl").is_file()
    assert load_recipe(target / "long.yaml").model.path == "../../../tiny/checkpoints/backbone"
    assert "# kept" in (target / "long.yaml").read_text()
    named = [note.split("`")[1] for note in notes]
    assert named == ["model.chat_template", "reward.terms[0].adapter", "reward.terms[1].adapter"]
    assert "has still to be made" in notes[0]


BAD = {
    "it exists": (["recipes/imdb"], "recipes/imdb: it exists already"),
    "no folder's name": (["{tmp}/a b"], "expected the name of a new folder"),
    "a hidden one": (["{tmp}/.mine"], "expected the name of a new folder"),
    "the folder above": (["{tmp}/.."], "expected the name of a new folder"),
    "nowhere": (["{tmp}/no/mytask"], "run this from the repository's root"),
    "in what it copies": (["recipes/imdb/mine", "--from", "imdb"], "choose a place outside of recipes/imdb"),
    "no such recipe": (["{tmp}/mytask", "--from", "imbd"], "--from imbd: no such recipe; did you mean `imdb`?"),
    "no value": (["{tmp}/mytask", "--from"], "--from: a value is missing"),
    "an option": (["{tmp}/mytask", "--form=imdb"], "--form=imdb: unknown option; did you mean `--from`?"),
    "two folders": (["{tmp}/a", "{tmp}/b"], "expected one folder to make"),
    "no folder": (["--from=imdb"], "expected one folder to make"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(words, message, tmp_path, capsys):
    before = sorted(ROOT.glob("recipes/*/*"))
    assert main(["new", *(word.format(tmp=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert sorted(ROOT.glob("recipes/*/*")) == before


def test_a_recipe_that_cannot_be_copied_leaves_nothing(tiny, tmp_path, capsys):
    source = shutil.copytree(tiny, tmp_path / "tiny")
    (source / "sweep.yaml").write_text("parameters: [")
    assert main(["new", str(tmp_path / "mytask"), "--from", str(source)]) == 2
    assert f"error: {source}/sweep.yaml: not valid YAML" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_a_copy_of_minilm_takes_the_original_s_reward(tmp_path):
    """Its task.py asks for the reward model beside it, where the recipe does."""
    (tmp_path / "imdb").symlink_to(ROOT / "recipes" / "imdb")
    source = shutil.copytree(ROOT / "recipes" / "minilm", tmp_path / "minilm", ignore=shutil.ignore_patterns("checkpoints"))
    (source / "checkpoints" / "reward").mkdir(parents=True)
    new(tmp_path / "mytask", source)
    recipe = load_recipe(tmp_path / "mytask")
    assert recipe.reward.model == "../minilm/checkpoints/reward"
    assert len(load_task(recipe).load_prompts("eval")) > 0


# --- cp -r -------------------------------------------------------------------------------------------------------


@each_recipe
def test_a_plain_copy_runs_the_recipe_beside_its_sweeps(source, tmp_path, capsys):
    from scripts import sweep

    (tmp_path / "imdb").symlink_to(ROOT / "recipes" / "imdb")
    copy = shutil.copytree(source, tmp_path / "mytask", ignore=shutil.ignore_patterns("*.png", "*.safetensors"))
    for part in ("backbone", "reward"):
        for file in source.glob(f"checkpoints/{part}/*.safetensors"):
            (copy / file.relative_to(source)).symlink_to(file)
    for file in sweeps_of(copy):
        words = [str(file), "--output", str(tmp_path / "outputs"), "--trials", "2", "--dry-run"]
        sweep.main(words)
        said = capsys.readouterr()
        assert f"{file}: its `command` names the recipe recipes/{source.name}, and scripts/sweep.py runs" in said.err
        assert f"# {yaml.safe_load(file.read_text())['name']}: mytask by scripts/" in said.out
        assert f"--recipe {copy} --" in said.out
        assert f"recipes/{source.name} " not in said.out
    for file in sweeps_of(source):
        assert load_sweep(file, trials=2).note is None


@pytest.mark.parametrize("program", ["${program}", "scripts/ppo.py"])
def test_a_sweep_of_a_variant_keeps_the_variant_and_one_of_no_recipe_gets_its_own(program, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "mytask")
    shutil.copy(folder / "recipe.yaml", folder / "long.yaml")
    content = {
        "program": "scripts/ppo.py", "method": "grid", "parameters": {"objective.beta": {"values": [0.1]}},
        "metric": {"name": "eval/objective", "goal": "maximize"},
    }  # fmt: skip
    command = ["${env}", "${interpreter}", program]
    for recipe, expected, noted in (
        (["--recipe", "recipes/imdb/long.yaml"], folder / "long.yaml", True),  # there is none, which does not matter
        (["--recipe", f"{folder}/long.yaml"], f"{folder}/long.yaml", False),
        (["--recipe=recipes/lab"], folder, True),
        (["--recipe", str(folder)], folder, False),
        ([], folder, True),
    ):
        (folder / "sweep.yaml").write_text(yaml.safe_dump(content | {"command": [*command, *recipe, "${args}"]}))
        assert (another_recipe(folder / "sweep.yaml") is not None) == noted
        sweep = load_sweep(folder / "sweep.yaml", output=str(tmp_path / "outputs"))
        assert (sweep.note is not None) == noted
        words = sweep.words({"objective.beta": 0.1}, 0)
        assert words.count("--recipe") == 1
        assert words[words.index("--recipe") + 1] == str(expected)
        assert sweep.recipe_of({"objective.beta": 0.1}, 0).task == "mytask"
        new(tmp_path / "other", folder)
        assert another_recipe(tmp_path / "other" / "sweep.yaml") is None or not recipe
        shutil.rmtree(tmp_path / "other")


def test_check_names_the_sweeps_and_the_reward_that_are_another_recipe_s(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "mytask")
    shutil.copy(ROOT / "recipes" / "imdb" / "sweep.yaml", folder)
    record(load_recipe(tiny), folder)
    assert main(["check", str(folder)]) == 0
    error = capsys.readouterr().err
    assert "sweep.yaml: its `command` names the recipe recipes/imdb" in error
    assert "was trained for the recipe tiny, and this is mytask" in error


# --- whose reward, whose results ---------------------------------------------------------------------------------


def record(recipe, folder):
    (folder / "checkpoints" / "reward" / ADAPTER).write_text(json.dumps(made_by(recipe, folder / "checkpoints" / "reward")))


@pytest.fixture
def copied(tiny, tmp_path):
    """A copy of the tiny recipe, whose reward adapter says where it is from."""
    folder = shutil.copytree(tiny, tmp_path / "mytask")
    record(load_recipe(tiny), folder)
    return folder


def test_the_shipped_rewards_are_their_recipes_own():
    for folder in RECIPES:
        assert rewards_of_others(load_recipe(folder)) == []
        if (adapter := folder / "checkpoints" / "reward" / "adapter_config.json").is_file():
            assert json.loads(adapter.with_name(ADAPTER).read_text())["recipe"] == folder.name


def test_a_reward_that_came_along_is_named_before_a_run(copied, capsys):
    from scripts import ppo

    ppo.main(["--recipe", str(copied), "--dry-run"])
    error = capsys.readouterr().err
    assert (
        "warning: the reward adapter checkpoints/reward was trained for the recipe tiny, and this is mytask. scripts/reward.py"
        in error
    )
    function = {"reward.adapter": None, "reward.read_eos": True, "reward.function": "wordy"}
    assert rewards_of_others(load_recipe(copied, function)) == []
    record(load_recipe(copied), copied)
    assert rewards_of_others(load_recipe(copied)) == []


def test_another_recipe_s_reward_that_is_named_on_purpose_is_not(copied, tiny, tmp_path):
    own = shutil.copytree(tiny, tmp_path / "own")
    assert rewards_of_others(load_recipe(own, {"reward.adapter": "../mytask/checkpoints/reward"})) == []


def test_other_pairs_and_another_backbone_are_named_wherever_the_reward_lies(copied, tiny, tmp_path):
    own = shutil.copytree(tiny, tmp_path / "own")
    there = {"reward.adapter": "../mytask/checkpoints/reward"}
    task = own / "task.py"
    text = task.read_text()
    task.write_text(text.replace('BAD = ["great"', 'BAD = ["superb"'))  # which load_preferences reads
    [line] = rewards_of_others(load_recipe(own, there))
    assert "was trained on other pairs than load_preferences of this task.py gives. " in line
    task.write_text(text + "\n# a remark\ndef other(): pass\n")
    assert rewards_of_others(load_recipe(own, there)) == []
    task.write_text(text.replace("def load_preferences", "def other"))  # nothing to compare
    assert rewards_of_others(load_recipe(own, there)) == []
    task.write_text(text)
    change_weights(own / "checkpoints" / "backbone" / "model.safetensors")
    [line] = rewards_of_others(load_recipe(own, there))
    assert "was trained on the backbone checkpoints/backbone (" in line


def test_a_record_that_is_not_this_adapter_s_says_nothing(copied):
    change_weights(copied / "checkpoints" / "reward" / "adapter_model.safetensors")
    assert rewards_of_others(load_recipe(copied)) == []
    (copied / "checkpoints" / "reward" / ADAPTER).write_text("[]")
    assert rewards_of_others(load_recipe(copied)) == []


def test_results_say_whose_they_are():
    shown = [folder for folder in RECIPES if "there is no result" not in (folder / "README.md").read_text()]
    assert {"imdb", "goodhart", "minilm", "chitchat", "lab", "template"} <= {folder.name for folder in shown}
    for folder in shown:
        head = (folder / "README.md").read_text().split("\n\n")[1]
        assert head.startswith(f"Every number on this page is of `recipes/{folder.name}`; a copy of the folder has none")


# --- the template ------------------------------------------------------------------------------------------------


def test_the_template_is_small_and_holds_prompts_out(capsys):
    folder = ROOT / "recipes" / "template"
    assert len((folder / "task.py").read_text().splitlines()) <= 30
    assert not (folder / "checkpoints").exists()
    task = load_task(folder)
    train, held_out = (set(task.load_prompts(split)["prompt"]) for split in ("train", "eval"))
    assert (len(train), len(held_out), len(train & held_out)) == (120, 40, 0)
    texts = [" is Good, good and great.", " has good music and a bad end", " Goodness", ""]
    assert task.reward([], texts) == [1.0, 1.0, 0.0, 0.0]
    assert task.gold_reward([], texts) == [1.0, 0.0, 0.0, 0.0]
    assert main(["check", "recipes/template"]) == 0
    assert "everything is in order" in capsys.readouterr().out


def test_two_updates_of_the_template(tmp_path):
    from scripts import ppo

    words = ["--recipe", "recipes/template", "--ppo.total_episodes=64", "--ppo.eval_strategy=no", "--evaluate.prompts=8"]
    summary = ppo.main([*words, f"--run.output={tmp_path}"])
    assert summary["task"] == "template"
    assert summary["policy"]["kl"] > 0


# --- docs/your-own-task.md ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(tiny, tmp_path_factory):
    """A folder in which the page's commands have been run, on the tiny recipe."""
    from scripts import merge, ppo, reward

    root = tmp_path_factory.mktemp("walk")
    (root / "recipes" / "imdb" / "checkpoints").mkdir(parents=True)
    (root / "recipes" / "imdb" / "checkpoints" / "backbone").symlink_to(tiny / "checkpoints" / "backbone")
    shutil.copytree(tiny, root / "recipes" / "mytask")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        recipe = ["--recipe", "recipes/mytask"]
        reward.main(recipe)
        ppo.main([*recipe, "--ppo.learning_rate=3e-2"])
        merge.main(recipe)
    return root


def test_the_page_s_lines_load_the_adapter_and_the_merged_model(walked, monkeypatch, capsys):
    monkeypatch.chdir(walked)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.partition("## Load it")[2], re.DOTALL)
    assert [len(list(filter(None, block.splitlines()))) for block in blocks] == [4, 4]
    adapter, merged = {}, {}
    exec(blocks[0], adapter)  # noqa: S102
    exec(blocks[1], merged)  # noqa: S102
    assert len(capsys.readouterr().out.strip()) > len("This film")
    ids = merged["tokenizer"]("This film", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits.log_softmax(-1) for model in (adapter["policy"], merged["model"]))
        with adapter["policy"].disable_adapter():
            reference = adapter["policy"](input_ids=ids).logits.log_softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (reference - theirs).abs().max() > 0.01


def test_a_reward_says_what_it_was_trained_on_wherever_it_is_put(walked, monkeypatch):
    monkeypatch.chdir(walked)
    trained = walked / "outputs" / "mytask" / "reward" / "latest" / "adapter"
    assert json.loads((trained / ADAPTER).read_text())["recipe"] == "mytask"
    here, there = (shutil.copytree(walked / "recipes" / "mytask", walked / "recipes" / name) for name in ("here", "there"))
    for folder in (here, there):
        for file in trained.iterdir():  # as the page says
            shutil.copy(file, folder / "checkpoints" / "reward")
    [line] = rewards_of_others(load_recipe(there))
    assert "was trained for the recipe mytask, and this is there. " in line
    monkeypatch.setattr("rlhf_recipes.recipe.sections.Recipe.task", "mytask")
    assert rewards_of_others(load_recipe(here)) == []


def test_the_page_is_led_to_from_the_first_screen():
    assert "docs/your-own-task.md" in (ROOT / "README.md").read_text()[:4000]
