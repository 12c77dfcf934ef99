"""Broken input of every kind: one line that says what is wrong and where, exit code 2, and nothing written."""

import importlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import yaml
from conftest import TASK, write_foreign_reward
from safetensors.torch import load_file, save_file

from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.sections import SECTIONS
from rlhf_recipes.recipe.stages import TRAINED


@pytest.fixture
def place(tiny, tmp_path, monkeypatch) -> Path:
    """A copy of the tiny recipe to be broken; its checkpoints are `tiny`'s own until `own` copies one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in ("recipe.yaml", "task.py"):
        shutil.copy(tiny / file, folder)
    (folder / "checkpoints").mkdir()
    for checkpoint in (tiny / "checkpoints").iterdir():
        (folder / "checkpoints" / checkpoint.name).symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    return folder


def own(place: Path, name: str) -> Path:
    """The checkpoint `name`, as a copy that may be broken."""
    folder = place / "checkpoints" / name
    origin = folder.resolve()
    folder.unlink()
    shutil.copytree(origin, folder)
    return folder


def edited(**sections):
    """Breaks the recipe's sections: keys are added to them, or they are replaced by what is no mapping."""

    def edit(place):
        file = place / "recipe.yaml"
        content = yaml.safe_load(file.read_text())
        for section, value in sections.items():
            content[section] = content.get(section, {}) | value if isinstance(value, dict) else value
        file.write_text(yaml.safe_dump(content))

    return edit


def recipe_of(content: str | bytes):
    return lambda place: (place / "recipe.yaml").write_bytes(content.encode() if isinstance(content, str) else content)


def task_of(source: str):
    """Functions at the end of task.py replace those of the same name."""
    return task_file(TASK + source)


def task_file(content: str):
    return lambda place: (place / "task.py").write_text(content)


def flags(*words):
    return lambda place: list(words)


def both(broken, *words):
    """Something broken, and words for the command line."""

    def do(place):
        broken(place)
        return list(words)

    return do


def case(name, stage, broken, *says, marks=()):
    """
    Args:
        stage: the script that reads what is broken.
        broken: breaks the recipe in the folder it is given; returns words for the command line, or None.
        says: parts of the message.
    """
    return pytest.param(stage, broken, says, id=name, marks=marks)


# --- keys and options --------------------------------------------------------------------------------------------

MISSPELT = {
    "model": ("pth", "path"), "lora": ("alfa", "alpha"), "reward": ("adaptor", "adapter"), "objective": ("betta", "beta"),
    "data": ("max_prompt_token", "max_prompt_tokens"), "sampling": ("temprature", "temperature"), "run": ("sed", "seed"),
    "preferences": ("lable", "label"), "evaluate": ("promts", "prompts"), "watch": ("promts", "prompts"),
    "report": ("evalution", "evaluation"), "merge": ("adaptor", "adapter"), "sft": ("max_step", "max_steps"),
    "reward_training": ("optmi", "optim"), "ppo": ("lerning_rate", "learning_rate"), "a2c": ("gama", "gamma"),
    "dpo": ("loss_typ", "loss_type"),
}  # fmt: skip

KEYS = [
    *(
        case(f"misspelt key of {section}", "ppo", edited(**{section: {wrong: 1}}), "tiny/recipe.yaml: ",
             f"unknown key `{section}.{wrong}`; did you mean `{right}`?")
        for section, (wrong, right) in MISSPELT.items()
    ),
    case("misspelt key of a reward term", "ppo", edited(reward={"adapter": None, "read_eos": True, "terms": [{"adaptr": "x"}]}),
         "tiny/recipe.yaml: ", "unknown key `reward.terms[0].adaptr`; did you mean `adapter`?"),
    case("unknown key without a near one", "ppo", flags("--ppo.zzz=1"), "--ppo.zzz: unknown key `ppo.zzz`"),
    case("key that is no text", "ppo", edited(lora={5: 1}), "recipe.yaml: unknown key `lora.5`"),
    case("unknown section", "ppo", edited(pppo={}), "recipe.yaml: unknown section `pppo`; did you mean `ppo`?"),
    case("unknown section in an option", "dpo", flags("--loar.r=2"), "--loar.r: unknown section `loar`; did you mean `lora`?"),
    case("unknown option", "ppo", flags("--dryrun"), "--dryrun: unknown option; did you mean `dry-run`?"),
    case("option without a value", "ppo", flags("--lora.r"), "--lora.r: a value is missing"),
    case("word that is no option", "ppo", flags("lora.r=1"), "lora.r=1: expected --recipe"),
    case("option without a key", "ppo", flags("--ppo.=1"), "--ppo.: an override is --section.key; sections: model"),
    case("key of another section's fact", "ppo", flags("--ppo.kl_coef=1"), "`ppo.kl_coef` belongs to `objective.beta`"),
    case("key without effect", "a2c", flags("--a2c.num_ppo_epochs=2"), "`a2c.num_ppo_epochs` has no effect here"),
    case("section that is a list", "sft", edited(sft=[1]), "recipe.yaml: `sft` must be a mapping of keys to values, got [1]"),
    case("required key that is missing", "ppo", recipe_of("reward: {adapter: y}"), "recipe.yaml: `model.path` is missing"),
]  # fmt: skip

