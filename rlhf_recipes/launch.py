"""`accelerate launch`, with the script's own exit code at the end.

    python -m rlhf_recipes launch [accelerate's options] scripts/ppo.py [the script's options]

accelerate and torchrun turn every exit code but 0 into 1, and add tracebacks of their own. Here a single process takes the
launcher's place, so signals reach it too. Of several, SIGTERM and SIGINT are passed on to each, and the exit code is that of
the first one that failed.
"""

import logging
import os
import signal
import sys
from argparse import Namespace
from types import FrameType

from accelerate.commands import launch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from psutil import Process
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from rlhf_recipes.interrupts import EXIT_CODE
from rlhf_recipes.recipe.errors import RecipeError, StoppedError

_SPOKEN = (RecipeError.exit_code, StoppedError.exit_code, EXIT_CODE)  # the script has said why in one line


def main(words: list[str]) -> int:
    """Launches a script; returns the exit code, or never."""
    args = launch.launch_command_parser().parse_args(words)
    args.signals_to_handle = "SIGHUP,SIGQUIT"  # of torchrun, which would kill what has not ended in 30 seconds
    launch.simple_launcher = _become
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # defaults are no cause for a warning
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # said below, in one line
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)
    try:
        launch.launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in _SPOKEN:
            return failure.exitcode
        print(f"launch: process {rank} ({failure.pid}): {_end(failure.exitcode)}; the others were stopped", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _become(args: Namespace) -> None:
    """The script in this very process."""
    command, environment = prepare_simple_launcher_cmd_env(args)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)  # noqa: S606 - what the user asks for


def _pass_on(number: int, frame: FrameType | None) -> None:
    children = Process().children()  # each in a session of its own, which a terminal's Ctrl-C does not reach
    if not children:
        raise SystemExit(128 + number)
    for child in children:
        child.send_signal(number)


def _end(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
