"""Each script, run: in this process for two steps, and once by a real `accelerate launch`."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def run(stage, recipe, tmp_path, *words):
    return importlib.import_module(f"scripts.{stage}").main(
        ["--recipe", str(recipe), "--run.output", str(tmp_path / "outputs"), "--run.name", "it", *words]
    )


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_sft_trains_a_backbone_the_next_stage_loads(tiny, tmp_path):
    summary = run("sft", tiny, tmp_path)
    folder = tmp_path / "outputs/tiny/sft/it"
    assert summary["eval_perplexity"] == pytest.approx(math.exp(summary["eval_loss"]))
    assert json.loads((folder / "summary.json").read_text()) == summary
    again = run("sft", tiny, tmp_path, "--sft.from_scratch=false", "--model.path", str(folder / "model"), "--run.name=2")
    assert again["train_rows"] == 48
    first, second = (load_file(f / "model/model.safetensors") for f in (folder, folder.with_name("2")))
    samples = lines(folder / "samples.jsonl")
    assert len(samples) == 2
    assert all(row["prompt"] and isinstance(row["completion"], str) for row in samples)
    assert first.keys() == second.keys()  # merged: a plain model again
    assert not all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    "generation", [{"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "pad_token_id": -1, "length_penalty": 2.0}]
)
def test_sft_saves_a_backbone_whose_generation_config_is_as_published_ones_are(generation, tiny, tmp_path):
    """A temperature without `do_sample`, which transformers loads and would not save."""
    place = shutil.copytree(tiny, tmp_path / "tiny")
    backbone = place / "checkpoints" / "backbone"
    eos = json.loads((backbone / "config.json").read_text())["eos_token_id"]
    (backbone / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [eos, 5]}))
    run("sft", place, tmp_path, "--sft.from_scratch=false")
    saved = json.loads((tmp_path / "outputs/tiny/sft/it/model/generation_config.json").read_text())
    assert saved["eos_token_id"] == [eos, 5] or saved["eos_token_id"] == eos  # a Trainer's own end, where it sets one
    assert saved.get("temperature") == (0.6 if "top_p" in generation else None)
    assert saved.get("do_sample", False) is ("top_p" in generation)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_batch_that_is_never_full_is_refused(stage, tiny, tmp_path, capsys):
    section = "reward_training" if stage == "reward" else stage
    words = ["--preferences.source=task"] if stage == "dpo" else []
    with pytest.raises(SystemExit):
        run(
            stage,
            tiny,
            tmp_path,
            f"--{section}.dataloader_drop_last=true",
            f"--{section}.per_device_train_batch_size=49",
            *words,
        )
    rows = 46 if stage == "dpo" else 48  # two are too long
    assert f"dataloader_drop_last`: the {rows} rows are less than one batch of 49" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_held_out_rows_are_all_counted_where_training_drops_its_last_batch(tiny, tmp_path):
    one_batch = "--sft.per_device_eval_batch_size=64"  # 48 rows
    dropping = run("sft", tiny, tmp_path, one_batch, "--sft.dataloader_drop_last=true")
    assert dropping["eval_loss"] == pytest.approx(run("sft", tiny, tmp_path, one_batch, "--run.name=2")["eval_loss"])


def test_reward_adapter_learns_and_leaves_the_backbone_alone(tiny, tmp_path):
    before = load_file(tiny / "checkpoints/backbone/model.safetensors")
    summary = run("reward", tiny, tmp_path, "--reward_training.max_steps=60", "--reward_training.learning_rate=1e-2")
    assert summary["eval_accuracy"]["all"] > 0.9  # good words against bad words
    assert summary["eval_accuracy"]["8 words"] == summary["eval_accuracy"]["all"]
    adapter = load_file(tmp_path / "outputs/tiny/reward/it/adapter/adapter_model.safetensors")
    assert {name.split(".")[-1] for name in adapter} == {"weight"}
    assert all("lora_" in name or name.endswith("score.weight") for name in adapter)
    after = load_file(tiny / "checkpoints/backbone/model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_ppo_writes_what_it_promises(tiny, tmp_path):
    summary = run("ppo", tiny, tmp_path)
    folder = tmp_path / "outputs/tiny/ppo/it"
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "value.safetensors", "README.md", "recipe.resolved.yaml",
        "metrics.jsonl", "timing.jsonl", "samples.jsonl", "summary.json", "run.json", "checkpoint-2",
    }  # fmt: skip
    assert (folder.parent / "latest").resolve() == folder.resolve()
    assert set(summary) == {"task", "stage", "seed", "beta", "seconds", "prompts", "reference", "policy", "findings"}
    judged = {"reward", "gold", "objective", "length", "distinct_2", "repetition", "truncated", "entropy"}
    assert set(summary["reference"]) == judged
    assert set(summary["policy"]) == judged | {"kl"}
    for side in ("reference", "policy"):
        kl = summary[side].get("kl", 0.0)
        assert summary[side]["objective"] == pytest.approx(summary[side]["reward"] - summary["beta"] * kl)
    samples = lines(folder / "samples.jsonl")
    assert len(samples) == summary["prompts"] == 8
    mean = sum(row["policy_reward"] for row in samples) / len(samples)
    assert mean == pytest.approx(summary["policy"]["reward"], abs=1e-5)
    steps = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert steps[0]["objective/kl"] == 0.0  # the policy starts at the reference
    assert steps[0]["episode"] == 8
    assert steps[1]["objective/kl"] != 0.0
    assert steps[2]["eval/objective"] == summary["policy"]["objective"]


def test_ppo_twice_is_bit_identical(tiny, tmp_path):
    for name in ("a", "b"):
        run("ppo", tiny, tmp_path, f"--run.name={name}")
    a, b = (tmp_path / "outputs/tiny/ppo" / name for name in ("a", "b"))
    for file in ("metrics.jsonl", "samples.jsonl", "adapter_model.safetensors", "value.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    run("ppo", tiny, tmp_path, "--run.name=c", "--run.seed=1")
    assert (a / "metrics.jsonl").read_bytes() != (a.with_name("c") / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_is_never_overwritten(stage, tiny, tmp_path, capsys):
    run(stage, tiny, tmp_path)
    before = (tmp_path / f"outputs/tiny/{stage}/it/metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(stage, tiny, tmp_path)
    assert stop.value.code == 2
    assert "choose another `--run.name`" in capsys.readouterr().err
    assert (tmp_path / f"outputs/tiny/{stage}/it/metrics.jsonl").read_bytes() == before


RECORDED = {  # stage -> what its wandb run holds, beside its summary
    "sft": ["loss", "eval_perplexity"],
    "reward": ["loss", "eval_accuracy"],
    "preferences": ["label_agreement"],
    "ppo": ["objective/kl", "eval/objective", "samples"],
    "a2c": ["objective/kl", "eval/objective", "samples"],
    "dpo": ["rewards/margins", "eval/objective", "samples"],
    "evaluate": ["samples"],
}


@pytest.mark.parametrize(
    "stage", [s if s in ("ppo", "evaluate") else pytest.param(s, marks=pytest.mark.slow) for s in RECORDED]
)
def test_accelerate_launch_with_an_offline_wandb_run(stage, tiny, tmp_path):
    """A home without any login or accelerate config, standard input closed: no question, exit code 0, an offline run."""
    home = tmp_path / "home"
    home.mkdir()
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "ACCELERATE", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", f"scripts/{stage}.py", "--recipe", tiny,
         "--run.output", tmp_path / "outputs", "--run.name", "it", "--run.tracker", "wandb"],
        cwd=ROOT, env=keep | {"HOME": str(home)}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb:") == 1
    assert "not logged in, so this run is offline" in done.stdout
    folder = tmp_path / "outputs/tiny" / stage / "it"
    assert (folder / "summary.json").is_file()
    [log] = folder.glob("wandb/offline-run-*/run-*.wandb")
    recorded = log.read_bytes()
    for word in RECORDED[stage]:
        assert word.encode() in recorded, word


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_the_benchmark_measures_both_sides(kind, tiny, tmp_path, capsys):
    from benchmarks import compare

    file = tmp_path / "figures.json"
    model = tiny / "checkpoints" / "backbone"
    words = [
        "--model",
        model,
        "--kinds",
        kind,
        "--batch",
        4,
        "--runs",
        1,
        "--updates",
        1,
        "--threads",
        1,
        "--json",
        file,
    ]
    compare.main(list(map(str, words)))
    figures = json.loads(file.read_text())
    assert list(figures) == [{"ppo": "backbone", "dpo": "backbone-dpo"}[kind]]
    for name, result in figures.items():
        for side in ("ours", "stock", "stock_onednn"):
            assert result[side]["samples_per_second"] == pytest.approx(4 / result[side]["seconds"])
            assert sum(result[side]["phases"].values()) == pytest.approx(result[side]["seconds"], rel=0.05)
        for number in ("samples_per_second", "peak_memory_mb"):
            assert result["ratio"][number] == pytest.approx(result["ours"][number] / result["stock"][number])
        assert (result["floor_ratio"] is None) == (name == "backbone-dpo")
    assert capsys.readouterr().out.count("ours : stock") == 1
    with pytest.raises(SystemExit) as stop:
        compare.main(["--json", str(file)])
    assert stop.value.code == 2