# --- values ------------------------------------------------------------------------------------------------------

VALUES = [
    case("text for a whole number", "ppo", flags("--lora.r=many"), "--lora.r: `lora.r`: expected int > 0, got 'many'"),
    case("text that is nearly a number", "ppo", flags("--ppo.learning_rate=5e-7x"), "--ppo.learning_rate", "got '5e-7x'"),
    case("list for a number", "ppo", flags("--objective.beta=[1]"), "`objective.beta`: expected float >= 0, got [1]"),
    case("mapping for text", "ppo", edited(run={"name": {"a": 1}}), "recipe.yaml: `run.name`: expected str or null"),
    case("null where something is needed", "ppo", flags("--model.path=null"), "`model.path`: expected str, got None"),
    case("bool for a number", "a2c", edited(a2c={"gamma": True}), "recipe.yaml: `a2c.gamma`: expected float, got True"),
    case("fraction for a whole number", "ppo", flags("--evaluate.prompts=1.5"),
         "`evaluate.prompts`: expected int > 0, got 1.5"),
    case("negative number", "ppo", flags("--objective.beta=-1"), "`objective.beta`: expected float >= 0, got -1"),
    case("zero", "ppo", flags("--sampling.temperature=0"), "`sampling.temperature`: expected float > 0, got 0"),
    case("nan", "ppo", edited(objective={"beta": float("nan")}),
         "`objective.beta`: expected a finite number that float32 holds, got nan"),
    case("nan as text", "dpo", edited(dpo={"learning_rate": "nan"}), "`dpo.learning_rate`: expected a finite number"),
    case("inf", "ppo", flags("--reward.clip=.inf"),
         "--reward.clip: `reward.clip`: expected a finite number that float32 holds, got inf"),
    case("number of many digits", "ppo", flags(f"--run.seed={10**30}"), "--run.seed", "at most 64 bits, got one of 100"),
    case("seed beyond numpy's", "ppo", flags(f"--run.seed={2**32}"), "`run.seed`: expected int >= 0 and < 4294967296"),
    case("dropout of one", "reward", flags("--lora.dropout=1"), "`lora.dropout`: expected float >= 0 and < 1, got 1"),
    case("no such choice", "ppo", flags("--run.tracker=mlflow"),
         "`run.tracker`: expected one of 'wandb', 'none', got 'mlflow'"),
    case("no such choice of TRL", "dpo", flags("--dpo.optim=adamm"), "`dpo`: TRL refuses these values", "adamm"),
    case("no such loss of DPO", "dpo", flags("--dpo.loss_type=[sigmod]"),
         "`dpo.loss_type`: 'sigmod'", "did you mean `sigmoid`?"),
    case("no such loss of SFT", "sft", flags("--sft.loss_type=nlll"),
         "`sft.loss_type`: 'nlll' is none of nll", "did you mean `nll`"),
    case("negative learning rate", "ppo", flags("--ppo.learning_rate=-1"), "`ppo.learning_rate`: expected at least 0, got -1"),
    case("batch of none", "sft", flags("--sft.per_device_train_batch_size=0"),
         "`sft.per_device_train_batch_size`: expected at least 1"),
    case("share above one", "a2c", flags("--a2c.lam=1.5"), "`a2c.lam`: expected a number between 0 and 1, got 1.5"),
    case("no epochs", "dpo", flags("--dpo.num_train_epochs=0"), "`dpo.num_train_epochs`: expected more than 0, got 0"),
    case("reward without a source", "ppo", flags("--reward.adapter=null"),
         "--reward.adapter: `reward` needs one of adapter, model"),
    case("reward with two sources", "ppo", flags("--reward.adapter=x", "--reward.function=wordy"),
         "--reward.adapter", "names adapter and function"),
    case("rewards of one name", "ppo",
         edited(reward={"adapter": None, "read_eos": True, "terms": [{"function": "wordy"} for _ in range(2)]}),
         "`reward.terms`: two are named wordy; give one a `name`"),
]  # fmt: skip

