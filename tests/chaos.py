"""kill -9 at random moments, --resume, and every bit must be the uninterrupted run's.

    python -m tests.chaos --stage ppo --kills 20 --seed 0 [--processes 2] [--recipe recipes/imdb]

Runs a stage once undisturbed, then again and again with kills: every fourth comes while a checkpoint is being written, the
others at a random moment between the start of the process and its end. With two processes every second kill takes one of
them only, and the job has to end by itself. Ends with a table; exit code 0 only if every run ended with the same adapter,
value function, metrics and samples, byte for byte.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
COMPARED = (
    "adapter_model.safetensors", "adapter/adapter_model.safetensors", "model/model.safetensors", "value.safetensors",
    "metrics.jsonl", "samples.jsonl",
)  # fmt: skip
ENDS_WITHIN = 120  # seconds a job may take to end once one of its processes is dead
WORDS = {
    "ppo": ["--ppo.total_episodes", "1536", "--ppo.save_steps", "2", "--ppo.eval_strategy", "steps", "--ppo.eval_steps", "3",
            "--ppo.metric_for_best_model", "objective", "--ppo.load_best_model_at_end", "true"],
    "a2c": ["--a2c.total_episodes", "768", "--a2c.save_steps", "2", "--a2c.eval_strategy", "steps", "--a2c.eval_steps", "3"],
    "dpo": ["--dpo.rounds", "2", "--preferences.prompts", "256", "--dpo.save_strategy", "steps", "--dpo.save_steps", "4",
            "--dpo.logging_steps", "3"],
    "reward": ["--reward_training.max_steps", "40", "--reward_training.save_strategy", "steps", "--reward_training.save_steps",
               "7", "--reward_training.logging_steps", "5"],
    "sft": ["--sft.max_steps", "30", "--sft.save_steps", "7", "--sft.logging_steps", "5"],
}  # fmt: skip
HELD_OUT = ["--evaluate.prompts", "64", "--watch.prompts", "32", "--run.tracker", "none"]


def command(options: argparse.Namespace, name: str, *words: str) -> list[str]:
    config = {1: "cpu.yaml", 2: "multi_cpu.yaml"}[options.processes]
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / config),
            str(ROOT / "scripts" / f"{options.stage}.py"), "--recipe", str(options.recipe), "--run.output", str(options.output),
            "--run.name", name, *WORDS[options.stage], *HELD_OUT, *words]  # fmt: skip


def start(options: argparse.Namespace, name: str, *words: str) -> tuple[subprocess.Popen, Path]:
    log = options.output / f"{name}.log"
    with log.open("a") as stream:
        process = subprocess.Popen(command(options, name, *words), cwd=ROOT, stdout=stream, stderr=stream)
    return process, log


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train: those that run the stage's script and started no other that does."""
    try:
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        return [p for p in everyone if "accelerate.commands.launch" not in p.cmdline() and "--run.name" in p.cmdline()]
    except psutil.Error:
        return []


def kill(process: subprocess.Popen, one_only: bool, rng: random.Random) -> float:
    """SIGKILL to all, or to one worker; returns the seconds until all were gone."""
    began, everyone = time.monotonic(), psutil.Process(process.pid).children(recursive=True)
    victims = workers(process)
    if one_only and victims:
        rng.choice(victims).kill()
        process.wait(timeout=ENDS_WITHIN)
        psutil.wait_procs(everyone, timeout=ENDS_WITHIN)
    for left in (*everyone, process):
        try:
            left.kill()
        except (psutil.Error, OSError):
            continue
    process.wait()
    psutil.wait_procs(everyone)
    return time.monotonic() - began


def strike(process: subprocess.Popen, run: Path, saving: bool, moment: float, rng: random.Random) -> bool:
    """Waits for the moment, or until a checkpoint after the first is half written; false if the job was over before."""
    deadline, before = time.monotonic() + moment, set(run.glob("checkpoint-*"))
    while process.poll() is None:
        if saving and any(run.glob(".checkpoint-*")) and set(run.glob("checkpoint-*")) != before:
            time.sleep(rng.uniform(0, 0.02))
            return True
        if not saving and time.monotonic() > deadline:
            return True
        time.sleep(0.001 if saving else 0.05)
    return False


