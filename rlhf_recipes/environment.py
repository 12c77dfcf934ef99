"""What the environment says of a process: obeyed, or named in one line. Nothing heavy is imported here."""

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from rlhf_recipes.recipe.errors import RecipeError

# What a launcher of several processes sets, and what else says that there are several; accelerate reads all but the last.
_OF_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_TASKS = "SLURM_STEP_NUM_TASKS"
# accelerate's settings, from its default config too, that would change a run behind its recipe: the value without effect, and
# who decides.
_DECIDED_ELSEWHERE = {
    "ACCELERATE_MIXED_PRECISION": ("no", "the recipe's `model.dtype` decides"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "nothing is compiled here"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "the stage's `gradient_accumulation_steps` decides"),
}


def prepare() -> None:
    """Before anything is printed, and before torch is imported."""
    tolerate_output()
    os.environ |= waiting()


def tolerate_output() -> None:
    """Nothing that is printed ends the process, whatever the terminal can show and whoever still reads it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not what a notebook or a test puts there
            setattr(sys, name, _Output(stream))


def waiting() -> dict[str, str]:
    """How threads wait for each other, unless the environment says so: they spin for microseconds, and then sleep.

    libgomp's own spin for milliseconds, on a core that the thread they wait for may need: beside one other busy process on two
    cores the default job falls to a tenth. Threads that sleep at once cost a quarter of the speed on free cores
    (benchmarks/busy.py). It reads the variable once, as it is loaded.
    """
    return {} if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() else {"GOMP_SPINCOUNT": "1000"}


class _Output(io.TextIOWrapper):
    """A stream that never ends a run: what its encoding lacks is replaced, and once nobody reads it, it goes nowhere."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer, stream.encoding, "replace",
            line_buffering=stream.line_buffering, write_through=stream.write_through,
        )  # fmt: skip
        self._stream = stream  # which would close the buffer that both write to

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._to_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def settle() -> Iterator[str]:
    """Sets aside what would change a run behind its recipe, and yields a line for each.

    Raises:
        RecipeError: the environment speaks of several processes that no launcher has connected.
    """
    _check_launch()
    tasks = os.environ.get(_TASKS, "1")
    if tasks != "1" and "RANK" not in os.environ:
        yield f"srun has started {tasks} tasks, and each is a run of its own; for one run: accelerate_configs/slurm.sh"
    for name, (value, owner) in _DECIDED_ELSEWHERE.items():
        if os.environ.get(name, value).lower() not in (value, "auto"):
            yield f"{name}={os.environ[name]} is set aside: {owner}"
            os.environ[name] = value
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # obeyed by everything that asks for a GPU


def _check_launch() -> None:
    for name in {*_OF_LAUNCHER, *_SIZES}:
        if os.environ.get(name) == "":  # accelerate reads a number
            del os.environ[name]
    if all(name in os.environ for name in _OF_LAUNCHER):
        return
    alone = dict.fromkeys(_SIZES, ("1",)) | {"RANK": ("0", "-1"), "LOCAL_RANK": ("-1",)}
    several = [name for name, values in alone.items() if os.environ.get(name, values[0]) not in values]
    by_mpi = "MASTER_ADDR" in os.environ and not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & set(several)  # mpirun_hostfile
    if several and not by_mpi:
        name = several[0]
        raise RecipeError(
            f"{name}={os.environ[name]} in the environment says that this is one of several processes, and no launcher has "
            f"connected them: launch with accelerate (accelerate_configs/multi_gpu.yaml, slurm.sh), or unset {name}"
        )


def fail(line: str, code: int) -> NoReturn:
    """Ends this process with one line on stderr, which torchrun repeats in its table.

    Of several processes the first one speaks, ends, and takes the others along by way of their launcher. One that alone has
    failed speaks after a while.
    """
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        time.sleep(10 + 0.5 * int(local))
        line = f"process {rank}: {line}"
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with open(file, "w", encoding="utf-8") as stream:
            json.dump({"message": line, "timestamp": int(time.time())}, stream)
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):  # else a bar shares the line, and is drawn again behind it
            bar.close()
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(code) from None
