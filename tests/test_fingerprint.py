"""What a run maximised: what counts, what does not, and how a difference is told."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.runs.fingerprint import another_backbone, differences, fingerprint, recorded_fingerprint, source_hash


@pytest.fixture
def mine(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "mine")


def of(folder, stage="ppo", **overrides):
    return fingerprint(load_recipe(folder, {key.replace("__", "."): value for key, value in overrides.items()}), stage)


def change_weights(file):
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})


def test_a_copy_of_the_folder_maximises_the_same_and_what_is_irrelevant_does_not_count(tiny, mine):
    assert of(tiny)["hash"] == of(mine)["hash"] == of(mine, ppo__learning_rate=1.0, run__seed=3, evaluate__prompts=4)["hash"]
    shutil.move(mine / "checkpoints/reward", mine / "checkpoints/moved")
    moved = of(mine, reward__adapter="checkpoints/moved")
    assert moved["hash"] == of(tiny)["hash"]
    assert differences(of(tiny), moved) == {}
    (mine / "task.py").write_text((mine / "task.py").read_text() + "\n# a remark\n")
    assert differences(of(tiny), moved) == {}  # of the function's source, not of the file


@pytest.mark.parametrize(
    ("overrides", "part", "words"),
    [
        ({"objective__beta": 0.5}, "beta", "beta 0.05, and here 0.5"),
        ({"reward__clip": 3}, "reward", "adapter checkpoints/reward, and here adapter checkpoints/reward, clip 3"),
        ({"reward__read_eos": True}, "reward", "adapter checkpoints/reward"),
        ({"reward__adapter": None, "reward__read_eos": True, "reward__function": "wordy"}, "reward", "and here function wordy"),
        ({"reward__adapter": None, "reward__read_eos": True, "reward__terms": [
            {"adapter": "checkpoints/reward", "read_eos": False}, {"function": "wordy", "weight": 0.5}]}, "reward",
         "the reward adapter checkpoints/reward, and here adapter checkpoints/reward + 0.5 x function wordy"),
        ({"sampling__temperature": 0.7}, "sampling", "temperature 1.0, and here 0.7"),
        ({"data__max_completion_tokens": 5}, "sampling", "max_completion_tokens 6, and here 5"),
    ],
)  # fmt: skip
def test_a_difference_is_named(overrides, part, words, tiny):
    found = differences(of(tiny), of(tiny, **overrides))
    assert list(found) == [part]
    assert words in found[part]
    assert of(tiny)["hash"] != of(tiny, **overrides)["hash"]


@pytest.mark.parametrize(("folder", "part"), [("reward", "reward"), ("backbone", "backbone")])
def test_other_weights_at_the_same_place_are_another_thing(folder, part, tiny, mine):
    [file] = (mine / "checkpoints" / folder).glob("*.safetensors")
    change_weights(file)
    found = differences(of(tiny), of(mine))
    assert list(found) == [part]
    assert f"{part} " in found[part]
    assert f"checkpoints/{folder} (" in found[part]  # with the contents, since the words are the same


def test_large_files_are_told_apart_by_samples(tmp_path, monkeypatch):
    from rlhf_recipes.runs import fingerprint as module

    monkeypatch.setattr(module, "_READ_WHOLE", 1000)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        weights = torch.randn(200, 100, generator=torch.Generator().manual_seed(seed))
        save_file({"w": weights}, tmp_path / name / "model.safetensors")
    a, b, c = (module.weights_hash(tmp_path / name) for name in "abc")
    assert a == b != c
    assert module.weights_hash(tmp_path / "none") is None


def test_a_function_is_its_source_and_what_it_names(tmp_path):
    file = tmp_path / "task.py"
    text = "WORDS = ['a']\ndef count(text): return text.count(WORDS[0])\ndef reward(p, c): return [count(x) for x in c]\n"
    file.write_text(text + "def other(p, c): return c\n")
    before = source_hash(file, "reward")
    file.write_text("# hello\n" + text.replace("return [count", "return [  count") + "def other(p, c): return p\n")
    assert source_hash(file, "reward") == before
    file.write_text(text.replace("'a'", "'b'"))
    assert source_hash(file, "reward") != before
    file.write_text("from elsewhere import reward\n")
    assert source_hash(file, "reward") is not None


def test_an_older_run_is_known_by_its_resolved_recipe(tiny, tmp_path):
    run = tmp_path / "ppo" / "it"
    run.mkdir(parents=True)
    (run / "recipe.resolved.yaml").write_text(load_recipe(tiny, {"objective.beta": 0.3}).to_yaml())
    (run / "run.json").write_text(json.dumps({"stage": "ppo", "task": "x"}))
    recorded = recorded_fingerprint(run / "checkpoint-2")  # one inside it
    assert recorded["derived"]
    assert differences(recorded, of(tiny)) == {"beta": "beta 0.3, and here 0.05"}
    (run / "run.json").write_text(json.dumps({"stage": "ppo", "fingerprint": of(tiny)}))
    assert recorded_fingerprint(run) == of(tiny)
    assert recorded_fingerprint(tmp_path) is None
    (run / "run.json").write_text("{")
    (run / "recipe.resolved.yaml").write_text("ppo: {gone: 1}")
    assert recorded_fingerprint(run) is None  # nobody knows


def test_a_hub_id_and_a_folder_may_be_the_same_backbone(tiny):
    def on(path, content):
        return {"parts": of(tiny)["parts"] | {"backbone": {"path": path, "content": content}}}

    assert another_backbone(on("org/a", None), on("a", "1")) is None
    assert differences(on("org/a", None), on("a", "1")) == {"backbone": "the backbone org/a, and here a"}
    assert another_backbone(on("b", "1"), on("a", "1")) is None
    assert another_backbone(on("a", "2"), on("a", "1")) == "the backbone a (2), and here (1)"
    assert another_backbone(on("org/a", None), on("org/b", None)) == "the backbone org/a, and here org/b"
    assert another_backbone(None, on("a", "1")) is None


@pytest.mark.parametrize(
    "change",
    [
        {"reward": "x"}, {"reward": {"terms": "x"}}, {"reward": {"terms": [{"kind": "adapter"}]}}, {"beta": "0.1"},
        {"backbone": []}, {"backbone": {"path": "a\x9b2J"}},
        {"reward": {"terms": [{"kind": "adapter", "path": "\x1b[2J", "weight": 1}]}},
        {"reward": {"terms": [{"kind": "adapter", "path": "a", "weight": "1"}]}},
    ],
)  # fmt: skip
def test_a_strangers_record_of_another_shape_says_nothing(change, tiny, tmp_path):
    whole = of(tiny)
    named = whole["parts"] | {"backbone": {"path": "é/中文", "content": None}}
    for parts, known in ((whole["parts"], True), (named, True), (whole["parts"] | change, False)):
        (tmp_path / "run.json").write_text(json.dumps({"stage": "ppo", "fingerprint": {"parts": parts}}))
        assert bool(recorded_fingerprint(tmp_path)) == known


def test_a_task_that_begins_with_a_byte_order_mark_is_read(mine):
    source = (mine / "task.py").read_bytes()
    known = source_hash(mine / "task.py", "wordy")
    (mine / "task.py").write_bytes(b"\xef\xbb\xbf" + source.replace(b"\n", b"\r\n"))  # as Windows' editors write it
    assert known is not None
    assert source_hash(mine / "task.py", "wordy") == known
