"""Checkpoints on disk: folders that are whole or recognisably not, and of which the best and the last whole one stay.

A checkpoint is written to a temporary folder beside its place, with a manifest of every file's size and SHA-256, forced to
disk, and renamed: whoever is killed, or whatever loses power, leaves either all of it or none. The manifest finds damage, not
forgery: who can change a file can change the manifest too. Weights are safetensors, the rest is JSON; nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rlhf_recipes.recipe.errors import StoppedError

MANIFEST = "manifest.json"
STATE = "trainer_state.json"  # as transformers names it
RESUME = "resume.json"  # what else a run resumes with


def write_checkpoint(folder: Path, fill: Callable[[Path], None], needed: int) -> None:
    """Makes `folder`, all of it or nothing.

    Args:
        fill: writes the files into the folder it is given.
        needed: bytes, for the message where the disk is full.

    Raises:
        StoppedError: the disk is full.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        share(temporary)
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _force_to_disk(path)
    except Exception as error:  # safetensors has its own exception for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if "No space left" not in str(error):
            raise
        free = shutil.disk_usage(folder.parent).free
        raise StoppedError(
            f"{folder}: the disk is full: a checkpoint needs about {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are "
            f"free; the ones before are whole. Make room, then resume with --resume"
        ) from error
    temporary.rename(folder)
    _force_to_disk(folder.parent)


def share(folder: Path) -> None:
    """Gives the weights in `folder` the mode of its other files, which the umask decides: safetensors makes them 0600."""
    for file in folder.glob("*.safetensors"):
        mode = file.stat().st_mode
        if wanted := folder.stat().st_mode & 0o666 & ~mode:
            with suppress(OSError):  # a file system without modes
                file.chmod(mode | wanted)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes of {entry['bytes']}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    return None


def checkpoints_of(run: Path) -> list[Path]:
    """All checkpoints of a run, the newest first, whole or not."""
    found = [folder for folder in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def prune(run: Path, limit: int | None, best: str | None) -> None:
    """Removes all but the newest `limit` checkpoints; never the best, and never the last that is whole.

    Of the `best-<step>` folders those stay that are the best so far of a checkpoint that stays, or of the run as it is now.

    Args:
        limit: TRL's `save_total_limit`; None keeps all.
        best: the folder of the best so far.
    """
    found = checkpoints_of(run)
    kept = found if limit is None else found[: max(1, limit)]
    if len(kept) < len(found) and not any(damage(folder) is None for folder in kept):
        kept += [folder for folder in found[len(kept) :] if damage(folder) is None][:1]
    bests = {Path(best).name} if best else set()
    for folder in kept:
        try:
            bests.add(Path(json.loads((folder / STATE).read_text(encoding="utf-8"))["best_model_checkpoint"] or "").name)
        except (OSError, ValueError, KeyError):  # a damaged one
            continue
    for folder in (*found, *run.glob("best-*")):
        if folder not in kept and folder.name not in bests:
            shutil.rmtree(folder)


def set_aside(folder: Path) -> Path:
    """Renames what a run that resumes will write again; nothing is removed."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.aside-{number}")).exists():
        number += 1
    return folder.rename(target)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