CONFLICTS = [
    case("minibatches that do not divide", "ppo", flags("--ppo.num_mini_batches=3"),
         "`ppo.num_mini_batches` 3 does not divide the 8 episodes"),
    case("best model without evaluation", "ppo", flags("--ppo.metric_for_best_model=reward"),
         "`ppo.metric_for_best_model` needs `ppo.eval_strategy` steps"),
    case("evaluation every no steps", "a2c", flags("--a2c.eval_strategy=steps", "--a2c.eval_steps=0"),
         "`a2c.eval_steps`: expected a whole number of updates, got 0"),
    case("evaluation by epochs", "ppo", flags("--ppo.eval_strategy=epoch"), "`ppo.eval_strategy` epoch", "use steps or no"),
    case("rollback without evaluation", "ppo", flags("--watch.on_over_optimisation=rollback"),
         "`watch.on_over_optimisation` rollback needs `ppo.eval_strategy` steps"),
    case("evaluation that DPO has no data for", "dpo", flags("--dpo.eval_strategy=steps"),
         "`dpo.eval_strategy` steps", "leave it out"),
    case("no such place for the KL", "ppo", flags("--ppo.kl=both"), "`ppo.kl`: expected one of 'reward', 'loss', 'full'"),
    case("DPO without a leash", "dpo", flags("--objective.beta=0"), "`objective.beta` 0: DPO cannot do without the leash"),
    case("texts longer than the backbone reads", "ppo", flags("--data.max_completion_tokens=64"),
         "`data.max_prompt_tokens` 24 + `data.max_completion_tokens` 64 exceed the 64 tokens"),
    case("rounds on the task's pairs", "dpo", flags("--preferences.source=task", "--dpo.rounds=2"),
         "`dpo.rounds` samples new pairs"),
    case("best of more than there are", "evaluate", flags("--evaluate.policies=[best-of-9]"),
         "best-of-9: `evaluate.reference_compl"),
]  # fmt: skip

# --- YAML --------------------------------------------------------------------------------------------------------

GOOD = "model: {path: checkpoints/backbone}\nreward: {adapter: checkpoints/reward}\n"
LAUGHS = "\n".join(["a: &l0 [ha, ha]", *(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30))])
LAUGHS = "model:\n  path: x\n  architecture:\n" + "\n".join(f"    {line}" for line in LAUGHS.splitlines())
MERGES = "\n".join(["a: &m0 {k: 1}", *(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 30))])

YAML = [
    case("recipe that is missing", "ppo", lambda place: (place / "recipe.yaml").unlink(), "tiny/recipe.yaml: no such recipe"),
    case("recipe that is binary", "ppo", recipe_of(bytes(range(256))), "tiny/recipe.yaml: not a text file in UTF-8"),
    case("recipe in UTF-16", "ppo", recipe_of(GOOD.encode("utf-16")), "tiny/recipe.yaml: not a text file in UTF-8"),
    case("recipe that is empty", "ppo", recipe_of(""), "recipe.yaml: a recipe is a mapping of sections, got NoneType"),
    case("recipe that is a list", "ppo", recipe_of("[1, 2]"), "recipe.yaml: a recipe is a mapping of sections, got list"),
    case("recipe that is a number", "ppo", recipe_of("5"), "recipe.yaml: a recipe is a mapping of sections, got int"),
    case("half a recipe", "ppo", recipe_of("model: {path: ["), "recipe.yaml: not valid YAML", "(line 1, column 16)"),
    case("two recipes in one file", "ppo", recipe_of(GOOD + "---\n" + GOOD),
         "recipe.yaml: not valid YAML", "(line 3, column 1)"),
    case("key twice", "ppo", recipe_of(GOOD + "model: {path: y}"), "the key `model` appears twice (line 3, column 1)"),
    case("python object", "ppo", recipe_of("model: !!python/object/apply:os.system [ls]"),
         "not valid YAML", "os.system", "(line 1"),
    case("NUL in a recipe", "ppo", recipe_of(GOOD + "run: {name: \0}"), "recipe.yaml: not valid YAML", "#x0000"),
    case("NUL as an escape", "ppo", recipe_of(GOOD + 'run: {project: "a\\0b"}'),
         "recipe.yaml: `run.project`: the character '\\x00'"),
    case("half a character", "ppo", recipe_of(GOOD + 'run: {project: "\\ud800"}'),
         "recipe.yaml: `run.project`: the character '\\ud800'"),
    case("no character", "ppo", recipe_of(GOOD + 'run: {project: "\\U00110000"}'), "recipe.yaml: not valid YAML"),
    case("deeply nested", "ppo", recipe_of("[" * 10_000), "recipe.yaml: not valid YAML: too deeply nested"),
    case("a billion laughs", "ppo", recipe_of(LAUGHS),
         "recipe.yaml: not valid YAML: anchors and aliases (& and *) are not read here", "(line 4, column 8)"),
    case("a billion merges", "ppo", recipe_of(MERGES), "recipe.yaml: not valid YAML", "anchors and aliases", "(line 1"),
    case("mappings merged", "ppo", recipe_of(GOOD + "ppo: {<<: {gamma: 0.9}}"),
         "recipe.yaml: not valid YAML", "`<<` merges", "(line 3"),
    case("mapping within itself", "ppo", recipe_of(GOOD + "ppo: &a {lr_scheduler_kwargs: *a}"),
         "recipe.yaml: not valid YAML: anchors and aliases (& and *) are not read here", "(line 3, column 6)"),
    case("value of an option that is no YAML", "ppo", flags("--lora.r=["), "--lora.r: not valid YAML", "(line 1"),
    case("folder that is a number", "ppo", recipe_of(GOOD + "folder: [1]"), "recipe.yaml: `folder`: expected str, got [1]"),
]  # fmt: skip

