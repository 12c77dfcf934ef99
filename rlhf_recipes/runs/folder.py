"""The run folder `<output>/<task>/<stage>/<run>/`, and what every stage leaves in it."""

import json
import os
import secrets
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.process import stop_together
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import LATEST, Recipe
from rlhf_recipes.recipe.stages import STAGES
from rlhf_recipes.runs.checkpoints import MANIFEST, RESUME, checkpoints_of, damage, set_aside, share, step_of
from rlhf_recipes.runs.fingerprint import RESOLVED, RUN, SUMMARY, fingerprint
from rlhf_recipes.runs.resume import read_run, task_hash
from rlhf_recipes.runs.trackers import Tracked, Trackers


@dataclass(frozen=True)
class Finding:
    """Something that goes wrong: its name, the numbers that show it, and which key of the recipe to change."""

    name: str
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}. {self.advice}"


# Timings go to the trackers and timing.jsonl, so that metrics.jsonl is the same, byte for byte, whenever the run is repeated.
_TIMINGS = ("eps", "total_flos", "seconds")
_TIMING_ENDS = ("_runtime", "_per_second", "_preparation_time")
# Files that grow: a run that resumes cuts them back to what they were at its checkpoint.
_GROWING = ("metrics.jsonl", "timing.jsonl", "samples.jsonl")

MODEL = "model"  # the folder of a whole model in a run's


