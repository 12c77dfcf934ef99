"""Where a run's numbers go besides its folder. Tracking never asks, and never is a reason for a training run to stop.

A new tracker is a class here, or in a file of its own, a line in TRACKERS, and its name in `run.tracker` (recipe/sections.py).
"""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from rlhf_recipes.recipe.sections import RunSection


class Tracker(Protocol):
    """One run of one stage in a tracker. Whatever a method raises reaches `Trackers`, and not the run."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """`rows` are of equal keys."""

    def alert(self, title: str, text: str) -> None: ...

    def finish(self, summary: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a run.

    folder: the run's; its name is the run's.
    config: the resolved recipe.
    identity: the same whenever the run is resumed.
    """

    project: str
    group: str
    stage: str
    folder: Path
    config: dict[str, Any]
    identity: str | None = None


@dataclass
class Trackers:
    """The trackers of a run, by name. One that fails says so once, and is left out from then on."""

    running: dict[str, Tracker] = field(default_factory=dict)

    def start(self, name: str, run: Tracked) -> None:
        """Starts the tracker `run.tracker` names, unless the environment switches it off."""
        try:
            tracker = TRACKERS[name](run)
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything
            print(f"{name}: switched off ({error})", file=sys.stderr)
        else:
            self.running |= {} if tracker is None else {name: tracker}

    def each(self, send: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.running.items()):
            try:
                send(tracker)
            except Exception as error:  # noqa: BLE001 - see `start`
                print(f"{name}: {error}; continuing without it", file=sys.stderr)
                del self.running[name]


class WandbTracker:
    """A run that cannot be online is offline, and says so once."""

    def __init__(self, run: Tracked) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        mode = _mode()
        import wandb

        self._run = wandb.init(
            project=_project(run.project),
            name=run.folder.name,
            group=run.group,
            job_type=run.stage,
            config=run.config,
            dir=run.folder,
            mode=mode,
            id=run.identity,
            resume="allow",  # a run that is resumed is one run there too
        )

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log(metrics, step=step)

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        import wandb

        columns = list(rows[0])
        self._run.log({name: wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])})

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text)

    def finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish()


def start_wandb(run: Tracked) -> WandbTracker | None:
    return None if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes") else WandbTracker(run)


def _project(own: str) -> str:
    """The recipe's, else that of WANDB_PROJECT, else the default."""
    return os.environ.get("WANDB_PROJECT") or own if own == RunSection.model_fields["project"].default else own


def _mode() -> Literal["online", "offline"] | None:
    """None where WANDB_MODE decides, "online" with login and network, else "offline" and one line that says why."""
    if os.environ.get("WANDB_MODE"):
        return None
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    reason = None
    if not _logged_in(host.hostname or ""):
        reason = "not logged in"
    else:
        try:
            socket.create_connection((host.hostname, host.port or 443), timeout=3).close()
        except OSError:
            reason = "no network"
    if reason:
        print(f"wandb: {reason}, so this run is offline; `wandb sync` uploads it later")
    return "offline" if reason else "online"


def _logged_in(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


TRACKERS: dict[str, Callable[[Tracked], Tracker | None]] = {"wandb": start_wandb, "none": lambda run: None}
