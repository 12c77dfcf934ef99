"""The run folder `<output>/<task>/<stage>/<run>/`, and what every stage leaves in it."""

import json
import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.recipe import Recipe, RecipeError
from rlhf_recipes.tracking import Tracker

# Timings go to wandb and timing.jsonl, so that metrics.jsonl is the same, byte for byte, whenever the run is repeated.
_TIMINGS = ("eps", "_runtime", "_per_second", "total_flos")


@dataclass
class Run:
    """One run of one stage; on processes other than the main one it writes nothing."""

    recipe: Recipe
    stage: str
    folder: Path
    main: bool
    tracker: Tracker | None = None
    started: float = field(default_factory=time.perf_counter)
    last_step: int = 0

    @classmethod
    def prepare(cls, recipe: Recipe, stage: str) -> "Run":
        """Names the run's folder, the same on every process; writes nothing yet."""
        state = PartialState()
        name = recipe.run.name or f"{datetime.now():%Y%m%d-%H%M%S}-seed{recipe.run.seed}"
        [name] = broadcast_object_list([name])  # the processes' clocks differ
        return cls(recipe, stage, Path(recipe.run.output) / recipe.task / stage / name, state.is_main_process)

    def start(self) -> None:
        """Makes the folder, writes the resolved recipe, points `latest` at it, and starts tracking.

        Raises:
            RecipeError: the folder exists; nothing is ever overwritten.
        """
        error = None
        if self.main:
            try:
                self.folder.mkdir(parents=True)
                (self.folder / "recipe.resolved.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
                _point_latest(self.folder)
            except FileExistsError:
                error = f"{self.folder}: this run exists; choose another `--run.name`, nothing is overwritten"
        [error] = broadcast_object_list([error])
        if error:
            raise RecipeError(error)
        self.tracker = Tracker(self.recipe, self.stage, self.folder, enabled=self.main)
        self.started = time.perf_counter()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """One line of metrics.jsonl (and of timing.jsonl), and the same to wandb."""
        self.last_step = step
        if not self.main:
            return
        if self.tracker is not None:
            self.tracker.log(metrics, step=step)
        timing = {k: v for k, v in metrics.items() if k.endswith(_TIMINGS)}
        self.write_lines("metrics.jsonl", [{"step": step, **{k: v for k, v in metrics.items() if k not in timing}}])
        if timing:
            self.write_lines("timing.jsonl", [{"step": step, **timing}])

    def write_lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Appends rows to a .jsonl file of the run."""
        if self.main:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def save_backbone(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """A whole model in `model.save_dtype`, as safetensors, with its tokenizer, under `model/`."""
        if self.main:
            import torch

            model.to(getattr(torch, self.recipe.model.save_dtype)).save_pretrained(self.folder / "model")
            tokenizer.save_pretrained(self.folder / "model")

    def save_adapter(self, model: PeftModel) -> None:
        """An adapter (and its score head) in PEFT's format, as safetensors, under `adapter/`."""
        if self.main:
            model.save_pretrained(self.folder / "adapter", save_embedding_layers=False)  # else PEFT asks the Hub

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
        if self.main:
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            (self.folder / "README.md").write_text(_model_card(self, summary, card), encoding="utf-8")
            if self.tracker is not None:
                self.tracker.finish(summary)
            print(f"{self.stage}: {self.folder}")
        return summary


def _point_latest(folder: Path) -> None:
    """`latest` beside it -> the newest run, replaced in one step."""
    temporary = folder.with_name(f".latest-{os.getpid()}")
    temporary.symlink_to(folder.name)
    temporary.replace(folder.with_name("latest"))


def _model_card(run: Run, summary: dict[str, Any], text: str) -> str:
    versions = ", ".join(f"{p} {version(p)}" for p in ("trl", "transformers", "peft", "torch"))
    return "\n".join([
        "---", "library_name: peft", f"tags: [trl, {run.stage}, rlhf-recipes]", "---", "",
        f"# {run.recipe.task}: {run.stage}", "",
        f"Made by `scripts/{run.stage}.py` of RLHF Recipes from the recipe `{run.recipe.task}`, seed {run.recipe.run.seed}, "
        f"with {versions}. `recipe.resolved.yaml` beside this file is the whole recipe.", "",
        text, "", "```json", json.dumps(summary, indent=2), "```", "",
    ])  # fmt: skip
