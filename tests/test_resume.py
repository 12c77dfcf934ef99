"""Nothing lost: every stage is resumed bit for bit, from the newest checkpoint that is whole, and only as the run it was."""

import dataclasses
import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from rlhf_recipes import interrupts
from rlhf_recipes.recipe.errors import RecipeError, StoppedError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.runs.checkpoints import checkpoints_of, damage, prune, write_checkpoint
from rlhf_recipes.runs.resume import resumed_recipe
from rlhf_recipes.runs.trainer import Keeper

ROOT = Path(__file__).resolve().parent.parent
COMPARED = ("adapter_model.safetensors", "adapter/adapter_model.safetensors", "model/model.safetensors", "value.safetensors",
            "metrics.jsonl", "samples.jsonl", "pairs.jsonl", "pairs-2.jsonl")  # fmt: skip
# every kind of state: an adaptive beta, a reference that follows, normalised rewards, the best so far, several passes of data
PPO = ["--ppo.total_episodes=88", "--ppo.save_steps=2", "--ppo.eval_strategy=steps", "--ppo.eval_steps=3",
       "--ppo.kl_target=0.5", "--ppo.kl_horizon=50", "--ppo.reference=sync", "--ppo.reference_sync_steps=3",
       "--ppo.metric_for_best_model=objective", "--ppo.load_best_model_at_end=true", "--reward.normalize=true",
       "--ppo.num_mini_batches=2"]  # fmt: skip
STAGES = {  # stage -> its words, and a step at which no checkpoint is due and losses have not been logged
    "ppo": (PPO, 7),
    "ppo with its own value adapter": (["--ppo.total_episodes=40", "--ppo.save_steps=2", "--ppo.value=adapter"], 3),
    "a2c": (["--a2c.total_episodes=64", "--a2c.save_steps=3"], 5),
    "dpo": (["--dpo.rounds=2", "--dpo.save_strategy=steps", "--dpo.save_steps=2", "--dpo.logging_steps=3"], 5),
    "reward": (["--reward_training.max_steps=20", "--reward_training.save_steps=3", "--reward_training.logging_steps=7",
                "--reward_training.train_sampling_strategy=group_by_length",
                "--reward_training.remove_unused_columns=false"], 17),
    "sft": (["--sft.max_steps=15", "--sft.save_steps=4", "--sft.logging_steps=7"], 13),
    "sft of an adapter": (["--sft.from_scratch=false", "--sft.max_steps=15", "--sft.save_steps=4", "--lora.dropout=0.1"], 6),
}  # fmt: skip


class Killed(BaseException):
    """Stands for kill -9: nobody catches it."""


def run(stage, recipe, output, name, *words):
    main = importlib.import_module(f"scripts.{stage.split()[0]}").main
    return main(["--recipe", str(recipe), "--run.output", str(output), "--run.name", name, *words])


def stop_at(monkeypatch, step, action):
    """Does `action` once, at the end of the run's optimizer step (PPO: update) `step`."""
    keep = Keeper.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step + self.trainer._before == step:
            monkeypatch.setattr(Keeper, "on_step_end", keep)
            action()
        return keep(self, args, state, control, **kwargs)

    monkeypatch.setattr(Keeper, "on_step_end", on_step_end)


def killed():
    raise Killed


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same(whole, other):
    compared = [name for name in COMPARED if (whole / name).is_file()]
    assert len(compared) >= 2
    for name in compared:
        assert (other / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (other, whole))
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def whole(tiny, output):
    """stage -> the folder of a run that nobody disturbed."""

    def folder(stage):
        path = output / "tiny" / stage.split()[0] / f"whole-{stage.replace(' ', '-')}"
        if not path.exists():
            run(stage, tiny, output, path.name, *STAGES[stage][0])
        return path

    return folder


@pytest.mark.parametrize("how", [killed, terminated])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_goes_on_bit_for_bit(stage, how, tiny, output, whole, monkeypatch, capsys):
    words, step = STAGES[stage]
    undisturbed = whole(stage)
    name = f"{how.__name__}-{undisturbed.name}"
    stop_at(monkeypatch, step, how)
    with pytest.raises(Killed if how is killed else SystemExit) as stop:
        run(stage, tiny, output, name, *words)
    folder = undisturbed.with_name(name)
    newest = checkpoints_of(folder)[0]
    if how is terminated:
        assert stop.value.code == interrupts.EXIT_CODE == 75
        said = capsys.readouterr().err
        assert f"ended after step {step}, as asked; the last good checkpoint is {newest}; --resume resumes it" in said
        assert newest.name == f"checkpoint-{step}"
    else:
        assert newest.name != f"checkpoint-{step}"
    run(stage, tiny, output, "unread", "--resume", str(folder))
    assert f"resuming from {newest}" in capsys.readouterr().err
    assert_same(undisturbed, folder)


