"""One training run of a sweep: a process that is watched."""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_recipes.sweeps.file import Sweep

POLL = 0.5  # seconds between two looks at a trial


@dataclass(frozen=True)
class Job:
    """One run of a trial, as a process."""

    command: list[str]
    environment: dict[str, str]
    program: str
    log: Path
    lock: int  # a file descriptor that the process keeps open while it runs


# Runs a job to its end and returns its exit code; the callable says, while it runs, whether it must stop.
Runner = Callable[[Job, Callable[[], bool]], int]


class FailedError(Exception):
    """A run of a trial failed; the message is its last words."""


class PrunedError(Exception):
    """A run was stopped because others were better at the same step."""


def run_process(job: Job, stop: Callable[[], bool]) -> int:
    """The default runner: a subprocess in a session of its own, so that Ctrl-C reaches it once, through the sweep."""
    with job.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - the sweep file's own command
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=job.environment,
            pass_fds=(job.lock,), start_new_session=True,
        )  # fmt: skip
    asked = False
    while True:
        try:
            return process.wait(timeout=POLL)
        except subprocess.TimeoutExpired:
            if not asked and stop():
                asked = True
                terminate(process.pid, job.program)


def terminate(pid: int, program: str) -> None:
    """SIGTERM, once, to each process that runs the script itself: `accelerate launch` does not pass it to a single one.

    One that has just been launched may have no such process yet; then to the launcher.
    """
    try:
        root = psutil.Process(pid)
        found, pending = [], [root]
        while pending:
            process = pending.pop()
            try:
                words = [word for word in process.cmdline()[1:] if not word.startswith("-")]
                if words[:1] == [program]:
                    found.append(process)
                else:
                    pending += process.children()
            except psutil.NoSuchProcess:
                continue
        for process in found or [root]:
            process.terminate()
    except psutil.NoSuchProcess:
        return  # it has ended by itself


def watched_values(folder: Path, sweep: Sweep) -> list[float]:
    """What a run is judged by, one value for each held-out evaluation so far; the last line of the file may be half written."""
    file, values = folder / "metrics.jsonl", []
    if not file.is_file():
        return []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and "eval/reward_se" in (row := json.loads(line)):  # the evaluation at the end has none
            values.append(sweep.value({name.removeprefix("eval/"): value for name, value in row.items()}))
    return values


def last_words(log: Path, start: int, code: int) -> str:
    """Why a run failed: the script's own error, else the last exception that is not the launcher's, else the last line."""
    with log.open("rb") as stream:
        stream.seek(start)
        lines = [line.strip() for line in re.split(r"[\r\n]+", stream.read().decode("utf-8", "replace")) if line.strip()]
    of_launcher = r".*CalledProcessError: Command .* (died with .*|returned non-zero exit status \d+)\."
    for pattern in (
        r"(error: .*)",
        r"((?!.*(?:CalledProcess|ChildFailed)Error)[\w.]+(?:Error|Exception|Interrupt)\b.*)",
        of_launcher,
    ):
        for line in reversed(lines):
            if found := re.fullmatch(pattern, line):
                return found[1]
    return lines[-1] if lines else f"exit code {code}"
