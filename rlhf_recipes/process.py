"""Settings of the process itself, made before a stage runs."""

import os
import sys
import warnings
from typing import Any

from tqdm import tqdm

from rlhf_recipes.recipe.errors import RecipeError


def configure(seed: int, onednn: bool = True) -> None:
    """Finds device and other processes, seeds python, numpy and torch, uses all cores, silences deprecation notices.

    The cores this process may use are shared out among the processes of the machine; with a GPU the setting is left alone.
    OMP_NUM_THREADS is obeyed where no launcher can have set it: `accelerate launch` without a config file makes it 1, which
    halves the speed on two cores.

    Raises:
        RecipeError: there is no such device, or the other processes are not found.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message="Could not find a config file")  # PEFT, of a backbone beside the recipe

    import datasets
    import torch
    from accelerate import PartialState
    from transformers import set_seed
    from transformers.utils import logging

    from rlhf_recipes.models.matmul import use_onednn_on_amd

    try:
        # before anyone asks: it finds the other processes only if told of CPUs
        torch.empty(1, device=PartialState(cpu=not torch.cuda.is_available()).device)
    except Exception as error:
        raise RecipeError(
            f"this process cannot be set up: {type(error).__name__}: {error}; look at the launch file, the devices, and "
            f"what the environment says of them (ACCELERATE_TORCH_DEVICE, CUDA_VISIBLE_DEVICES, MASTER_ADDR)"
        ) from error
    set_seed(seed)

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    if not torch.cuda.is_available():
        if onednn:
            use_onednn_on_amd()
        if "OMP_NUM_THREADS" not in os.environ or {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, _cores() // processes))


def stop_together(failure: RecipeError | None) -> None:
    """Raises on every process the failure that one of them has; call it on all of them."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    failures = gather_object([failure]) if PartialState().num_processes > 1 else [failure]
    for first in (failure, *failures):
        if first is not None:
            raise first


def say_left_out(count: int, of: int, what: str, how: str) -> None:
    """One line, from the main process, where a stage does not train on rows as they were given; louder where they are many."""
    from accelerate import PartialState

    if count and PartialState().is_main_process:
        share = count / max(1, of)
        print(f"{'warning: ' if share > 0.1 else ''}{count} of {of} {what} ({share:.0%}) {how}")


def warn(lines: list[str]) -> None:
    """Each line as a warning, from the main process."""
    from accelerate import PartialState

    for line in lines if PartialState().is_main_process else ():
        print(f"warning: {line}", file=sys.stderr)


def _cores() -> int:
    """Those this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(iterable: Any = None, show: bool = True, **kwargs: Any) -> tqdm:
    """A tqdm bar for long work; a log file gets a line every 15 seconds instead of a redrawn one."""
    every = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(iterable, disable=not show, mininterval=every, dynamic_ncols=True, **kwargs)
