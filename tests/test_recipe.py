"""recipe.yaml, overrides and the command line: what resolves, and how mistakes are answered."""

import ast
import dataclasses
import importlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_recipes.checks import look
from rlhf_recipes.command_line import parse_command_line
from rlhf_recipes.new import new
from rlhf_recipes.recipe import keys
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import DEFAULT_RECIPE, load_recipe
from rlhf_recipes.recipe.online_settings import A2CSettings, PPOSettings
from rlhf_recipes.recipe.sections import SECTIONS
from rlhf_recipes.recipe.stages import TRAINED

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(p.parent for p in ROOT.glob("recipes/*/recipe.yaml"))


@pytest.mark.parametrize("folder", RECIPES, ids=lambda p: p.name)
def test_every_recipe_resolves_and_round_trips(folder, tmp_path):
    recipe = load_recipe(folder)
    assert recipe.task == folder.name
    dumped = tmp_path / "recipe.resolved.yaml"
    dumped.write_text(recipe.to_yaml())
    assert load_recipe(dumped) == recipe


@pytest.fixture
def unseen(monkeypatch):
    """Dry runs that do not look at the task's data, which takes seconds each: tests/test_look.py does."""
    monkeypatch.setattr(look, "look", lambda recipe, stage: look.Seen())


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("folder", RECIPES, ids=lambda p: p.name)
@pytest.mark.parametrize("stage", sorted(p.stem for p in ROOT.glob("scripts/*.py") if p.stem != "sweep"))
def test_every_recipe_dry_runs_every_stage(folder, stage, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run_script(stage, ["--recipe", str(folder), "--dry-run"]) is None
    assert "memory" in capsys.readouterr().out


def run_script(stage, argv):
    return importlib.import_module(f"scripts.{stage}").main(argv)


def commands_in_docs():
    """Every line of a fenced block in a Markdown file that runs one of scripts/ or benchmarks/."""
    for file in sorted(ROOT.glob("**/*.md")):
        if not {".venv", "outputs"} & set(file.relative_to(ROOT).parts):
            for block in re.findall(r"```(?:bash|sh)\n(.*?)```", file.read_text(), re.DOTALL):
                for line in block.replace("\\\n", " ").splitlines():
                    if re.search(r"(^|/)(accelerate launch|python) .*(scripts|benchmarks)/", line):
                        yield pytest.param(line.split("#")[0].strip(), id=f"{file.name}: {line.strip()[:60]}")


@pytest.fixture(scope="session")
def mytask(tmp_path_factory):
    """The recipe of docs/your-own-task.md, with the files that its commands name."""
    folder = tmp_path_factory.mktemp("docs") / "mytask"
    new(folder, ROOT / "recipes" / "template")
    shutil.copy(folder / "recipe.yaml", folder / "long.yaml")
    (folder / "pairs.jsonl").write_text('{"prompt": "This film", "chosen": " is good", "rejected": " is long"}\n')
    return folder


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("line", commands_in_docs())
def test_every_command_in_the_docs_dry_runs(line, monkeypatch, tmp_path, mytask):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line.split("&&")[0].replace("recipes/mytask", str(mytask)))
    if "--resume" in words:  # a run to resume, wherever the line says it is
        run = tmp_path / "imdb" / "ppo" / "it"
        run.mkdir(parents=True)
        run.with_name("latest").symlink_to("it")
        (run / "recipe.resolved.yaml").write_text(load_recipe(DEFAULT_RECIPE).to_yaml())
        words = [str(run) if word.startswith("outputs/") else word for word in words] + ["--run.output", str(tmp_path)]
    script = next(i for i, word in enumerate(words) if word.startswith(("scripts/", "benchmarks/")))
    for flag, value in itertools.pairwise(words):
        assert flag != "--config_file" or Path(value).is_file()
    module = importlib.import_module(words[script].removesuffix(".py").replace("/", "."))
    assert module.main([*words[script + 1 :], "--dry-run"]) is None