# --- task.py -----------------------------------------------------------------------------------------------------

ANSWERS = [[{"role": "assistant", "content": "b"}]]
CHAT_AFTER_TEXT = {"prompt": ["a"], "chosen": ANSWERS, "rejected": ANSWERS}
DATASET = "\ndef load_{0}(split):\n    return Dataset.from_dict({1})\n"

PROMPTS = "\nfrom datasets import Dataset\ndef load_prompts(split):\n    return Dataset.from_dict({'prompt': ['a']})"
APART = {side: [[{"role": "user", "content": side}]] for side in ("chosen", "rejected")}
CHAT = {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}


def with_template(text, *words):
    """Demonstrations that are messages, and a chat template for them."""

    def broken(place):
        task_of(DATASET.format("demonstrations", CHAT))(place)
        (place / "x.jinja").write_text(text, encoding="utf-8", errors="surrogateescape")

    return both(broken, "--model.chat_template=x.jinja", *words)


TASKS = [
    case("no task.py", "report", lambda place: (place / "task.py").unlink(), "tiny/task.py: no such file"),
    case("task.py with a syntax error", "ppo", task_file("x = 1\ndef load(:\n"),
         "tiny/task.py: cannot be imported: invalid syntax at task.py:2"),
    case("task.py that imports what there is not", "sft", task_file("import nowhere_at_all"),
         "task.py: cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all' at task.py:1"),
    case("task.py that raises", "reward", task_file("\n\nraise RuntimeError('no\\ndisk')"),
         "task.py: cannot be imported: RuntimeError: no disk at task.py:3"),
    case("task.py that exits", "ppo", task_file("import sys\nsys.exit('install it first')"),
         "task.py: cannot be imported: install it first"),
    case("function that is missing", "sft", task_of("\ndel load_demonstrations\n"),
         "task.py: this stage needs a function `load_demonstrations`"),
    case("function that is misspelt", "ppo", task_of("\nload_prompt = load_prompts\ndel load_prompts\n"),
         "task.py: this stage needs a function `load_prompts`; did you mean `load_prompt`?"),
    case("function that raises", "ppo", task_of("\ndef load_prompts(split):\n    return {}[split]\n"),
         "task.py: `load_prompts('train')` failed: KeyError: 'train' at task.py:"),
    case("function without the argument", "reward", task_of("\ndef load_preferences():\n    return 1\n"),
         "task.py: `load_preferences('train')` failed: TypeError"),
    case("function that returns a list", "ppo", task_of("\ndef load_prompts(split):\n    return ['a']\n"),
         "`load_prompts('train')` returned list, expected a datasets.Dataset"),
    case("no rows", "ppo", task_of(DATASET.format("prompts", {"prompt": []})), "`load_prompts('train')` returned no rows"),
    case("columns of other names", "reward", task_of(DATASET.format("preferences", {"prompt": ["a"], "good": ["b"]})),
         "`load_preferences('train')` has the columns ['prompt', 'good'], expected chosen, prompt, rejected"),
    case("a row that is None", "sft", task_of(DATASET.format("demonstrations", {"text": ["a", None]})),
         "`load_demonstrations('train')`: `text` of row 1: expected text, got None"),
    case("prompts that are numbers", "ppo", task_of(DATASET.format("prompts", {"prompt": [1, 2]})),
         "`load_prompts('train')`: `prompt` of row 0: expected text or chat messages", "got 1"),
    case("chat without roles", "ppo", task_of(DATASET.format("prompts", {"prompt": [[{"text": "a"}]]})),
         "`prompt` of row 0: expected text or chat messages with `role` and `content`, got [{'text': 'a'}]"),
    case("chat without a template", "ppo",
         task_of(DATASET.format("prompts", {"prompt": [[{"role": "user", "content": "a"}]] * 8})),
         "prompts are chat messages, and the tokenizer of `model.path` has no chat template"),
    case("a stream", "ppo", task_of(f"{PROMPTS}.to_iterable_dataset()\n"),
         "`load_prompts('train')` returned IterableDataset", "a stream has no length: return Dataset.from_list("),
    case("all splits at once", "sft", task_of(
        "\nfrom datasets import DatasetDict\ndef load_demonstrations(split):\n    return DatasetDict(train=1, test=2)\n"),
         "returned DatasetDict", "the splits train, test: return one of them"),
    case("rows made anew at each reading", "ppo", task_of(f"{PROMPTS}.with_transform(dict)\n"), "has a transform", "use map"),
    case("images", "ppo", task_of(f"{PROMPTS}.add_column('images', [1])\n"), "has the column images; only text is read here"),
    case("tools that are no JSON", "ppo", task_of(f"{PROMPTS}.add_column('tools', ['{{'])\n"),
         "`load_prompts('train')`: row 0: `tools` is not valid JSON"),
    case("variables of a template that are text", "ppo", task_of(f"{PROMPTS}.add_column('chat_template_kwargs', ['x'])\n"),
         "row 0: `chat_template_kwargs`: expected a mapping, got 'x'"),
    case("token ids of another vocabulary", "evaluate", task_of(f"{PROMPTS}.add_column('input_ids', [[9999]])\n"),
         "`load_prompts`, row 0: `input_ids`: expected tokens from 0 to ", "got [9999]"),
    case("pairs without a common beginning", "reward", task_of(DATASET.format("preferences", APART)),
         "`load_preferences('train')`: row 0 has no messages of `role` and `content`, or its `chosen` and `rejected` no"),
    case("template that refuses", "sft", with_template("{{ raise_exception('not these') }}", "--sft.from_scratch=false"),
         "`load_demonstrations`, row 0: the chat template of `model.path` does not take these", "TemplateError: not these"),
    case("template with a slip", "ppo", with_template("a\n{% if %}", "--dry-run"),
         "`model.chat_template` x.jinja: line 2: Expected an expression"),
    case("template that is no text", "ppo", with_template("\udcff"), "`model.chat_template` x.jinja: is not UTF-8"),
    case("reward function of another parameter", "ppo", both(task_of("\ndef mine(texts):\n    return [1.0]\n"),
         "--reward.adapter=null", "--reward.function=mine"), "`mine` has the parameter `texts`, which is neither `prompts`"),
    case("gold reward of another parameter", "dpo", task_of("\ndef gold_reward(completions, answer):\n    return [1.0]\n"),
         "`gold_reward` has the parameter `answer`", "another column of load_prompts (none)"),
    case("chat after text", "dpo", both(task_of(DATASET.format("preferences", CHAT_AFTER_TEXT)), "--preferences.source=task"),
         "`load_preferences('train')`: `chosen` of row 0: expected text, got"),
    case("prompts that are all too long", "preferences", flags("--data.max_prompt_tokens=1"),
         "0 of 48 prompts have between 1 and 1 tokens", "raise `data.max_prompt_tokens`"),
    case("enormous prompts", "evaluate", task_of(DATASET.format("prompts", {"prompt": ["film " * 20_000] * 8})),
         "0 of 8 prompts have between 1 and 24 tokens", "raise `data.max_prompt_tokens`"),
    case("pairs that are all too long", "dpo", flags("--preferences.source=task", "--data.max_prompt_tokens=1"), "1 tokens"),
    case("fewer prompts than a batch", "a2c", flags("--a2c.per_device_train_batch_size=64"), "and 64 are needed for one batch"),
    case("reward function that is missing", "ppo", flags("--reward.adapter=null", "--reward.function=wordi"),
         "task.py: this stage needs a function `wordi`; did you mean `wordy`?"),
    case("reward function that raises", "ppo", both(task_of("\ndef bad(prompts, completions):\n    return 1 / 0\n"),
         "--reward.adapter=null", "--reward.function=bad"), "ZeroDivisionError", "at task.py:"),
    case("gold reward that is no function", "ppo", task_of("\ngold_reward = 3\n"),
         "task.py: this stage needs a function `gold_reward`"),
    case("gold to keep the best by, and none", "ppo", both(task_of("\ndel gold_reward\n"),
         "--ppo.eval_strategy=steps", "--ppo.eval_steps=1", "--ppo.metric_for_best_model=gold"),
         "task.py has no `gold_reward`"),
]  # fmt: skip

