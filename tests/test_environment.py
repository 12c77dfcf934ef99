"""What the machine and its environment say is obeyed, or named in one line."""

import errno
import fcntl
import importlib
import io
import json
import os
import py_compile
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import datasets
import pytest

from rlhf_recipes import environment, process
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.sections import RunSection, followed
from rlhf_recipes.runs import folder, trackers
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.trackers import TRACKERS, Tracked, Trackers, _project
from rlhf_recipes.tasks import load_dataset, load_task

ROOT = Path(__file__).resolve().parent.parent


def run(stage, recipe, output, *words):
    return importlib.import_module(f"scripts.{stage}").main(["--recipe", str(recipe), f"--run.output={output}", *words])


def test_no_cache_is_read_or_left_in_a_recipes_folder(tiny, tmp_path, monkeypatch):
    """Nor of what task.py imports from there, at once or later, be it a module or a package."""
    folder = tmp_path / "mine"
    (folder / "helpers" / "deep").mkdir(parents=True)
    (folder / "recipe.yaml").write_text((tiny / "recipe.yaml").read_text())
    for name in ("helpers/__init__.py", "helpers/deep/__init__.py"):
        (folder / name).write_text("")
    (folder / "helpers/deep/words.py").write_text("GOOD = ['great']\n")
    (folder / "later.py").write_text("WORD = 'fine'\n")
    (folder / "task.py").write_text(
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent))\n"
        "from helpers.deep.words import GOOD\n\ndef word():\n    import later\n    return later.WORD\n"
    )
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    task = load_task(folder)
    assert (task.GOOD, task.word()) == (["great"], "fine")
    assert not list(folder.rglob("__pycache__"))
    for name in ("helpers", "helpers.deep", "helpers.deep.words", "later"):
        del sys.modules[name]

    file = folder / "later.py"
    py_compile.compile(str(file), doraise=True)  # somebody else's cache, of an older text with the same time and size
    time = file.stat().st_mtime_ns
    file.write_text("WORD = 'dull'\n")
    os.utime(file, ns=(time, time))
    assert task.word() == "dull"
    del sys.modules["later"]


# --- terminals, pipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_what_a_terminal_cannot_show_is_replaced(encoding, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    environment.prepare()
    print("│ naïve 😀")
    sys.stdout.flush()
    assert shown.getvalue() in (b"? na\xefve ?\n", b"? na?ve ?\n")


COMMANDS = {
    "help": ["scripts/ppo.py", "--help"],
    "dry run": ["scripts/ppo.py", "--dry-run"],
    "check's help": ["-m", "rlhf_recipes", "--help"],
    "sweep": ["scripts/sweep.py", "recipes/imdb/sweep.yaml", "--dry-run"],
    "sweep's help": ["scripts/sweep.py", "--help"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_has_read_enough_ends_nothing(words):
    """`... | head -0`, to a terminal that is not UTF-8, with everything written at once."""
    reader, writer = os.pipe()
    os.close(reader)
    settings = {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | settings, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr.replace(b"\r", b"").strip()) == (0, b"")


# --- file systems --------------------------------------------------------------------------------------------------


def no_links(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)


def test_without_symbolic_links_latest_is_a_file_that_everything_follows(tiny, tmp_path, monkeypatch, capsys):
    no_links(monkeypatch)
    words = ["--ppo.eval_strategy=no"]
    run("ppo", tiny, tmp_path, "--run.name=a", *words)
    latest = tmp_path / "tiny/ppo/latest"
    assert latest.read_text() == "a\n"
    assert not latest.is_symlink()
    assert sorted(p.name for p in latest.parent.iterdir()) == ["a", "latest"]

    run("merge", tiny, tmp_path, "--run.name=m")
    assert json.loads((tmp_path / "tiny/merge/m/summary.json").read_text())["adapter"] == str(latest.with_name("a"))
    policies = f"--evaluate.policies=[mine={latest}, {latest}/checkpoint-2]"
    summary = run("evaluate", tiny, tmp_path, "--run.name=e", policies)
    assert summary["policies"] == ["reference", "mine", "a/checkpoint-2"]
    assert run("report", tiny, tmp_path)["evaluation"] == str(tmp_path / "tiny/evaluate/e")
    for given in (["--resume"], ["--resume", str(latest)], ["--resume", str(latest / "checkpoint-2")]):
        with pytest.raises(SystemExit) as stop:
            run("ppo", tiny, tmp_path, *given)
        assert stop.value.code == 2
        assert f"{latest.with_name('a')} is finished" in capsys.readouterr().err


def test_a_link_gives_way_to_a_file_and_a_file_to_a_link(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name / "deep").mkdir(parents=True)
    folder._point_latest(tmp_path / "a")
    assert followed(tmp_path / "latest" / "deep").resolve() == tmp_path / "a" / "deep"
    with monkeypatch.context() as patch:
        no_links(patch)
        folder._point_latest(tmp_path / "b")
    assert followed(tmp_path / "latest" / "deep") == tmp_path / "b" / "deep"
    folder._point_latest(tmp_path / "c")
    assert (tmp_path / "latest").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "latest"]


def test_a_run_that_cannot_be_made_leaves_nothing(tiny, tmp_path, monkeypatch):
    recipe = load_recipe(tiny, {"run.output": str(tmp_path)})

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "_point_latest", full)
    with pytest.raises(OSError, match="No space"):
        Run.prepare(recipe, "ppo").start()
    assert list((tmp_path / "tiny/ppo").iterdir()) == []


