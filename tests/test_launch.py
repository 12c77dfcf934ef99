"""Exit codes through the real launchers, with one process and with two."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TASK

ROOT = Path(__file__).resolve().parent.parent
OURS, ACCELERATES = ["rlhf_recipes", "launch"], ["accelerate.commands.launch"]
CONFIGS = {1: "cpu.yaml", 2: "multi_cpu.yaml"}
# SIGTERM to the launcher, which one process has become, in the first rollout
SIGNALS = """
def asks_to_end(prompts, completions, **columns):
    import signal
    if len(completions) == 8 and os.environ.get("RANK", "0") == "0":
        os.kill(os.getppid() if "RANK" in os.environ else os.getpid(), signal.SIGTERM)
    return [0.0] * len(completions)
"""
# exit code -> words that lead to it, the beginning of the line that says why
ENDS = {
    2: (["--ppo.lerning_rate=1"], "error: --ppo.lerning_rate: unknown key `ppo.lerning_rate`; did you mean `learning_rate`?"),
    3: (
        ["--reward.function=wordy", "--ppo.learning_rate=1e30", "--run.max_skipped_steps=1"],
        "error: step 1: 1 optimizer steps in a row had a gradient that is not finite",
    ),
    75: (
        ["--reward.function=asks_to_end", "--ppo.save_steps=1"],
        "ppo: ended after step 1, as asked; the last good",
    ),
}


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch") / "tiny"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(tiny / "checkpoints")
    shutil.copy(tiny / "recipe.yaml", folder)
    (folder / "task.py").write_text(TASK + SIGNALS)
    return folder


def launched(launcher, processes, recipe, output, *words):
    command = [
        sys.executable, "-m", *launcher, "--config_file", f"accelerate_configs/{CONFIGS[processes]}",
        "--main_process_port", "0", "scripts/ppo.py",
        "--recipe", str(recipe), f"--run.output={output}", *words,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("code", "processes"),
    [(2, 1), (2, 2), (3, 2), (75, 2), *(pytest.param(code, 1, marks=pytest.mark.slow) for code in (3, 75))],
)
def test_the_scripts_exit_code_and_line_arrive(code, processes, recipe, tmp_path):
    words, line = ENDS[code]
    if code != 2:
        words = [*words, "--reward.adapter=null", "--run.name=it", "--evaluate.prompts=4", "--ppo.eval_strategy=no"]
    done = launched(OURS, processes, recipe, tmp_path / "outputs", *words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(line), done.stderr
    assert done.stderr.count(line) == 1
    assert (tmp_path / "outputs").exists() == (code != 2)
    if code == 75:
        assert (tmp_path / "outputs/tiny/ppo/it/checkpoint-1/manifest.json").is_file()


@pytest.mark.parametrize("processes", CONFIGS)
def test_what_accelerate_makes_of_it(processes, recipe, tmp_path):
    """As docs/interruptions.md has it."""
    words, line = ENDS[2]
    done = launched(ACCELERATES, processes, recipe, tmp_path / "outputs", *words)
    assert done.returncode == 1
    lines = done.stderr.rstrip().splitlines()
    assert line in lines
    if processes == 1:
        assert lines[-1].endswith("returned non-zero exit status 2.")
    else:
        assert lines[-2].endswith(f"traceback : {line}")