def disturbed(options: argparse.Namespace, name: str, kills: int, seconds: float, rng: random.Random) -> list[dict]:
    """A run with up to `kills` kills; a row each, and one without a kill where it was over before its moment."""
    run, rows, words = folder_of(options, name), [], []
    while True:
        process, log = start(options, name, *words)
        number = options.done + len(rows)
        saving, one_only = number % 4 == 3, options.processes > 1 and number % 2 == 1
        moment = rng.uniform(0, seconds)
        if len(rows) == kills or not strike(process, run, saving, moment, rng):
            if process.wait() != 0:
                print(log.read_text()[-4000:])
            break
        half = any(run.glob(".checkpoint-*"))
        gone = kill(process, one_only, rng)
        steps = [int(folder.name.split("-")[1]) for folder in run.glob("checkpoint-*")]
        rows.append({
            "run": name,
            "moment": "while saving" if saving else f"{moment:.1f} s",
            "left half a checkpoint": "yes" if half else "no",
            "killed": "one process" if one_only else "all",
            "gone after": f"{gone:.1f} s",
            "went on from": max(steps) if steps else "the beginning",
        })  # fmt: skip
        print(rows[-1], flush=True)
        if (run / "summary.json").is_file():
            break
        words = ["--resume", str(run)] if run.is_dir() else []
    different = differences(folder_of(options, "whole"), run)
    rows = rows or [{"run": name}]
    for row in rows:
        row["end"] = "identical" if not different else f"DIFFERENT: {', '.join(different)}"
    print(f"{name}: {', '.join(different) or 'identical'}", flush=True)
    return rows


def folder_of(options: argparse.Namespace, name: str) -> Path:
    return options.output / options.recipe.resolve().name / options.stage / name


def differences(whole: Path, run: Path) -> list[str]:
    names = [name for name in COMPARED if (whole / name).is_file()]
    return [name for name in names if not (run / name).is_file() or (run / name).read_bytes() != (whole / name).read_bytes()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=sorted(WORDS), default="ppo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-per-run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "imdb")
    parser.add_argument("--output", type=Path, help="default: a temporary folder")
    options = parser.parse_args()
    options.output = options.output or Path(tempfile.mkdtemp(prefix="chaos-"))
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"logs and runs: {options.output}", flush=True)

    began = time.monotonic()
    process, log = start(options, "whole")
    if process.wait() != 0:
        print(log.read_text()[-4000:])
        return 1
    seconds = time.monotonic() - began
    print(f"undisturbed: {seconds:.0f} s", flush=True)

    rng, rows, options.done = random.Random(options.seed), [], 0  # noqa: S311 - moments, not secrets
    while options.done < options.kills and all(row["end"] == "identical" for row in rows):
        name = f"killed-{len({row['run'] for row in rows}) + 1}"
        rows += disturbed(options, name, min(options.kills_per_run, options.kills - options.done), seconds, rng)
        options.done = sum("killed" in row for row in rows)
    identical = all(row["end"] == "identical" for row in rows)
    rows = [{"kill": number, **row} for number, row in enumerate((row for row in rows if "killed" in row), start=1)]
    for row in (dict(zip(rows[0], rows[0], strict=True)), dict.fromkeys(rows[0], "---"), *rows):
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    (options.output / "chaos.json").write_text(json.dumps(rows, indent=2))
    versions = re.findall(r"^(torch|trl|transformers|peft|accelerate)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    print(f"{options.stage}, {len(rows)} kills, {options.processes} process(es), {os.cpu_count()} cores, {dict(versions)}")
    return 0 if identical else 1


if __name__ == "__main__":
    raise SystemExit(main())