@pytest.mark.parametrize("stage", ["ppo", "dpo", "reward", "sft"])
def test_a_run_killed_after_its_last_step_is_only_judged(stage, tiny, output, whole, monkeypatch):
    undisturbed = whole(stage)
    folder = undisturbed.with_name(f"judged-{undisturbed.name}")
    shutil.copytree(undisturbed, folder, symlinks=True)
    (folder / "summary.json").unlink()
    monkeypatch.setattr(Keeper, "on_pre_optimizer_step", lambda *args, **kwargs: pytest.fail("it trained on"))
    run(stage, tiny, output, "unread", "--resume", str(folder))
    assert_same(undisturbed, folder)


def test_a_run_killed_between_rounds_keeps_its_pairs(tiny, output, whole, monkeypatch):
    from rlhf_recipes.algorithms import dpo

    undisturbed = whole("dpo")
    sample, asked = dpo.sample_pairs, []

    def once(policy, roles, prompts, run, name="pairs.jsonl", seed=0):
        asked.append(name)
        if asked == ["pairs.jsonl", "pairs-2.jsonl"]:
            raise Killed
        return sample(policy, roles, prompts, run, name, seed)

    monkeypatch.setattr(dpo, "sample_pairs", once)
    with pytest.raises(Killed):
        run("dpo", tiny, output, "between", *STAGES["dpo"][0])
    run("dpo", tiny, output, "unread", "--resume", str(undisturbed.with_name("between")))
    assert asked[2:] == ["pairs.jsonl", "pairs-2.jsonl"]
    assert_same(undisturbed, undisturbed.with_name("between"))


# --- damaged checkpoints -----------------------------------------------------------------------------------------


