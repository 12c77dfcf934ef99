"""What others wrote is data: no pickle is loaded, no model's code runs untrusted, no secret is kept, no text becomes markup."""

import ast
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from rlhf_recipes.command_line import help_text
from rlhf_recipes.evaluation.tables import markdown_samples, print_samples
from rlhf_recipes.recipe import keys, yaml_text
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.stages import TRAINED
from rlhf_recipes.report.data import load_report_data
from rlhf_recipes.report.page import render_html, render_markdown
from tests import test_report
from tests.test_scripts import run

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*ROOT.glob("rlhf_recipes/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("recipes/**/*.py")]


@pytest.fixture
def marker(tmp_path):
    """A file that exists once planted code has run."""
    return tmp_path / "executed"


@pytest.fixture
def recipe(tiny, tmp_path):
    """A copy of the tiny recipe to plant things in."""
    return shutil.copytree(tiny, tmp_path / "tiny")


FEW = ["--ppo.total_episodes=8", "--evaluate.prompts=4"]


def refused(capsys, *arguments):
    """The error line of a stage that ends with exit code 2 and has written nothing."""
    tmp_path = arguments[2]
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert not (tmp_path / "outputs").exists()
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


# --- the source --------------------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pandas"}
UNSAFE = {
    "torch.load", "torch.jit.load", "torch.hub.load", "eval", "exec", "os.system", "os.popen", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all",
}  # fmt: skip


def names_of(tree: ast.AST) -> dict[str, str]:
    """Name in the file -> what was imported as it."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unsafe_calls(source: str) -> list[str]:
    """What in `source` could execute what it reads."""
    tree = ast.parse(source)
    names = names_of(tree)
    found = [name for name in names.values() if name.split(".")[0] in UNPICKLERS]

    def full(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any(ast.unparse(i.context_expr) == "safetensors_only()" for i in node.items)
        for inner in ast.walk(node)
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, given = full(call.func), {k.arg: k.value for k in call.keywords}  # the key None: a ** that adds more
        last = name.rpartition(".")[2]
        if name in UNSAFE:
            found.append(name)
        if name == "yaml.load" and [full(a) for a in call.args[1:]] != ["_Loader"]:
            found.append(name)
        if name == "numpy.load" and "allow_pickle" in given:
            found.append(name)
        if "shell" in given and name.startswith("subprocess."):
            found.append(name)
        if last == "load_adapter" or name == "peft.PeftModel.from_pretrained":
            found += [] if id(call) in guarded else [f"{name} outside safetensors_only"]
        elif last == "from_pretrained":
            model = re.search(r"Model|For[A-Z]", name.split(".")[-2])
            wanted = (["use_safetensors"] if model else []) + (["trust_remote_code"] if ".Auto" in name else [])
            found += [f"{name} without {key}" for key in wanted if not {key, None} & given.keys()]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch as t\nt.load(x)",
        "from torch import load\nload(x, weights_only=True)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import yaml\nyaml.load(x, yaml.UnsafeLoader)",
        "import yaml\nyaml.load(x)",
        "eval(x)",
        "import subprocess as s\ns.run(x, shell=True)",
        "import os\nos.system(x)",
        "from peft import PeftModel\nPeftModel.from_pretrained(a, b)",
        "model.load_adapter(x)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(x, trust_remote_code=False)",
        "from transformers import BertForMaskedLM\nBertForMaskedLM.from_pretrained(x)",
        "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained(x)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert len(unsafe_calls(source)) == 1


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_in_the_source_executes_what_it_reads(file):
    documented = ["eval"] if file.name == "trl_fields.py" else []  # annotations of the installed packages
    assert unsafe_calls(file.read_text()) == documented


def test_yaml_is_read_by_a_safe_loader():
    assert issubclass(yaml_text._Loader, yaml.SafeLoader)


# --- pickles -----------------------------------------------------------------------------------------------------

PICKLES = (
    "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth",
    "adapter_model.bin", "pytorch_model.bin", "model.pt",
)  # fmt: skip


class Bomb:
    """Writes the marker as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def plant(folder: Path, marker: Path, names=PICKLES) -> None:
    for name in names:
        torch.save({"weight": Bomb(marker)}, folder / name)


def test_the_bomb_goes_off(tmp_path, marker):
    plant(tmp_path, marker, ["a.bin"])
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert marker.exists()


def test_pickles_beside_the_weights_are_left_alone(recipe, foreign, tmp_path, marker):
    """In every folder that a run reads, and in a checkpoint that it is resumed from."""
    reward = shutil.copytree(foreign, recipe / "checkpoints/foreign")
    for folder in (recipe / "checkpoints/backbone", recipe / "checkpoints/reward", reward):
        plant(folder, marker)
    terms = "[{adapter: checkpoints/reward, read_eos: false}, {model: checkpoints/foreign, label: good}]"
    rewards = ["--reward.adapter=null", "--reward.read_eos=true", f"--reward.terms={terms}"]
    words = ["--ppo.save_strategy=steps", "--ppo.save_steps=1", "--evaluate.prompts=4"]
    run("ppo", recipe, tmp_path, *rewards, *words)
    policy = tmp_path / "outputs/tiny/ppo/it"
    assert not [file for file in policy.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]  # none is written either

    for folder in (policy, *policy.glob("checkpoint-*")):
        plant(folder, marker)
    full = shutil.copytree(recipe / "checkpoints/backbone", tmp_path / "full")
    run("evaluate", recipe, tmp_path, f"--evaluate.policies=[mine={policy}, full={full}]", "--evaluate.prompts=4")
    (policy / "summary.json").unlink()
    shutil.rmtree(policy / "checkpoint-2")
    run("ppo", recipe, tmp_path, "--resume", str(policy))
    run("sft", recipe, tmp_path, "--sft.from_scratch=false")
    assert not marker.exists()


NOTHING_BUT_A_PICKLE = {  # folder, file, stage, words
    "backbone": ("checkpoints/backbone", "pytorch_model.bin", "ppo", []),
    "backbone of sft": ("checkpoints/backbone", "pytorch_model.bin", "sft", ["--sft.from_scratch=false"]),
    "reward adapter": ("checkpoints/reward", "adapter_model.bin", "ppo", []),
    "reward model": ("foreign", "pytorch_model.bin", "ppo", ["--reward.adapter=null", "--reward.model=foreign"]),
    "policy adapter": ("policy", "adapter_model.bin", "evaluate", ["--evaluate.policies=[mine=policy]"]),
    "full policy": ("full", "pytorch_model.bin", "evaluate", ["--evaluate.policies=[mine=full]"]),
}


@pytest.mark.parametrize(("where", "name", "stage", "words"), NOTHING_BUT_A_PICKLE.values(), ids=NOTHING_BUT_A_PICKLE)
def test_weights_that_are_a_pickle_are_refused(where, name, stage, words, recipe, foreign, tmp_path, marker, capsys):
    shutil.copytree(foreign, recipe / "foreign")
    shutil.copytree(recipe / "checkpoints/backbone", recipe / "full")
    policy = shutil.copytree(recipe / "checkpoints/reward", recipe / "policy")  # it is refused before it is fitted
    file = policy / "adapter_config.json"
    file.write_text(file.read_text().replace("SEQ_CLS", "CAUSAL_LM"))
    for file in (recipe / where).glob("*.safetensors"):
        file.unlink()
    plant(recipe / where, marker, [name])
    line = refused(capsys, stage, recipe, tmp_path, *words)
    assert where in line
    assert "safetensors" in line
    assert not marker.exists()


def test_a_config_that_names_a_pickle_is_refused(recipe, tmp_path, marker, capsys):
    """transformers would take it before the safetensors beside it."""
    backbone = recipe / "checkpoints/backbone"
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    plant(backbone, marker, ["adapter_model.bin"])
    assert "adapter_model.bin: a pickle, which can execute anything" in refused(capsys, "ppo", recipe, tmp_path)
    assert not marker.exists()


def test_an_adapter_on_the_hub_that_is_a_pickle_is_refused(recipe, tmp_path, marker, capsys, monkeypatch):
    """As the Hub's cache holds it."""
    from huggingface_hub import constants

    repository = tmp_path / "hub/models--someone--reward"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    snapshot = shutil.copytree(recipe / "checkpoints/reward", repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    run("ppo", recipe, tmp_path, *FEW, "--reward.adapter=someone/reward")
    shutil.rmtree(tmp_path / "outputs")
    (snapshot / "adapter_model.safetensors").unlink()
    plant(snapshot, marker, ["adapter_model.bin"])
    line = refused(capsys, "ppo", recipe, tmp_path, "--reward.adapter=someone/reward")
    assert "adapter_model.bin: a pickle, which can execute anything" in line
    assert not marker.exists()


# --- code of a model ---------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from torch import nn
from transformers import (
    BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel, PreTrainedTokenizerFast,
)
Path({marker!r}).touch()

class PlantedConfig(LlamaConfig):
    model_type = "planted"

class PlantedModel(LlamaForCausalLM):
    pass

class NewModel(LlamaForCausalLM):
    config_class = PlantedConfig

class NewClassifier(LlamaPreTrainedModel):
    config_class = PlantedConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

class PlantedReward(BertForSequenceClassification):
    pass

class PlantedTokenizer(PreTrainedTokenizerFast):
    pass
"""
GENERATE = (
    "from pathlib import Path\nPath({marker!r}).touch()\n\ndef generate(model, *args, **kwargs):\n    raise AssertionError\n"
)


def plant_code(folder: Path, marker: Path, auto_map: dict[str, str], model_type: str | None = None) -> Path:
    """modeling_x.py in a model's folder, which its config (of AutoTokenizer: tokenizer_config.json) points to."""
    (folder / "modeling_x.py").write_text(CODE.format(marker=str(marker)))
    for name, classes in auto_map.items():
        file = folder / ("tokenizer_config.json" if name == "AutoTokenizer" else "config.json")
        content = json.loads(file.read_text())
        planted = [None, f"modeling_x.{classes}"] if name == "AutoTokenizer" else f"modeling_x.{classes}"
        content["auto_map"] = content.get("auto_map", {}) | {name: planted}
        if name != "AutoTokenizer" and model_type:
            content["model_type"] = model_type
        if name == "AutoTokenizer" and model_type:
            content["tokenizer_class"] = classes
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """transformers copies and imports planted code here, and nothing of it stays; returns the questions it asked."""
    from transformers import dynamic_module_utils

    asked = []
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    yield asked
    assert not asked
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


MODEL = {"AutoModelForCausalLM": "PlantedModel"}
NEW = {
    "AutoConfig": "PlantedConfig", "AutoModelForCausalLM": "NewModel", "AutoModelForSequenceClassification": "NewClassifier",
}  # fmt: skip
TRUST = "--model.trust_remote_code=true"


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_known_architecture_runs_only_where_it_is_trusted(trusted, recipe, tmp_path, marker, capsys):
    plant_code(recipe / "checkpoints/backbone", marker, MODEL | {"AutoTokenizer": "PlantedTokenizer"})
    run("ppo", recipe, tmp_path, *FEW, *([TRUST] if trusted else []))
    line = "model.trust_remote_code: code of checkpoints/backbone is executed on this machine"
    assert capsys.readouterr().err.count(line) == trusted
    assert marker.exists() == trusted


def test_a_new_architecture_is_refused_until_it_is_trusted(recipe, tmp_path, marker, capsys):
    """The value's and the reward's classifiers are built of its code too."""
    plant_code(recipe / "checkpoints/backbone", marker, NEW, "planted")
    line = refused(capsys, "ppo", recipe, tmp_path)
    assert "`model.path` checkpoints/backbone: it brings Python code along" in line
    assert "`model.trust_remote_code: true`" in line
    assert not marker.exists()
    run("ppo", recipe, tmp_path, *FEW, TRUST, "--ppo.value=adapter")
    assert marker.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_custom_generation_runs_only_where_it_is_trusted(trusted, recipe, marker):
    from rlhf_recipes.models.backbone import load_backbone

    folder = recipe / "checkpoints/backbone/custom_generate"
    folder.mkdir()
    (folder / "generate.py").write_text(GENERATE.format(marker=str(marker)))
    loaded = load_recipe(recipe, {"model.trust_remote_code": trusted})
    load_backbone(loaded.model, loaded.path(loaded.model.path))
    assert marker.exists() == trusted


def test_a_tokenizer_of_its_own_is_refused_until_it_is_trusted(recipe, tmp_path, marker, capsys):
    plant_code(recipe / "checkpoints/backbone", marker, NEW | {"AutoTokenizer": "PlantedTokenizer"}, "planted")
    line = refused(capsys, "ppo", recipe, tmp_path)
    assert "the tokenizer of `model.path` checkpoints/backbone: it brings Python code along" in line
    assert not marker.exists()
    run("ppo", recipe, tmp_path, *FEW, TRUST)
    assert marker.exists()


def test_a_reward_model_has_its_own_switch(recipe, foreign, tmp_path, marker, capsys):
    reward = shutil.copytree(foreign, recipe / "foreign")
    plant_code(reward, marker, {"AutoModelForSequenceClassification": "PlantedReward"})
    words = [*FEW, "--reward.adapter=null", "--reward.model=foreign", "--reward.label=good"]
    run("ppo", recipe, tmp_path, *words, TRUST)
    assert not marker.exists()
    capsys.readouterr()
    run("ppo", recipe, tmp_path, *words, "--reward.trust_remote_code=true", "--run.name=2")
    assert marker.exists()
    assert capsys.readouterr().err.count("reward.trust_remote_code: code of foreign is executed on this machine") == 1


def test_a_full_policy_is_trusted_as_the_backbone_is(recipe, tmp_path, marker, capsys):
    full = shutil.copytree(recipe / "checkpoints/backbone", tmp_path / "full")
    plant_code(full, marker, NEW, "planted")
    words = [f"--evaluate.policies=[mine={full}]", "--evaluate.prompts=4"]
    assert f"{full}: it brings Python code along" in refused(capsys, "evaluate", recipe, tmp_path, *words)
    assert not marker.exists()
    run("evaluate", recipe, tmp_path, *words, TRUST)
    assert marker.exists()
    assert f"model.trust_remote_code: code of {full} is executed" in capsys.readouterr().err


def test_what_loads_no_model_trusts_nobody(recipe, tmp_path, capsys):
    run("sft", recipe, tmp_path, TRUST)  # from scratch
    assert "is executed on this machine" not in capsys.readouterr().err


def test_trust_has_one_owner():
    with pytest.raises(RecipeError, match=r"`sft\.trust_remote_code` belongs to `model\.trust_remote_code`"):
        load_recipe(ROOT / "recipes/imdb", {"sft.trust_remote_code": True})


# --- secrets -----------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "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",
    "HUGGING_FACE_HUB_TOKEN": "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",
    "WANDB_API_KEY": "c0ffee00aplantedkeyofwandb00c0ffee000000",
    "OPENAI_API_KEY": "sk-aPlantedKeyOfAnotherServiceDDDDDDDDDD",
    "HTTPS_PROXY": "http://someone:aPlantedProxyPassword@localhost:9",
}
NETRC = "aPlantedPasswordOfNetrcEEEEEEEEEEEEEEEEEE"
REMOTE = "aPlantedTokenInTheRemoteFFFFFFFFFFFFFFFF"


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, in which blocks of 32 KiB cut long records into pieces."""
    data, at, pieces = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        pieces += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


def test_no_secret_of_the_environment_is_written_anywhere(tiny, tmp_path):
    """A real launch with an offline wandb run, in a clone whose remote holds a token."""
    from wandb.proto.wandb_internal_pb2 import Record

    home, clone = tmp_path / "home", tmp_path / "clone"
    for folder in (home, clone):
        folder.mkdir()
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {NETRC}\n")
    (home / ".netrc").chmod(0o600)
    remote = f"https://someone:{REMOTE}@example.com/x.git"
    for words in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *words], cwd=clone, check=True)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "ACCELERATE", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", ROOT / "scripts/ppo.py", "--recipe", tiny, "--run.tracker=wandb",
         "--run.output", tmp_path / "outputs", "--run.name", "it", "--ppo.save_strategy=steps", "--ppo.save_steps=1"],
        cwd=clone, env=keep | SECRETS | {"HOME": str(home), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    written = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert (
        sum(NETRC.encode() in content for content in written.values()) == 1
    )  # the search finds .netrc itself, and .git/config
    assert sum(REMOTE.encode() in content for content in written.values()) == 1
    [log] = (tmp_path / "outputs").rglob("*.wandb")
    records = [Record.FromString(data) for data in wandb_records(log)]
    [arguments] = [list(record.environment.args) for record in records if record.environment.args]
    assert "--run.tracker=wandb" in arguments  # what wandb knows of the process is in the search too
    assert any(record.HasField("exit") for record in records)  # read to its end

    seen = {"stdout": done.stdout, "stderr": done.stderr, "records": b"".join(str(record).encode() for record in records)}
    seen |= {str(file): content for file, content in written.items() if file.parent != clone / ".git" and file.name != ".netrc"}
    assert any(name.endswith("recipe.resolved.yaml") for name in seen)
    for planted in (*SECRETS.values(), "aPlantedProxyPassword", NETRC, REMOTE):
        assert [name for name, content in seen.items() if planted.encode() in content] == [], planted


VALUE = "hf_aValueThatMustNotBeRepeatedGGGGGGGG"
MISPLACED = {
    "ppo.hub_token": VALUE,
    "sft.hub_token": VALUE,
    "dpo.push_to_hub_token": VALUE,
    "reward_training.use_auth_token": VALUE,
    "run.wandb_api_key": VALUE,
    "model.token": VALUE,
    "model.architecture": {"model_type": "llama", "HF_TOKEN": VALUE},
    "sft.lr_scheduler_kwargs": {"deep": [{"password": VALUE}]},
    "reward.terms": [{"function": "wordy", "hub_token": VALUE}],
}


@pytest.mark.parametrize("key", MISPLACED)
def test_a_secret_in_a_recipe_is_refused_by_its_key_and_not_repeated(key, recipe, tmp_path, capsys):
    section, _, name = key.partition(".")
    content = yaml.safe_load((recipe / "recipe.yaml").read_text())
    content.setdefault(section, {})[name] = MISPLACED[key]
    (recipe / "recipe.yaml").write_text(yaml.safe_dump(content))
    line = refused(capsys, "ppo", recipe, tmp_path)
    assert "recipe.yaml: `" + key in line
    assert "HF_TOKEN" in line
    assert VALUE not in line


@pytest.mark.parametrize("key", ["ppo.hub_token", "sft.hub_token", "run.hf_token"])
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(key, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("ppo", tiny, tmp_path, f"--{key}", VALUE)
    assert stop.value.code == 2
    error = capsys.readouterr()
    assert f"--{key}: `{key}`: a secret belongs neither into a recipe nor on a command line" in error.err
    assert VALUE not in error.err + error.out
    assert not (tmp_path / "outputs").exists()


def test_secrets_in_a_cycle_of_aliases(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {path: x, architecture: &a {b: [*a], token: t}}\nreward: {adapter: y}\n")
    with pytest.raises(RecipeError, match="anchors and aliases"):
        load_recipe(tmp_path)


def test_what_looks_like_a_secret_among_trls_fields_is_one():
    for row in TRAINED.values():  # PPO's and A2C's settings are our own
        assert set(filter(keys.SECRET.search, row.fields)) == (set() if row.online else {"hub_token"})  # and not eos_token
    assert "hub_token" not in help_text("sft", "") + help_text("ppo", "")


# --- markup ------------------------------------------------------------------------------------------------------

EVIL = (
    "<script>alert(1)</script> | `tick` ``` ![x](javascript:alert(1)) [y](javascript:alert(2)) <javascript:alert(3)>\n"
    "\n# head\n<img src=x onerror=alert(4)> <b>bold</b> &lt;i&gt; **strong** ~~gone~~ \\| $x$\r\n---\n[z]: javascript:alert(5)"
)


class Rendered(HTMLParser):
    """Tags, attributes that could do something, and the text of every cell of a page."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.cells, self.in_cell = set(), [], [], False
        self.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag in ("td", "th"):
            self.cells.append("")
            self.in_cell = True
        if tag == "br" and self.in_cell:
            self.cells[-1] += "\n"

    def handle_endtag(self, tag):
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, text):
        if self.in_cell:
            self.cells[-1] += text