def test_a_file_system_without_locks_is_said_and_the_run_begins(tiny, tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")  # NFS without its lock daemon

    monkeypatch.setattr(fcntl, "flock", no_locks)
    job = Run.prepare(load_recipe(tiny, {"run.output": str(tmp_path), "run.name": "it"}), "ppo")
    job.start()
    assert "warning: " in (said := capsys.readouterr().err)
    assert "no lock can be taken there (No locks available), so nothing keeps a second process out" in said
    job.finish({})
    assert (tmp_path / "tiny/ppo/it/summary.json").is_file()


def test_runs_of_one_second_all_run(tiny, tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 1)

    monkeypatch.setattr(folder, "datetime", Clock)
    recipe = load_recipe(tiny, {"run.output": str(tmp_path)})
    jobs = [Run.prepare(recipe, "ppo") for _ in range(6)]
    assert len({job.folder for job in jobs}) == 1
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(Run.start, jobs))
    first = "20260101-000000-seed0"
    assert sorted(job.folder.name for job in jobs) == [first, *(f"{first}-{number}" for number in range(2, 7))]
    assert all((job.folder / "recipe.resolved.yaml").is_file() for job in jobs)
    assert (tmp_path / "tiny/ppo/latest").resolve() in {job.folder for job in jobs}
    assert len(list((tmp_path / "tiny/ppo").iterdir())) == 7


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_of_a_run_follows_the_umask(umask, tiny, tmp_path):
    before = os.umask(umask)
    try:
        run("ppo", tiny, tmp_path, "--run.name=it", "--ppo.save_steps=1", "--ppo.total_episodes=8", "--ppo.eval_strategy=no")
        run("merge", tiny, tmp_path, "--run.name=it")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "tiny").rglob("*") if file.is_file() and not file.is_symlink()]
    assert {"adapter_model.safetensors", "value.safetensors", "optimizer.safetensors", "model.safetensors", "summary.json"} <= {
        file.name for file in files
    }
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


# --- launchers -----------------------------------------------------------------------------------------------------