def failures_on_purpose():
    """The keys of every row of the table in docs/failures.md."""
    for line in (ROOT / "docs" / "failures.md").read_text().splitlines():
        if keys := re.match(r"\| ([^|]+) \| `(--[^`]+)` \|", line):
            yield pytest.param(keys[2].replace("DROPOUT", str(DEFAULT_RECIPE / "checkpoints" / "backbone")), id=keys[1])


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("keys", failures_on_purpose())
def test_every_failure_on_purpose_dry_runs(keys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--ppo.eval_steps", "4", "--evaluate.prompts", "128", *shlex.split(keys), "--dry-run"]
    assert run_script("ppo", words) is None


def test_make_targets_named_in_the_docs_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in [*ROOT.glob("*.md"), *ROOT.glob("recipes/**/*.md")]:
        assert set(re.findall(r"`make ([a-z-]+)", file.read_text())) <= targets, file


def test_fields_read_from_source_are_the_real_ones():
    import trl

    from rlhf_recipes.algorithms.dpo import DPOConfig
    from rlhf_recipes.algorithms.sft import SFTConfig

    real = {"sft": SFTConfig, "reward_training": trl.RewardConfig, "ppo": PPOSettings, "a2c": A2CSettings, "dpo": DPOConfig}
    assert set(real) == set(TRAINED)
    for stage, config in real.items():
        names = {f.name for f in dataclasses.fields(config) if f.init}
        assert names == set(TRAINED[stage].fields), stage


def test_ppos_settings_have_trls_names_and_defaults():
    from rlhf_recipes.algorithms.ppo_config import PPOConfig, trl_ppo

    theirs = {f.name: f.default for f in dataclasses.fields(trl_ppo.PPOConfig)}
    ours = {f.name: f.default for f in dataclasses.fields(PPOSettings)}
    assert {f.name: f.default for f in dataclasses.fields(PPOConfig) if f.name in ours} == ours
    other = {name: default for name, default in ours.items() if name in theirs and default != theirs[name]}
    assert other == {"max_grad_norm": 0.0, "save_steps": 10, "save_total_limit": 2}
    assert ours.keys() - theirs.keys() == {
        "value", "reward_baseline", "kl", "kl_target", "kl_horizon", "target_kl", "reference", "reference_sync_steps",
        "whiten_advantages",
    }  # fmt: skip


def test_every_own_key_is_read_somewhere():
    """A key that nothing reads is a promise nobody keeps."""
    from transformers import TrainingArguments

    read = set()
    for file in [*ROOT.glob("rlhf_recipes/**/*.py"), *ROOT.glob("scripts/*.py")]:
        read |= {n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)}
    for name, section in SECTIONS.items():
        for key in section.model_fields if name != "lora" else ():  # PEFT's own; test_lora_fields.py tries each
            assert key in read, f"{name}.{key}"
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}  # read by transformers
    stage_text = "".join(file.read_text() for file in [*ROOT.glob("rlhf_recipes/**/*.py"), *ROOT.glob("scripts/*.py")])
    for stage, row in TRAINED.items():
        own = [s for s in row.config if s[0] == "rlhf_recipes"]
        for _, file, class_name in own:
            for node in ast.parse((ROOT / "rlhf_recipes" / file).read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name == class_name:
                    for item in node.body:
                        if isinstance(item, ast.AnnAssign) and item.target.id not in theirs:
                            assert re.search(rf'(\.{item.target.id}\b|"{item.target.id}")', stage_text), (stage, item.target.id)


# --- overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--ppo.learning_rate=5e-7"], ["--ppo.learning_rate", "5e-7"]])
def test_overrides_take_both_forms_and_numbers_pyyaml_reads_as_text(words):
    recipe = load_recipe(ROOT / "recipes/imdb", parse_command_line(words).overrides)
    assert recipe.stages["ppo"]["learning_rate"] == 5e-7


def test_only_true_and_false_are_booleans():
    """YAML 1.1 reads `no` as False, which TRL then refuses as a save strategy."""
    overrides = parse_command_line(["--sft.save_strategy", "no", "--sft.packing", "false"]).overrides
    assert overrides == {"sft.save_strategy": "no", "sft.packing": False}


def test_values_that_trl_refuses_are_a_users_mistake_too(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script("sft", ["--recipe", str(tiny), "--sft.save_strategy=never", "--run.output", str(tmp_path / "outputs")])
    assert stop.value.code == 2
    assert "TRL refuses these values" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_override_of_a_section_the_file_does_not_have(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {path: x}\nreward: {adapter: y}\n")
    assert load_recipe(tmp_path, {"objective.beta": 0}).objective.beta == 0.0


GOOD = {"model": {"path": "x"}, "reward": {"adapter": "y"}}
BROKEN = {
    "unknown section": (GOOD | {"pppo": {}}, r"recipe\.yaml: unknown section `pppo`; did you mean `ppo`"),
    "unknown key": (GOOD | {"lora": {"rnk": 3}}, r"unknown key `lora\.rnk`"),
    "misspelt TRL key": (GOOD | {"ppo": {"lerning_rate": 1}}, r"`ppo\.lerning_rate`; did you mean `learning_rate`"),
    "shared key in a stage": (GOOD | {"ppo": {"kl_coef": 1}}, r"`ppo\.kl_coef` belongs to `objective\.beta`"),
    "key without effect": (GOOD | {"ppo": {"max_steps": 5}}, r"`ppo\.max_steps` has no effect here"),
    "missing key": ({"model": {}, "reward": {"adapter": "y"}}, r"`model\.path` is missing"),
    "wrong type": (GOOD | {"lora": {"r": "many"}}, r"`lora\.r`: expected int > 0, got 'many'"),
    "wrong TRL type": (GOOD | {"ppo": {"learning_rate": "fast"}}, r"`ppo\.learning_rate`: expected float, got 'fast'"),
    "bool for a number": (GOOD | {"lora": {"r": True}}, r"`lora\.r`: expected int"),
    "negative beta": (GOOD | {"objective": {"beta": -1}}, r"`objective\.beta`: expected float >= 0"),
    "bad choice": (GOOD | {"run": {"tracker": "mlflow"}}, r"one of 'wandb', 'none'"),
    "section not a mapping": (GOOD | {"ppo": [1, 2]}, r"`ppo` must be a mapping"),
    "not a mapping": ([1, 2], r"a recipe is a mapping"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_recipes_name_file_key_and_nearest(content, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: x}\nmodel: {path: y}", "appears twice"),
        ("model: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("model: [", "not valid YAML"),
        ("{1: 2}: 3", "not valid YAML"),
    ],
)
def test_broken_yaml(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "recipes/nowhere"], "no such recipe; recipes here: recipes/"),
        (["--model.pth", "x"], "--model.pth: unknown key `model.pth`; did you mean `path`?"),
        (["--ppo.learning_rate"], "a value is missing"),
        (["--dryrun"], "did you mean `dry-run`"),
        (["ppo.learning_rate=1"], "expected --recipe"),
        (["--lora.r=0"], "--lora.r: `lora.r`: expected int > 0, got 0"),
        (["--model.path", "checkpoints/nowhere"], "no such folder"),
        (["--data.max_completion_tokens", "4000"], "exceed the 512 tokens"),
        (["--ppo.num_mini_batches", "7"], "does not divide the 128 episodes"),
        (["--ppo.num_mini_batches=0"], "`ppo.num_mini_batches`: expected at least 1, got 0"),
        (["--ppo.max_steps=2"], "`ppo.max_steps` has no effect here: PPO's loop does not read it"),
        (["--ppo.whiten_rewards=true"], "`ppo.kl` full is in units of the reward"),
        (["--run.name=latest"], "the link to the newest run has this name"),
    ],
)
def test_a_users_mistake_is_one_line_exit_code_2_and_nothing_written(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        run_script("ppo", [*argv, "--run.output", str(tmp_path / "outputs")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_help_lists_shared_and_trl_keys(capsys):
    run_script("ppo", ["--help"])
    out = capsys.readouterr().out
    assert "--objective.beta" in out
    assert "--ppo.num_ppo_epochs (4)" in out
    assert "--ppo.kl_coef" not in out


def test_a_wrong_key_is_answered_without_importing_torch():
    code = "import sys; from rlhf_recipes.recipe import load_recipe, RecipeError\n" + (
        "try: load_recipe('recipes/imdb', {'ppo.x': 1})\nexcept RecipeError: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(("word", "heavy"), [("--help", "datasets "), ("--dry-run", ""), ("--ppo.x=1", "datasets ")])
def test_help_and_dry_run_import_nothing_heavy(word, heavy):
    """A dry run looks at the task's data, so it has `datasets`."""
    code = "import sys\nfrom scripts.ppo import main\ntry: main(sys.argv[1:2])\nexcept SystemExit: pass\n" + (
        "sys.exit(', '.join(set(sys.argv[2].split()) & set(sys.modules)) or None)"
    )
    words = [word, heavy + "torch transformers trl"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_owned_keys_point_to_keys_that_exist():
    for owner in keys.OWNER_OF.values():
        section, _, key = owner.partition(".")
        assert not key or key in SECTIONS[section].model_fields