# --- checkpoints -------------------------------------------------------------------------------------------------


def without(name, *files):
    """A checkpoint that lacks files."""

    def remove(place):
        folder = own(place, name)
        for file in files:
            (folder / file).unlink()

    return remove


def cut(name, file):
    """A checkpoint of which one file was not copied to its end."""

    def truncate(place):
        os.truncate(own(place, name) / file, (place / "checkpoints" / name / file).stat().st_size // 2)

    return truncate


def with_text(name, file, content):
    return lambda place: (own(place, name) / file).write_text(content)


def with_keys(name, file, keys):
    """A checkpoint with other values in one of its JSON files."""

    def change(place):
        path = own(place, name) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


class Bomb:
    """Whoever unpickles it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def pickled(name, file, *without):
    """A pickle as the checkpoint's weights."""

    def write(place):
        folder = own(place, name)
        for other in without:
            (folder / other).unlink()
        (folder / file).write_bytes(pickle.dumps(Bomb()))

    return write


def reweighted(name, file, change):
    """A checkpoint whose tensors, by name, were changed in place."""

    def write(place):
        path = own(place, name) / file
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return write


def every(change):
    return lambda tensors: tensors.update({key: change(tensor) for key, tensor in tensors.items()})


def foreign_reward(*words):
    return both(
        lambda place: write_foreign_reward(place / "foreign"), "--reward.adapter=null", "--reward.model=foreign", *words
    )


WEIGHTS, ADAPTER, TOKENIZER = "model.safetensors", "adapter_model.safetensors", "tokenizer_config.json"
SCORE = "base_model.model.score.weight"
HUGE = struct.pack("<Q", 2**60)  # a header of an exabyte

CHECKPOINTS = [
    case("backbone that is missing", "ppo", flags("--model.path=checkpoints/nowhere"),
         "`model.path` checkpoints/nowhere: no such folder"),
    case("backbone that no hub has", "ppo", flags("--model.path=nobody-at-all/nothing"),
         "`model.path` nobody-at-all/nothing (no folder beside the recipe or here, so a Hub id): cannot be"),
    case("backbone that is a file", "ppo", flags("--model.path=recipe.yaml"),
         "`model.path` recipe.yaml", "is a file, expected a folder"),
    case("backbone of a name too long", "ppo", flags(f"--model.path={'x' * 5000}"), "`model.path` xxx", "cannot be loaded"),
    case("backbone without a config", "sft",
         both(without("backbone", "config.json"), "--sft.from_scratch=false"),
         "`model.path` checkpoints/backbone: the folder", "has no config.json"),
    case("config that is half there", "ppo", cut("backbone", "config.json"), "`model.path`", "config.json is not valid JSON"),
    case("config that is a list", "ppo", with_text("backbone", "config.json", "[1]"),
         "config.json holds a list, expected an object"),
    case("config of an unknown kind", "ppo", with_keys("backbone", "config.json", {"model_type": "lama"}),
         "`model.path` checkpoints/backbone", "lama"),
    case("config with text for numbers", "ppo",
         with_keys("backbone", "config.json", {"num_hidden_layers": "two", "max_position_embeddings": "x"}),
         "`model.path` checkpoints/backbone", "cannot be loaded", "num_hidden_layers"),
    case("config of another width", "ppo", with_keys("backbone", "config.json", {"hidden_size": 64}),
         "`model.path` checkpoints/backbone", "of another shape"),
    case("backbone cut short", "ppo", cut("backbone", WEIGHTS),
         "`model.path` checkpoints/backbone", "model.safetensors is cut short"),
    case("backbone that is a pickle alone", "ppo", pickled("backbone", "pytorch_model.bin", WEIGHTS),
         "`model.path` checkpoints/backbone", "has no *.safetensors", "a pickle"),
    case("pickle by the name of safetensors", "reward", pickled("backbone", WEIGHTS),
         "model.safetensors is cut short, or no safetensors file"),
    case("header of an exabyte", "ppo", lambda place: (own(place, "backbone") / WEIGHTS).write_bytes(HUGE + b"{}"),
         "is cut short"),
    case("backbone of NaN", "preferences", reweighted("backbone", WEIGHTS, every(lambda t: t * float("nan"))),
         "its logits are not finite"),
    case("backbone that lacks a weight", "ppo",
         reweighted("backbone", WEIGHTS, lambda tensors: tensors.pop("model.norm.weight")),
         "`model.path` checkpoints/backbone: cannot be loaded", "1 weights are missing", "such as model.norm.weight"),
    case("tokenizer that is missing", "ppo", without("backbone", "tokenizer.json", "tokenizer_config.json"),
         "the tokenizer of `model.path` checkpoints/backbone: cannot be loaded"),
    case("tokenizer that is broken", "dpo", with_text("backbone", "tokenizer.json", "{}"),
         "the tokenizer of `model.path` checkpoints/backbone"),
    case("tokenizer without a pad", "ppo", with_keys("backbone", TOKENIZER, {"pad_token": None}),
         "has the pad token None", "pad must exist"),
    case("pad that is the eos", "sft",
         both(with_keys("backbone", TOKENIZER, {"pad_token": "</s>"}), "--sft.from_scratch=false"),
         "has the pad token '</s>' and the eos token '</s>'"),
    case("no module for the adapter", "ppo", flags("--lora.target_modules=[q_prj]"),
         "`lora` with target_modules ['q_prj']", "does not fit"),
    case("attention that there is not", "ppo", flags("--model.attention=flash_attention_9"),
         "`model.path` checkpoints/backbone", "flash_attention_9"),
    case("architecture of an unknown kind", "sft", edited(model={"architecture": {"model_type": "lama", "vocab_size": 300}}),
         "`model.architecture`: no such model can be built", "lama"),
    case("architecture with a misspelt key", "sft",
         edited(model={"architecture": {"model_type": "llama", "vocab_size": 300, "hiden_size": 8}}),
         "`model.architecture.hiden_size`: LlamaConfig would not read it; did you mean `hidden_size`?"),
    case("architecture without words", "sft", edited(model={"architecture": {"model_type": "llama", "vocab_size": 20}}),
         "`model.architecture` has the vocab_size 20: expected a whole number of at least 259"),

    case("reward adapter that is missing", "ppo", flags("--reward.adapter=checkpoints/nowhere"),
         "`reward.adapter` checkpoints/nowhere: no such"),
    case("reward term that is missing", "ppo",
         edited(reward={"adapter": None, "read_eos": True, "terms": [{"adapter": "./no"}]}),
         "`reward.terms[0].adapter` ./no: no such folder"),
    case("adapter's config that is broken", "ppo", with_text("reward", "adapter_config.json", "{broken"),
         "`reward.adapter`", "is not valid JSON"),
    case("adapter cut short", "evaluate", cut("reward", ADAPTER),
         "`reward.adapter` checkpoints/reward", "adapter_model.safetensors is cut short"),
    case("adapter that is a pickle alone", "ppo", pickled("reward", "adapter_model.bin", ADAPTER),
         "has no adapter_model.safetensors", "a pickle"),
    case("pickle by the name of an adapter", "dpo", pickled("reward", ADAPTER),
         "adapter_model.safetensors is cut short, or no safetensors file"),
    case("adapter for another width", "ppo", reweighted("reward", ADAPTER, every(lambda t: t.repeat(1, 2).contiguous())),
         "`adapter` checkpoints/reward", "does not fit checkpoints/backbone", "size mismatch"),
    case("adapter that lacks its head", "ppo", reweighted("reward", ADAPTER, lambda tensors: tensors.pop(SCORE)),
         "the reward's `adapter` checkpoints/reward", "does not fit checkpoints/backbone", SCORE),
    case("adapter that lacks a weight", "ppo", reweighted("reward", ADAPTER, lambda tensors: tensors.pop(min(tensors))),
         "the reward's `adapter` checkpoints/reward", "missing adapter keys", "layers.0.mlp.down_proj.lora_A"),
    case("reward model without a head", "ppo", flags("--reward.adapter=null", "--reward.model=checkpoints/backbone"),
         "the reward's `model` checkpoints/backbone", "such as score.weight"),
    case("reward of NaN", "ppo", reweighted("reward", ADAPTER, every(lambda t: t * float("nan"))),
         "gives 4 of 4 completions a score that is not finite", "look at its weights"),
    case("reward model without the label", "ppo", foreign_reward("--reward.label=god"),
         "the reward's `model` foreign: `label` 'god'", "2 (good)"),
    case("reward model of several labels", "preferences", foreign_reward(),
         "`label` None is none of its labels: 0 (bad), 1 (so-so), 2 (good)"),
    case("reward model that is missing", "ppo", flags("--reward.adapter=null", "--reward.model=./nowhere"),
         "`reward.model` ./nowhere: no such"),
]  # fmt: skip

# --- runs, pairs and evaluations ---------------------------------------------------------------------------------


def file_of(name, content, *words):
    """A file beside the recipe's folder, which `{}` in the words stands for."""

    def write(place):
        file = place.parent / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return [word.format(file.parent) for word in words]

    return write


def pairs_of(*rows):
    return file_of("pairs/pairs.jsonl", "\n".join(map(str, rows)), "--preferences.path={}")


def unwritable(place):
    (place.parent / "locked").mkdir(mode=0o500)
    return ["--run.output=locked/outputs"]


def broken_policy(place):
    shutil.copytree(place / "checkpoints" / "reward", place / "mine")
    config = place / "mine" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "CAUSAL_LM", "modules_to_save": None}))
    os.truncate(place / "mine" / ADAPTER, 100)
    return ["--evaluate.policies=[mine]"]