CONNECTED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "PMI_SIZE=2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
        ({**CONNECTED, "MASTER_ADDR": ""}, "WORLD_SIZE=2"),
    ],
)
def test_processes_that_no_launcher_has_connected(variables, named, tiny, monkeypatch, tmp_path, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as stop:
        run("ppo", tiny, tmp_path / "outputs")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"error: {named} in the environment" in error
    assert "launch with accelerate" in error
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "variables",
    [{}, CONNECTED, CONNECTED | {"PMI_SIZE": "2"}, {"WORLD_SIZE": "1", "RANK": "", "LOCAL_RANK": "-1"},
     {"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}],
)  # fmt: skip
def test_processes_that_are_connected_or_alone(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert list(environment.settle()) == []


def test_what_would_change_a_run_behind_its_recipe_is_named_and_set_aside(monkeypatch):
    variables = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
                 "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8", "SLURM_STEP_NUM_TASKS": "3",
                 "ACCELERATE_USE_CPU": "True"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    lines = list(environment.settle())
    assert lines == [
        "srun has started 3 tasks, and each is a run of its own; for one run: accelerate_configs/slurm.sh",
        "ACCELERATE_MIXED_PRECISION=fp16 is set aside: the recipe's `model.dtype` decides",
        "ACCELERATE_DYNAMO_BACKEND=INDUCTOR is set aside: nothing is compiled here",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8 is set aside: the stage's `gradient_accumulation_steps` decides",
    ]
    assert [os.environ[name] for name in list(variables)[:3]] == ["no", "no", "1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}.items():
        monkeypatch.setenv(name, value)  # as accelerate's launcher does
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert list(environment.settle()) == []


def test_of_several_processes_the_first_speaks_and_one_that_alone_fails_after_a_while(monkeypatch, tmp_path, capsys):
    waited = []
    monkeypatch.setattr(environment.time, "sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for rank, said in (("0", "error: no"), ("3", "process 3: error: no")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            environment.fail("error: no", 3)
        assert stop.value.code == 3
        assert capsys.readouterr().err == said + "\n"
        assert json.loads((tmp_path / "error.json").read_text())["message"] == said
    assert waited == [10]


def test_timing_has_seconds_and_tokens_a_second(tiny, tmp_path):
    run("ppo", tiny, tmp_path, "--run.name=it", "--ppo.eval_strategy=no")
    folder = tmp_path / "tiny/ppo/it"
    rows, metrics = ([json.loads(line) for line in (folder / f"{n}.jsonl").open()] for n in ("timing", "metrics"))
    for timing, row in zip(rows, metrics, strict=False):
        assert set(timing) == {"step", "eps", "seconds", "tokens_per_second"}
        assert timing["seconds"] * timing["tokens_per_second"] == pytest.approx(8 * row["completions/mean_length"])
        assert timing["eps"] == int(8 / timing["seconds"])
        assert not set(timing) & set(row) - {"step"}


# --- accelerate, wandb -----------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    import accelerate

    monkeypatch.setattr(accelerate, "PartialState", lambda cpu: SimpleNamespace(device="cuda:99"))
    with pytest.raises(SystemExit) as stop:
        run("ppo", tiny, tmp_path / "outputs")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "error: this process cannot be set up: " in error
    assert "ACCELERATE_TORCH_DEVICE" in error
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(("variables", "threads"), [({"OMP_NUM_THREADS": "3"}, 3), ({}, 4), ({"LOCAL_WORLD_SIZE": "2"}, 2),
                         ({"OMP_NUM_THREADS": "1", "ACCELERATE_DYNAMO_BACKEND": "NO"}, 4)])  # fmt: skip
def test_threads(variables, threads, monkeypatch):
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process, "_cores", lambda: 4)
    try:
        torch.set_num_threads(3)  # as OMP_NUM_THREADS would have it
        process.configure(0)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("variables", "count"), [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None),
                         ({"GOMP_SPINCOUNT": "9"}, "9")])  # fmt: skip
def test_threads_that_wait_soon_sleep_unless_told_otherwise(variables, count, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.prepare()
    assert os.environ.get("GOMP_SPINCOUNT") == count


def test_wandbs_variables(tiny, tmp_path, monkeypatch):
    default, own = (load_recipe(tiny, overrides).run.project for overrides in ({}, {"run.project": "own"}))
    assert (_project(default), _project(own)) == ("rlhf-recipes", "own")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert (_project(default), _project(own)) == ("theirs", "own")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    disabled = Trackers()
    disabled.start("wandb", Tracked(default, "tiny", "ppo", tmp_path, {}))
    assert disabled.running == {}
    assert list(tmp_path.iterdir()) == []


def test_each_name_of_run_tracker_is_a_tracker_and_one_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    assert set(get_args(get_type_hints(RunSection)["tracker"])) == set(TRACKERS)
    logged = []

    def broken(*args, **kwargs):
        raise OSError("no server")

    good = SimpleNamespace(log=lambda metrics, step: logged.append((metrics, step)), finish=logged.append)
    flaky = SimpleNamespace(log=broken, finish=logged.append)
    monkeypatch.setattr(trackers, "TRACKERS", {"good": lambda run: good, "flaky": lambda run: flaky, "absent": broken})
    together = Trackers()
    for name in ("flaky", "absent", "good"):
        together.start(name, Tracked("project", "group", "ppo", tmp_path, {}))
    together.each(lambda tracker: tracker.log({"x": 1}, step=2))
    together.each(lambda tracker: tracker.finish({"done": True}))
    assert logged == [({"x": 1}, 2), {"done": True}]
    assert capsys.readouterr().err == "absent: switched off (no server)\nflaky: no server; continuing without it\n"


def test_the_benchmark_of_busy_cores_compares_with_one_and_two_free_ones(monkeypatch, capsys, tmp_path):
    from benchmarks import busy

    speeds = {("default", 2, False): 26.0, ("default", 2, True): 13.0, ("default", 1, False): 16.0, ("A=1", 2, False): 28.0,
              ("A=1", 2, True): 2.0}  # fmt: skip
    started = []

    class Process:
        def __init__(self, words):
            started.append(words[-1])
            self.kill = self.wait = lambda: started.append(None) if started[-1] is not None else None

    def measured(cores, setting, updates):
        return [speeds[setting, len(cores), bool(started) and started[-1] is not None]] * updates

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 7, 9})
    monkeypatch.setattr(busy, "episodes_a_second", measured)
    monkeypatch.setattr(busy, "subprocess", SimpleNamespace(Popen=Process))
    figures = busy.main(["--settings", "default", "A=1", "--json", str(tmp_path / "figures.json")])
    assert figures["default, one taken"] == {"episodes_per_second": 13.0, "to_one_free_core": 13 / 16, "to_free": 0.5}
    assert figures["A=1, one taken"]["to_one_free_core"] == 2 / 16
    assert figures["A=1, free"]["to_free"] == 28 / 26
    assert {core for core in started if core} == {"7"}
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert "| default, one taken | 13.0 | 13.0 | 13.0 | 0.81 | 0.50 |" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_process_of_several_prints_the_dry_run(rank, lines, tiny, tmp_path, monkeypatch, capsys):
    for name, value in (CONNECTED | {"RANK": rank, "LOCAL_RANK": rank}).items():
        monkeypatch.setenv(name, value)
    run("ppo", tiny, tmp_path, "--dry-run")
    assert capsys.readouterr().out.count("# nothing was written") == lines


def test_a_dataset_in_a_folder_that_may_not_be_written_to_is_read(tiny, tmp_path, monkeypatch):
    place, data = shutil.copytree(tiny, tmp_path / "tiny"), tmp_path / "data"
    code = f"\nfrom datasets import load_from_disk\ndef load_preferences(split): return load_from_disk({str(data)!r})\n"
    load_dataset(load_task(place), "load_preferences", "train").save_to_disk(data)
    (place / "task.py").write_text((place / "task.py").read_text() + code)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != data and access(path, mode))
    try:
        pairs = load_dataset(load_task(place), "load_preferences", "train").map(lambda row: {"more": 1})
        assert pairs["more"][:] == [1] * 48
        assert not list(data.glob("cache-*"))
    finally:
        datasets.enable_caching()