@dataclass
class Run:
    """One run of one stage; on processes other than the main one it writes nothing."""

    recipe: Recipe
    stage: str
    folder: Path
    main: bool
    trackers: Trackers = field(default_factory=Trackers)  # started on the main process
    started: float = field(default_factory=time.perf_counter)
    last_step: int = 0
    findings: list[Finding] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)  # JSON that a stage of several rounds keeps over an interruption
    checkpoint: Path | None = None  # to resume from
    _sizes: dict[str, int] = field(default_factory=dict)  # of the files that grow, at that checkpoint
    _lock: FileLock | None = None

    @classmethod
    def prepare(cls, recipe: Recipe, stage: str) -> "Run":
        """Names the run's folder, the same on every process; writes nothing yet."""
        state = PartialState()
        if recipe.run.resume is not None:
            path = Path(recipe.run.resume)  # resume.py has made it the checkpoint, or the run
            if not (path / MANIFEST).is_file():
                return cls(recipe, stage, path, state.is_main_process)
            run = cls(recipe, stage, path.parent, state.is_main_process)
            run._restore(path)
            return run
        name = recipe.run.name or f"{datetime.now():%Y%m%d-%H%M%S}-seed{recipe.run.seed}"
        [name] = broadcast_object_list([name])  # the processes' clocks differ
        return cls(recipe, stage, recipe.runs / stage / name, state.is_main_process)

    def start(self) -> None:
        """Makes the folder with the resolved recipe and points `latest` at it, or reopens an interrupted one; starts tracking.

        Raises:
            RecipeError: the folder exists, or another process is at work in it; nothing is ever overwritten.
        """
        failure = None
        if self.main:
            try:
                if self.recipe.run.resume is None:
                    self._make_folder()
                self._take_folder()
            except RecipeError as error:
                failure = error
        stop_together(failure)
        [folder] = broadcast_object_list([str(self.folder)])
        self.folder = Path(folder)
        if self.main:
            recipe, identity = self.recipe, read_run(self.folder).get("wandb")
            group = recipe.run.group or recipe.task
            tracked = Tracked(recipe.run.project, group, self.stage, self.folder, recipe.to_dict(), identity)
            self.trackers.start(recipe.run.tracker, tracked)
        self.started = time.perf_counter()

    def _make_folder(self) -> None:
        """The folder appears with the recipe in it and `latest` beside it, or not at all.

        Of runs that are named by time and seed, those that start in the same second get a number behind it.
        """
        temporary = self.folder.with_name(f".{self.folder.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir(parents=True)
        trial = self.recipe.run.trial or "WANDB_SWEEP_ID" in os.environ  # wandb's agent sets it for each run
        about = {"stage": self.stage, "wandb": secrets.token_hex(4), "task": task_hash(self.recipe.folder), "trial": trial}
        if STAGES[self.stage].loads_weights:
            about["fingerprint"] = fingerprint(self.recipe, self.stage)
        made = temporary
        try:
            (temporary / RESOLVED).write_text(self.recipe.to_yaml(), encoding="utf-8")
            (temporary / RUN).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            made = self.folder = self._claim(temporary)
            if not trial:
                _point_latest(made)
        except (OSError, RecipeError):
            shutil.rmtree(made, ignore_errors=True)
            raise

    def _claim(self, temporary: Path) -> Path:
        """Renames a folder to the run's name, or to the next that is free."""
        folder, number = self.folder, 1
        while True:
            if not os.path.lexists(folder):
                try:
                    return temporary.rename(folder)
                except OSError:
                    if not os.path.lexists(folder):  # else another process was faster
                        raise
            if self.recipe.run.name is not None:
                raise RecipeError(f"{folder}: this run exists; choose another `--run.name`, nothing is overwritten")
            number += 1
            folder = self.folder.with_name(f"{self.folder.name}-{number}")

    def _take_folder(self) -> None:
        """Locks it, and cuts it back to the checkpoint that the run resumes from."""
        self._lock = FileLock(self.folder / ".lock", is_singleton=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RecipeError(
                f"{self.folder}: another process is at work in this run's folder; wait for its end, or stop it"
            ) from None
        except OSError as error:  # of some network file systems
            self._lock = None
            print(
                f"warning: {self.folder}: no lock can be taken there ({error.strerror}), so nothing keeps a second process out",
                file=sys.stderr,
            )
        if self.recipe.run.resume is None:
            return
        for name in _GROWING:
            file = self.folder / name
            if file.is_file():
                os.truncate(file, min(file.stat().st_size, self._sizes.get(name, 0)))
        newest = -1 if self.checkpoint is None else step_of(self.checkpoint)
        for folder in checkpoints_of(self.folder):
            if step_of(folder) > newest:  # damaged, and about to be written again
                self.say(f"{folder} is kept as {set_aside(folder).name}")
        for folder in (*self.folder.glob(".*.tmp"), *self.folder.glob("best-*")):
            if folder.name.startswith(".") or step_of(folder) > newest:  # half a checkpoint, or one that will be written again
                shutil.rmtree(folder)

    # --- what a checkpoint holds of the run ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As JSON; on the main process, after which the files it speaks of are on the disk."""
        sizes = {}
        for name in _GROWING:
            file = self.folder / name
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                sizes[name] = file.stat().st_size
        return {"files": sizes, "findings": [asdict(finding) for finding in self.findings], "memory": self.memory}

    def _restore(self, checkpoint: Path) -> None:
        resume = json.loads((checkpoint / RESUME).read_text(encoding="utf-8"))
        saved, self.checkpoint, self.last_step = resume["run"], checkpoint, resume["before"]
        self.findings = [Finding(**finding) for finding in saved["findings"]]
        self.memory, self._sizes = saved["memory"], saved["files"]

    def take_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, given to the first trainer that asks."""
        checkpoint, self.checkpoint = self.checkpoint, None
        return checkpoint

    def last_checkpoint(self) -> str:
        """The newest whole one, for a message."""
        found = next((folder for folder in checkpoints_of(self.folder) if damage(folder) is None), None)
        return f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"

    # --- what a run writes ---------------------------------------------------------------------------------------

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """One line of metrics.jsonl (and of timing.jsonl), and the same to the trackers."""
        self.last_step = step
        if not self.main:
            return
        self.trackers.each(lambda tracker: tracker.log(metrics, step))
        timing = {k: v for k, v in metrics.items() if k in _TIMINGS or k.endswith(_TIMING_ENDS)}
        self.write_lines("metrics.jsonl", [{"step": step, **{k: v for k, v in metrics.items() if k not in timing}}])
        if timing:
            self.write_lines("timing.jsonl", [{"step": step, **timing}])

    def write_lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Appends rows to a .jsonl file of the run."""
        if self.main:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def write_samples(self, rows: list[dict[str, Any]]) -> None:
        """samples.jsonl, and the same as a table of the trackers; `rows` are of equal keys."""
        self.write_lines("samples.jsonl", rows)
        self.trackers.each(lambda tracker: tracker.table("samples", rows))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        if self.main:
            (self.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def record(self, about: dict[str, Any]) -> None:
        """Adds to what run.json says."""
        self.write_json(RUN, read_run(self.folder) | about)

    def write_batch(self, name: str, batch: dict[str, Any]) -> Path:
        """The tensors of a batch, by every process that calls it."""
        file = self.folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in batch.items() if isinstance(value, Tensor)}, file)
        share(self.folder)
        return file

    def save_backbone(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """A whole model in `model.save_dtype`, as safetensors, with its tokenizer, under `model/`."""
        if self.main:
            import torch

            _make_savable(model, tokenizer)
            model.to(getattr(torch, self.recipe.model.save_dtype)).save_pretrained(self.folder / MODEL)
            tokenizer.save_pretrained(self.folder / MODEL)
            share(self.folder / MODEL)

    def save_adapter(self, model: PeftModel, folder: Path) -> None:
        """An adapter (and its score head) in PEFT's format, as safetensors."""
        if self.main:
            model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the Hub
            share(folder)

    def say(self, line: str) -> None:
        """One line for the person who watches, from the main process."""
        if self.main:
            print(line)

    def found(self, finding: Finding, step: int) -> None:
        """Says what goes wrong: in the terminal, as an alert of the trackers, and in the summary."""
        self.findings.append(finding)
        if self.main:
            tqdm.write(f"step {step}: {finding}", file=sys.stderr)
        text = f"step {step}: {finding.evidence}. {finding.advice}"
        self.trackers.each(lambda tracker: tracker.alert(finding.name, text))

    def finish(self, summary: dict[str, Any], card: str = "") -> dict[str, Any]:
        """Writes summary.json = {task, stage, seed, beta, seconds, **summary} and the model card, and returns it."""
        recipe = self.recipe
        summary = {
            "task": recipe.task,
            "stage": self.stage,
            "seed": recipe.run.seed,
            "beta": recipe.objective.beta,
            "seconds": round(time.perf_counter() - self.started, 1),
            **summary,
        }
        if STAGES[self.stage].online:
            summary["findings"] = [asdict(finding) for finding in self.findings]
        if self.main:
            (self.folder / "README.md").write_text(_model_card(self, summary, card), encoding="utf-8")
            self.trackers.each(lambda tracker: tracker.finish(summary))
            self.write_json(SUMMARY, summary)  # the last of all: a run that has it is finished
            print(f"{self.stage}: {self.folder}")
        if self._lock is not None:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)
        PartialState().wait_for_everyone()  # what looks for finished runs next finds the same ones on every process
        return summary


def _make_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers saves no generation config with a warning in it once that has been changed, as a Trainer does to the ends:
    published ones name a temperature and leave out `do_sample`."""
    config = model.generation_config
    for changes in ({}, {"do_sample": True}):
        config.update(**changes)
        with suppress(ValueError):
            config.validate(strict=True)
            return
    ends = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, **ends)


def _point_latest(folder: Path) -> None:
    """`latest` beside it -> the newest run, replaced in one step; a file with its name where links cannot be made."""
    temporary = folder.with_name(f".{LATEST}-{secrets.token_hex(4)}")
    try:
        temporary.symlink_to(folder.name)
    except OSError:
        temporary.write_text(folder.name + "\n", encoding="utf-8")
    temporary.replace(folder.with_name(LATEST))


def _model_card(run: Run, summary: dict[str, Any], text: str) -> str:
    versions = ", ".join(f"{p} {version(p)}" for p in ("trl", "transformers", "peft", "torch"))
    return "\n".join([
        "---", "library_name: peft", f"tags: [trl, {run.stage}, rlhf-recipes]", "---", "",
        f"# {run.recipe.task}: {run.stage}", "",
        f"Made by `scripts/{run.stage}.py` of RLHF Recipes from the recipe `{run.recipe.task}`, seed {run.recipe.run.seed}, "
        f"with {versions}. `recipe.resolved.yaml` beside this file is the whole recipe.", "",
        text, "", "```json", json.dumps(summary, indent=2), "```", "",
    ])  # fmt: skip
