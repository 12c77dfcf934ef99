"""wandb, without ever asking, blocking or failing: a run that cannot be online is offline, and says so once."""

import os
import socket
import sys
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rlhf_recipes.recipe.sections import Recipe, RunSection


class Tracker:
    """A wandb run of one stage, or nothing (`run.tracker: none`, WANDB_DISABLED, not the main process, wandb itself failing).

    Every call is safe: tracking is never a reason for a training to stop.

    Args:
        identity: wandb's id of the run, the same when it goes on.
    """

    def __init__(self, recipe: Recipe, stage: str, folder: Path, enabled: bool = True, identity: str | None = None) -> None:
        self._run: Any = None
        if not enabled or recipe.run.tracker == "none" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        mode = _mode()
        try:
            import wandb

            self._run = wandb.init(
                project=_project(recipe),
                name=folder.name,
                group=recipe.run.group or recipe.task,
                job_type=stage,
                config=recipe.to_dict(),
                dir=folder,
                mode=mode,
                id=identity,
                resume="allow",  # a run that goes on is one run there too
            )
        except Exception as error:  # noqa: BLE001 - whatever wandb raises, training goes on
            print(f"wandb: switched off ({error})", file=sys.stderr)

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._safely(lambda: self._run.log(metrics, step=step))

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Logs `rows`, dicts of equal keys, as a wandb table."""

        def send() -> None:
            import wandb

            columns = list(rows[0])
            self._run.log({name: wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])})

        self._safely(send)

    def alert(self, title: str, text: str) -> None:
        self._safely(lambda: self._run.alert(title=title, text=text))

    def finish(self, summary: dict[str, Any]) -> None:
        def send() -> None:
            self._run.summary.update(summary)
            self._run.finish()

        self._safely(send)

    def _safely(self, send: Any) -> None:
        if self._run is None:
            return
        try:
            send()
        except Exception as error:  # noqa: BLE001 - see __init__
            print(f"wandb: {error}; going on without it", file=sys.stderr)
            self._run = None


def _project(recipe: Recipe) -> str:
    """The recipe's, else that of WANDB_PROJECT, else the default."""
    own = recipe.run.project
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