PAIR = {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5], "label_smoothing": 0.0}

RUNS = [
    case("run outside its folder", "ppo", flags("--run.name=../x"), "`run.name` ../x: expected the name of one folder"),
    case("run of two folders", "sft", flags("--run.name=a/b"), "`run.name` a/b: expected the name of one folder"),
    case("run of an absolute path", "report", flags("--run.name=/tmp/x"), "`run.name` /tmp/x: expected the name of one folder"),
    case("run of a name with a line break", "ppo", edited(run={"name": "a\nb"}),
         "`run.name` a b: expected the name of one folder"),
    case("run of a name that colours", "ppo", edited(run={"name": "\x1b[31mred"}), "`run.name`: the character '\\x1b'"),
    case("run named latest", "evaluate", flags("--run.name=latest"),
         "`run.name` latest: the link to the newest run has this name"),
    case("run of a name too long", "ppo", flags(f"--run.name={'x' * 300}"), "`run.name` xxx", "at most 200 bytes"),
    case("run that exists", "sft", file_of("outputs/tiny/sft/it/summary.json", "{}", "--run.name=it"),
         "outputs/tiny/sft/it: this run exists; choose another `--run.name`"),
    case("output that is a file", "ppo", file_of("there", "", "--run.output={}/there"),
         "`run.output`", "there", "(Not a directory)"),
    case("output that may not be written to", "ppo", unwritable, "`run.output`", "locked may not be written to",
         marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")),
    case("output of a name too long", "ppo", flags(f"--run.output={'x' * 300}"), "`run.output` xxx", "(File name too long)"),
    case("pairs that are missing", "dpo", flags("--preferences.path=./nowhere"),
         "`preferences.path` ./nowhere: no such folder"),
    case("folder without pairs", "dpo", flags("--preferences.path=checkpoints"),
         "`preferences.path` checkpoints", "has no pairs.jsonl"),
    case("pairs of no rows", "dpo", pairs_of(), "pairs/pairs.jsonl: no pairs"),
    case("pairs that are no JSON", "dpo", pairs_of(json.dumps(PAIR), "{"),
         "pairs/pairs.jsonl, line 2: not pairs of scripts/preferences.py"),
    case("pairs without a key", "dpo", pairs_of(json.dumps({"prompt_ids": [3]})),
         "pairs.jsonl, line 1: not pairs", "chosen_ids"),
    case("pairs with text for tokens", "dpo", pairs_of(json.dumps(PAIR | {"chosen_ids": ["a"]})),
         "line 1", "chosen_ids is no list of token ids"),
    case("pairs with odd probabilities", "dpo", pairs_of(json.dumps(PAIR | {"label_smoothing": 7})),
         "line 1", "label_smoothing is 7"),
    case("policy that is missing", "evaluate", flags("--evaluate.policies=[nowhere]"),
         "`evaluate.policies`: nowhere is no folder"),
    case("policy that is misspelt", "evaluate", flags("--evaluate.policies=[refrence]"),
         "refrence is no folder", "did you mean `reference`?"),
    case("policy without a model", "evaluate", flags("--evaluate.policies=[a=checkpoints]"),
         "a=checkpoints: neither an adapter"),
    case("policies of one name", "evaluate", flags("--evaluate.policies=[a=checkpoints/reward, a=checkpoints/reward]"),
         "two are named a"),
    case("policy that is broken", "evaluate", broken_policy,
         "tiny/mine: cannot be loaded, or does not fit checkpoints/backbone"),
    case("report before any evaluation", "report", flags(), "no evaluation in", "run scripts/evaluate.py of tiny first"),
    case("report of a folder that is missing", "report", flags("--report.evaluation=nowhere"),
         "`report.evaluation` nowhere: no such folder"),
    case("report of a broken evaluation", "report", file_of("it/evaluation.json", "{", "--report.evaluation={}"),
         "it/evaluation.json: not valid JSON"),
    case("report of another file", "report", file_of("it/evaluation.json", "[]", "--report.evaluation={}"),
         "it/evaluation.json: not what"),
    case("recipe that is a device", "ppo", flags("--recipe=/dev/null"), "/dev/null: no such recipe"),
    case("recipe of a name too long", "ppo", flags(f"--recipe={'x' * 5000}"), "no such recipe"),
]  # fmt: skip


# --- what TRL finds out as it builds its trainer -------------------------------------------------------------------


LATE = [
    case("no such way to pack", "sft", flags("--sft.packing=true", "--sft.packing_strategy=bfdd"),
         "`sft`: TRL", "bfdd"),
    case("optimizer that is not installed", "sft", flags("--sft.optim=adamw_8bit"),
         "`sft`: TRL", "bitsandbytes"),
    case("token that the tokenizer has not", "reward", flags("--reward_training.eos_token=<end>"),
         "`reward_training.eos_token` belongs to `model.eos_token`"),
    case("losses without that divergence", "dpo", flags("--preferences.source=task", "--dpo.loss_type=[aot]",
         "--dpo.f_divergence_type=js_divergence"), "f_divergence_type"),
    case("accelerator's config that is missing", "sft", flags("--sft.accelerator_config=nowhere.json"),
         "`sft.accelerator_config` has no effect here"),
    case("demonstrations without text, from scratch", "sft",
         task_of(DATASET.format("demonstrations", {"prompt": ["a"], "completion": ["b"]})),
         "`sft.from_scratch`", "text"),
    case("pairs of another tokenizer", "dpo", pairs_of(json.dumps(PAIR | {"chosen_ids": [10_000]})), "pairs.jsonl", "10000"),
]  # fmt: skip


# -----------------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time, Python's cache of task.py left out."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


@pytest.mark.parametrize(("stage", "broken", "says"), [*KEYS, *VALUES, *CONFLICTS, *YAML, *TASKS, *CHECKPOINTS, *RUNS, *LATE])
def test_one_line_exit_code_2_and_nothing_written(stage, broken, says, place, tmp_path, capfd):
    words = broken(place)
    words = words if isinstance(words, list) else []
    before = files_of(tmp_path)
    argv = ["--recipe", str(place), "--run.output", str(tmp_path / "outputs"), *words]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"scripts.{stage}").main(argv)
    assert stop.value.code == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    for part in says:
        assert part in line
    assert files_of(tmp_path) == before


def test_a_misspelt_key_of_every_section_is_tried():
    assert MISSPELT.keys() == {*SECTIONS, *TRAINED}


def test_number_that_yaml_reads_as_text(place):
    (place / "recipe.yaml").write_text("model: {path: x}\nreward: {adapter: y}\nppo: {learning_rate: 5e-7}\n")
    assert load_recipe(place).stages["ppo"]["learning_rate"] == 5e-7
