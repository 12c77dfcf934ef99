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
COMPARED = ("adapter_model.safetensors", "value.safetensors", "metrics.jsonl", "samples.jsonl")
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


def strike(process: subprocess.Popen, run: Path, kind: str, moment: float, rng: random.Random) -> bool:
    """Waits for the moment; false if the run was over before it."""
    deadline = time.monotonic() + moment
    before = set(run.glob("checkpoint-*"))
    while time.monotonic() < deadline or kind == "saving":
        if process.poll() is not None:
            return False
        if kind == "saving" and any(run.glob(".*.tmp")) and set(run.glob("checkpoint-*")) != before:  # not the very first
            time.sleep(rng.uniform(0, 0.05))
            return True
        time.sleep(0.001 if kind == "saving" else 0.05)
    return process.poll() is None


def compare(whole: Path, run: Path) -> list[str]:
    return [name for name in COMPARED if (whole / name).is_file() and (whole / name).read_bytes() != (run / name).read_bytes()]


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
    rng, runs = random.Random(options.seed), options.output / options.recipe.resolve().name / options.stage
    print(f"logs and runs: {options.output}", flush=True)

    began = time.monotonic()
    process, log = start(options, "whole")
    if process.wait() != 0:
        print(log.read_text()[-4000:])
        return 1
    duration = time.monotonic() - began
    print(f"undisturbed: {duration:.0f} s", flush=True)

    rows, number, failed = [], 0, False
    for attempt in range(1, options.kills + 1):
        name = f"killed-{attempt}"
        run, words, left = runs / name, [], duration
        for _ in range(min(options.kills_per_run, options.kills - number)):
            kind = "saving" if number % 4 == 3 else "any time"
            process, log = start(options, name, *words)
            moment = rng.uniform(0, left)
            if not strike(process, run, kind, moment, rng):
                break  # over before the moment came
            number += 1
            one_only = options.processes > 1 and number % 2 == 0
            half_written = len(list(run.glob(".*.tmp")))
            gone = kill(process, one_only, rng)
            steps = max((int(f.name.split("-")[1]) for f in run.glob("checkpoint-*")), default=None)
            rows.append([number, name, f"{moment:.1f} s" if kind == "any time" else "while saving", bool(half_written),
                         "one process" if one_only else "all", f"{gone:.1f} s", "beginning" if steps is None else steps])  # fmt: skip
            print(rows[-1], flush=True)
            words = ["--resume", str(run)] if (run / "run.json").is_file() and not (run / "summary.json").is_file() else []
            if run.is_dir() and not words:
                break  # it was over already
        if process.poll() is None or process.returncode != 0:
            if process.poll() is not None and not (run / "summary.json").is_file():
                process, log = start(options, name, *words)
            if process.wait() != 0:
                print(log.read_text()[-4000:])
                failed = True
        different = compare(runs / "whole", run) if not failed else ["did not end"]
        for row in rows:
            if row[1] == name:
                row.append("identical" if not different else f"DIFFERENT: {', '.join(different)}")
        failed |= bool(different)
        print(f"{name}: {'identical' if not different else different}", flush=True)
        if number >= options.kills or failed:
            break
    head = ["kill", "run", "moment", "half a checkpoint left", "killed", "gone after", "went on from", "end"]
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |")
    (options.output / "chaos.json").write_text(json.dumps([dict(zip(head, row, strict=True)) for row in rows], indent=2))
    versions = re.findall(r"^(torch|trl|transformers|peft|accelerate)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    print(f"{number} kills, {options.processes} process(es), {os.cpu_count()} cores, {dict(versions)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
