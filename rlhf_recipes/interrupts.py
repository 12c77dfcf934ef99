"""SIGTERM and SIGINT (Slurm's pre-emption, Ctrl-C): a training run finishes its update and saves; a second one ends it."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again, with --resume

_requested: signal.Signals | None = None
_in_training = False


class Interrupted(KeyboardInterrupt):
    """The run was asked to end before its end; the message says how it is resumed."""


@contextmanager
def handled() -> Iterator[None]:
    """While this lasts, the first signal sets `requested` inside `training()` and raises `Interrupted` outside of it."""
    global _requested
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requested = None
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def training() -> Iterator[None]:
    """While this lasts, somebody asks `requested()` after every update."""
    global _in_training
    _in_training = True
    try:
        yield
    finally:
        _in_training = False


def requested() -> bool:
    return _requested is not None


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _requested
    name = signal.Signals(number).name
    if _requested is not None:
        os.write(2, f"\n{name} again: exiting at once\n".encode())
        os._exit(128 + number)
    _requested = signal.Signals(number)
    if not _in_training:
        raise Interrupted(f"{name}: interrupted")
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{name}: finishing this update, then saving; once more exits at once", file=sys.stderr, flush=True)