def as_shown(text: str) -> str:
    return re.sub(r"\r\n|\r", "\n", text)


def test_model_output_is_text_in_a_model_card():
    """As a Markdown renderer that lets HTML through sees it."""
    from rlhf_recipes.runs.folder import Run, _model_card

    assert {"script", "img", "code", "b", "s", "strong", "h1"} <= Rendered(f"x {EVIL}").tags  # the renderer obeys
    row = {"prompt": EVIL, "reference": EVIL, "policy": EVIL, "reference_reward": 1.0, "policy_reward": 2.0, "policy_gold": 3.0}
    card = Run(load_recipe(ROOT / "recipes/imdb"), "ppo", Path("x"), True)
    summary = {"policies": [EVIL, "```\n<script>alert(6)</script>"]}
    page = Rendered(_model_card(card, summary, markdown_samples([row, row])))
    assert page.tags <= {"hr", "h1", "h2", "p", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert {name for name, _ in page.attributes} <= {"class"}  # language-json
    assert page.cells[:3] == ["prompt", "reference", "policy"]
    assert page.cells[3] == as_shown(EVIL)
    assert page.cells[5] == as_shown(EVIL) + "\n(reward 2.00, gold 3.00)"
    assert len(page.cells) == 9


def test_a_strangers_run_is_text_in_the_card_of_a_merged_model(tmp_path):
    """scripts/merge.py copies from the folder of the adapter."""
    from rlhf_recipes.publish import card

    source = "a: 1\n```\n<script>alert(6)</script>\n````\n~~~\n# head"
    (tmp_path / "recipe.resolved.yaml").write_text(source)
    judged = {"reward": 1.0, "kl": 2.0}
    summary = {"stage": EVIL, "seed": EVIL, "prompts": EVIL, "reference": judged, "policy": judged}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    recipe = load_recipe(ROOT / "recipes/imdb", {"run.output": str(tmp_path)})
    text = card(recipe, tmp_path, {"difference": 0.0, "kl": 0.0})
    page = Rendered(text)
    assert page.tags <= {"hr", "h1", "h2", "p", "ul", "li", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert page.cells[0] == f"{as_shown(EVIL)} held-out prompts"
    assert f"\n`````yaml\n{source}\n`````\n" in text


NAME = f"mine {EVIL}"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report whose prompts, completions, findings and policies' names are evil."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_report, "EVIL", EVIL)
        folder = test_report.write_evaluation(tmp_path_factory.mktemp("evil") / "toy")
    for file in (folder / "evaluation.json", folder / "samples.jsonl"):
        file.write_text(file.read_text().replace(test_report.FOREIGN, json.dumps(NAME)[1:-1]))
    return load_report_data(folder)


def test_model_output_is_text_in_report_md(report):
    page = Rendered(render_markdown(report))
    assert page.tags <= {"h1", "h2", "p", "img", "table", "thead", "tbody", "tr", "th", "td", "br"}
    plots = {"frontier.png", "gold.png", "watch.png", "curves.png"}
    assert {value for name, value in page.attributes if name == "src"} == plots
    assert {name for name, _ in page.attributes} <= {"src", "alt"}
    assert {as_shown(EVIL), as_shown(NAME)} <= set(page.cells)
    assert f"{as_shown(EVIL)}\n(reward 0.10, gold 0.50)" in page.cells


def test_model_output_is_text_in_report_html(report):
    text = render_html(report)
    page = test_report.Page(text)
    assert len(page.scripts) == text.count("<script") == text.count("</script") == 2
    content = json.loads(page.scripts[0])
    assert content["samples"][0]["prompt"] == EVIL
    assert content["samples"][0]["sides"][1]["text"] == EVIL
    assert NAME in json.loads(re.search(r"const colours = (.*);", page.scripts[1])[1])
    assert NAME in [cells[0][0] for cells in page.rows if cells]
    for tag, attributes in page.tags:
        assert tag not in ("img", "b", "i", "a", "iframe")
        assert not {"src", "href", "onerror"} & dict(attributes).keys()


def test_a_terminal_does_not_obey_a_completion(capsys):
    text = "\x1b]0;owned\x07\x1b[2J\x9b31m [bold]text[/bold] \r"
    print_samples([{"prompt": text, "reference": text, "policy": text, "reference_reward": 0.0, "policy_reward": 0.0}])
    out = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)
    assert out.count("[bold]") == 3