def truncated(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "adapter_model.safetensors has "


def tampered(folder):
    file = folder / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "optimizer.safetensors is not what was written"


def incomplete(folder):
    (folder / "resume.json").unlink()
    return "resume.json is missing"


def without_manifest(folder):
    (folder / "manifest.json").unlink()
    return "it has no manifest.json"


def garbled(folder):
    (folder / "manifest.json").write_text("[1")
    return "its manifest.json cannot be read"


@pytest.fixture(scope="module")
def interrupted(tiny, output):
    """A PPO run killed at its seventh update, with checkpoints 4 and 6."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 7, killed)
        with pytest.raises(Killed):
            run("ppo", tiny, output, "interrupted", *PPO)
    return output / "tiny" / "ppo" / "interrupted"


@pytest.fixture
def half_done(interrupted, tmp_path):
    folder = tmp_path / "ppo" / "half-done"
    shutil.copytree(interrupted, folder)
    return folder


@pytest.mark.parametrize("damaged", [truncated, tampered, incomplete, without_manifest, garbled])
def test_a_damaged_checkpoint_is_named_left_out_and_kept(damaged, tiny, tmp_path, half_done, whole, capsys):
    reason = damaged(half_done / "checkpoint-6")
    run("ppo", tiny, tmp_path, "unread", "--resume", str(half_done))
    said = capsys.readouterr().err
    assert f"{half_done / 'checkpoint-6'} is left out: {reason}" in said
    assert f"resuming from {half_done / 'checkpoint-4'}" in said
    assert damage(half_done / "checkpoint-6.aside-1") is not None
    assert_same(whole("ppo"), half_done)


def test_without_a_whole_checkpoint_a_run_begins_again(tiny, tmp_path, half_done, whole, capsys):
    for folder in checkpoints_of(half_done):
        truncated(folder)
    run("ppo", tiny, tmp_path, "unread", "--resume", str(half_done))
    assert "has no checkpoint yet: starting from its beginning" in capsys.readouterr().err
    assert_same(whole("ppo"), half_done)


def test_half_a_checkpoint_is_never_taken_for_one(tmp_path):
    def fill(folder):
        (folder / "a").write_text("whole")
        raise Killed

    with pytest.raises(Killed):
        write_checkpoint(tmp_path / "checkpoint-1", fill, needed=0)
    assert checkpoints_of(tmp_path) == []
    write_checkpoint(tmp_path / "checkpoint-1", lambda folder: (folder / "a").write_text("whole"), needed=0)
    assert damage(tmp_path / "checkpoint-1") is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]  # what the killed one left is gone


def test_a_full_disk_leaves_what_was_there_and_says_how_much_is_needed(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-1", lambda folder: (folder / "a").write_text("whole"), needed=0)

    def fill(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoppedError, match=r"needs about 3\.0 MiB and .* MiB are free"):
        write_checkpoint(tmp_path / "checkpoint-2", fill, needed=3 * 2**20)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert damage(tmp_path / "checkpoint-1") is None


def test_pruning_spares_the_best_and_the_last_whole_one(tmp_path):
    def made(step, best=None):
        state = json.dumps({"best_model_checkpoint": best})
        write_checkpoint(tmp_path / f"checkpoint-{step}", lambda f: (f / "trainer_state.json").write_text(state), needed=0)

    def there():
        return sorted(p.name for p in tmp_path.iterdir())

    for step in (2, 9, 10):
        made(step)
    prune(tmp_path, None, None)
    assert len(there()) == 3
    prune(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    assert there() == ["checkpoint-10", "checkpoint-2"]
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("torn")
    prune(tmp_path, 1, None)
    assert there() == ["checkpoint-10", "checkpoint-2"]  # the only whole one
    made(12, best="elsewhere/best-5")
    for name in ("best-5", "best-11", "best-3"):
        (tmp_path / name).mkdir()
    prune(tmp_path, 1, str(tmp_path / "best-11"))
    assert there() == ["best-11", "best-5", "checkpoint-12"]  # of the run as it is now, and of the checkpoint


# --- which run is resumed ---------------------------------------------------------------------------------------


def refused(capsys, stage, recipe, output, *words):
    with pytest.raises(SystemExit) as stop:
        run(stage, recipe, output, "unread", *words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_changed_keys_are_listed_or_refused(tiny, tmp_path, half_done, whole, capsys):
    said = refused(capsys, "ppo", tiny, tmp_path, "--resume", str(half_done), "--ppo.learning_rate=1e-2", "--lora.r=8")
    assert "would be another run: `lora.r` 4 -> 8, `ppo.learning_rate` 0.001 -> 0.01" in said
    run("ppo", tiny, tmp_path, "unread", "--resume", str(half_done), "--ppo.save_steps=5", "--dpo.learning_rate=1")
    said = capsys.readouterr().err
    assert "changed: `ppo.save_steps` 2 -> 5.0, `dpo.learning_rate` 0.001 -> 1.0" in said.replace("2.0 ->", "2 ->")
    assert "other than the recipe and command line now: " in said
    assert "`ppo.reference` 'sync'" in said
    assert_same(whole("ppo"), half_done)


def test_what_cannot_go_on_says_why(tiny, tmp_path, half_done, whole, capsys):
    assert "no such run; there is no run of ppo in" in refused(capsys, "ppo", tiny, tmp_path, "--resume")
    assert "runs of ppo in" in refused(capsys, "ppo", tiny, whole("ppo").parent.parent.parent, "--resume", "nowhere")
    assert "is finished" in refused(capsys, "ppo", tiny, tmp_path, "--resume", str(whole("ppo")))
    assert "not a run's folder" in refused(capsys, "ppo", tiny, tmp_path, "--resume", str(tmp_path))
    assert "is a run of ppo, not of a2c" in refused(capsys, "a2c", tiny, tmp_path, "--resume", str(half_done))
    assert "evaluate writes nothing before its end" in refused(capsys, "evaluate", tiny, tmp_path, "--resume")
    said = refused(capsys, "ppo", tiny, tmp_path, "--resume", str(half_done / "checkpoint-4"))
    assert "checkpoint-6 has 2 steps more, which would be lost" in said
    truncated(half_done / "checkpoint-6")
    said = refused(capsys, "ppo", tiny, tmp_path, "--resume", str(half_done / "checkpoint-6"))
    assert "checkpoint-6 is damaged" in said
    assert f"the newest whole one is {half_done / 'checkpoint-4'}" in said


def test_another_number_of_processes_is_refused(tiny, tmp_path, half_done, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = load_recipe(tiny, {"run.resume": str(half_done)})
    with pytest.raises(Exception, match="was written by 1 processes and this job has 2"):
        resumed_recipe(recipe, "ppo", {})


def test_a_task_that_has_changed_is_said(tiny, half_done, tmp_path):
    about = json.loads((half_done / "run.json").read_text())
    (half_done / "run.json").write_text(json.dumps(about | {"task": "another"}))
    _, notes = resumed_recipe(load_recipe(tiny, {"run.resume": str(half_done)}), "ppo", {})
    assert any("task.py has changed since the run was started" in note for note in notes)


def test_weights_that_have_changed_are_refused_and_functions_said(tiny, half_done, tmp_path):
    recipe, file = load_recipe(tiny, {"run.resume": str(half_done)}), half_done / "run.json"
    about = json.loads(file.read_text())
    for part, change in (
        ("reward", {"content": "another"}),
        ("backbone", {"content": "another"}),
    ):
        parts = json.loads(json.dumps(about["fingerprint"]["parts"]))
        (parts["reward"]["terms"][0] if part == "reward" else parts[part]).update(change)
        file.write_text(json.dumps(about | {"fingerprint": {"parts": parts}}))
        with pytest.raises(RecipeError, match=rf"would be another run: the {part} .*\(another\), and now \("):
            resumed_recipe(recipe, "ppo", {})
    resolved = half_done / "recipe.resolved.yaml"
    changed = resolved.read_text().replace("adapter: checkpoints/reward", "adapter: null")
    changed = changed.replace("read_eos: false", "read_eos: true")
    resolved.write_text(changed.replace("function: null", "function: wordy"))
    parts["backbone"] = about["fingerprint"]["parts"]["backbone"]
    parts["reward"]["terms"] = [{"kind": "function", "path": "wordy", "content": "another", "weight": 1.0}]
    file.write_text(json.dumps(about | {"fingerprint": {"parts": parts}}))
    _, notes = resumed_recipe(recipe, "ppo", {})
    assert any(re.match(r"warning: the reward function wordy.* \(another\), and now \(", note) for note in notes)


def test_two_processes_never_write_into_one_run(tiny, tmp_path, half_done, capsys):
    before = {p: p.stat().st_size for p in half_done.rglob("*") if p.is_file()}
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('locked', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, half_done / ".lock"], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        assert "another process is at work" in refused(capsys, "ppo", tiny, tmp_path, "--resume", str(half_done))
        other.communicate("\n")
    assert {p: p.stat().st_size for p in half_done.rglob("*") if p.is_file()} == before
    with FileLock(half_done / ".lock", timeout=0):  # dead processes hold none
        pass


# --- signals and faults ------------------------------------------------------------------------------------------


def test_a_second_signal_exits_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with interrupts.handled(), interrupts.training():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.requested()
        assert ended == []
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]
    with pytest.raises(interrupts.Interrupted), interrupts.handled():  # outside of a training run there is nothing to wait for
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_sampling_pairs_ends_with_the_same_code_and_goes_on(tiny, output, whole, monkeypatch):
    from rlhf_recipes.algorithms import pairs

    label = pairs.label_pairs
    monkeypatch.setattr(pairs, "label_pairs", lambda *args: (terminated(), label(*args))[1])
    with pytest.raises(SystemExit) as stop:
        run("dpo", tiny, output, "sampling", *STAGES["dpo"][0])
    assert stop.value.code == interrupts.EXIT_CODE
    monkeypatch.undo()
    run("dpo", tiny, output, "unread", "--resume", str(whole("dpo").with_name("sampling")))
    assert_same(whole("dpo"), whole("dpo").with_name("sampling"))


def spoiled(monkeypatch, steps):
    """Makes the gradient of the optimizer steps numbered `steps` infinite, before the guard looks at it."""
    guard, count = Keeper.on_pre_optimizer_step, iter(range(1, 1000))

    def on_pre_optimizer_step(self, *args, **kwargs):
        before = [p.detach().clone() for group in self.trainer.optimizer.param_groups for p in group["params"]]
        if spoil := next(count) in steps:
            self.trainer.optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
        guard(self, *args, **kwargs)
        self.trainer.optimizer.step()
        after = [p for group in self.trainer.optimizer.param_groups for p in group["params"]]
        moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert moved != spoil

    monkeypatch.setattr(Keeper, "on_pre_optimizer_step", on_pre_optimizer_step)


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(stage, tiny, tmp_path, monkeypatch, capsys):
    spoiled(monkeypatch, {2})
    words = {"ppo": ["--ppo.total_episodes=24", "--ppo.num_ppo_epochs=1"], "dpo": []}[stage]
    run(stage, tiny, tmp_path, "spoiled", *words)
    assert "step 2: a gradient is not finite; this optimizer step is left out" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "tiny" / stage / "spoiled" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "objective/kl" in line or "rewards/margins" in line]
    assert [line.get("skipped_steps", 0) for line in steps[:3]] == [0, 1, 1]
    weights = load_file(tmp_path / "tiny" / stage / "spoiled" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_too_many_of_them_stop_the_run_and_leave_the_batch(stage, tiny, tmp_path, monkeypatch, capsys):
    spoiled(monkeypatch, {3, 4, 5})
    words = {"ppo": ["--ppo.total_episodes=48", "--ppo.num_ppo_epochs=1"], "dpo": ["--dpo.save_strategy=steps"]}[stage]
    with pytest.raises(SystemExit) as stop:
        run(stage, tiny, tmp_path, "spoiled", *words, f"--{stage}.save_steps=1", "--run.max_skipped_steps=3")
    assert stop.value.code == 3
    folder = tmp_path / "tiny" / stage / "spoiled"
    said = capsys.readouterr().err
    assert "3 optimizer steps in a row had a gradient that is not finite" in said
    assert f"the last good checkpoint is {folder / 'checkpoint-2'}" in said
    batch = load_file(folder / "failed_batch-5-0.safetensors")
    assert all(len(tensor) for tensor in batch.values())
    assert {"query_responses", "logprobs"} <= batch.keys() or "input_ids" in batch


def test_a_full_disk_stops_a_real_run_and_making_room_lets_it_go_on(tiny, tmp_path, whole):
    """On a tmpfs of its own, in a namespace of its own."""
    probe = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs tmpfs {tmp_path}"]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    words = " ".join(["--recipe", str(tiny), "--run.name", "full", "--run.output", f"{tmp_path}/outputs", *PPO])
    script = f"""
        mount -t tmpfs -o size=4m tmpfs {tmp_path}
        {sys.executable} scripts/ppo.py {words} & pid=$!
        until [ -d {tmp_path}/outputs/tiny/ppo/full/checkpoint-2 ]; do sleep 0.01; done
        kill -STOP $pid; dd if=/dev/zero of={tmp_path}/filler bs=1k 2>/dev/null; kill -CONT $pid
        wait $pid; echo "code $?"
        rm {tmp_path}/filler
        {sys.executable} scripts/ppo.py {words} --resume {tmp_path}/outputs/tiny/ppo/full
        sha256sum {tmp_path}/outputs/tiny/ppo/full/*.safetensors
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "code 3" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert "the disk is full" in done.stderr
    sums = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(".safetensors")]
    expected = subprocess.run(
        ["sha256sum", *sorted(whole("ppo").glob("*.safetensors"))], capture_output=True, text=True, check=True
    )
    assert sums == [line.split()[0] for line in expected.stdout.splitlines()]


def test_wandb_failing_in_the_middle_of_a_run_does_not_stop_it(tiny, tmp_path, monkeypatch, capsys):
    import wandb

    class Broken:
        logged = 0

        def log(self, metrics, step=None):
            self.logged += 1
            if self.logged > 1:
                raise ConnectionError("the network is down")

    broken, started = Broken(), {}
    monkeypatch.setattr(wandb, "init", lambda **kwargs: started.update(kwargs) or broken)
    run("ppo", tiny, tmp_path, "it", "--run.tracker=wandb", "--ppo.total_episodes=32")
    assert capsys.readouterr().err.count("wandb: the network is down; continuing without it") == 1
    folder = tmp_path / "tiny/ppo/it"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5
    assert started["id"] == json.loads((folder / "run.json").read_text())["wandb"]
    (folder / "summary.json").unlink()
    run("ppo", tiny, tmp_path, "it", "--run.tracker=wandb", "--resume", str(folder))
    assert started["id"] == json.loads((folder / "run.json").read_text())["wandb"]


def test_every_field_of_the_recipe_is_free_or_belongs_to_the_run(tiny):
    """A section that is new has to be thought of in resume.py."""
    from rlhf_recipes.runs.resume import _is_free

    recipe = load_recipe(tiny)
    free = {f.name for f in dataclasses.fields(recipe) if f.name not in ("folder", "stages") and _is_free(f"{f.name}.x", "ppo")}
    assert free == {"run", "evaluate", "watch", "report", "merge"}
    assert not _is_free("run.seed", "ppo")
    assert _is_free("sft.learning_rate", "ppo")
    assert not _is_free("ppo.learning_rate", "ppo")
