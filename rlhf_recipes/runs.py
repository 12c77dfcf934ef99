"""The run folder `<output>/<task>/<stage>/<run>/`, and what every stage leaves in it."""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.diagnosis import Finding
from rlhf_recipes.recipe import Recipe, RecipeError, load_recipe
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
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def prepare(cls, recipe: Recipe, stage: str) -> "Run":
        """Names the run's folder, the same on every process; writes nothing yet."""
        state = PartialState()
        stage_folder = Path(recipe.run.output) / recipe.task / stage
        if recipe.run.resume is not None:
            folder = stage_folder / "latest" if recipe.run.resume == "latest" else Path(recipe.run.resume)
            _check_resumable(folder, recipe)
            return cls(recipe, stage, folder.resolve(), state.is_main_process)
        name = recipe.run.name or f"{datetime.now():%Y%m%d-%H%M%S}-seed{recipe.run.seed}"
        [name] = broadcast_object_list([name])  # the processes' clocks differ
        return cls(recipe, stage, stage_folder / name, state.is_main_process)

    def start(self) -> None:
        """Makes the folder, writes the resolved recipe, points `latest` at it, and starts tracking.

        Raises:
            RecipeError: the folder exists; nothing is ever overwritten.
        """
        error = None
        if self.main and self.recipe.run.resume is None:
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

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        if self.main:
            (self.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def save_backbone(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """A whole model in `model.save_dtype`, as safetensors, with its tokenizer, under `model/`."""
        if self.main:
            import torch

            model.to(getattr(torch, self.recipe.model.save_dtype)).save_pretrained(self.folder / "model")
            tokenizer.save_pretrained(self.folder / "model")

    def save_adapter(self, model: PeftModel, folder: Path) -> None:
        """An adapter (and its score head) in PEFT's format, as safetensors."""
        if self.main:
            model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the Hub

    def say(self, line: str) -> None:
        """One line for the person who watches, from the main process."""
        if self.main:
            print(line)

    def found(self, finding: Finding, step: int) -> None:
        """Says what goes wrong: in the terminal, as a wandb alert, and in the summary."""
        self.findings.append(finding)
        if self.main:
            tqdm.write(f"step {step}: {finding}", file=sys.stderr)
        if self.tracker is not None:
            self.tracker.alert(finding.name, f"step {step}: {finding.evidence}. {finding.advice}")

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
        if self.stage in ("ppo", "a2c"):
            summary["findings"] = [asdict(finding) for finding in self.findings]
        if self.main:
            self.write_json("summary.json", summary)
            (self.folder / "README.md").write_text(_model_card(self, summary, card), encoding="utf-8")
            if self.tracker is not None:
                self.tracker.finish(summary)
            print(f"{self.stage}: {self.folder}")
        return summary


def _check_resumable(folder: Path, recipe: Recipe) -> None:
    """A run goes on only as the run it was: the same recipe, and not finished yet."""
    resolved = folder / "recipe.resolved.yaml"
    if not resolved.is_file():
        raise RecipeError(f"--resume: {folder} is not a run's folder: it has no recipe.resolved.yaml")
    if (folder / "summary.json").is_file():
        raise RecipeError(f"--resume: {folder} is finished: it has a summary.json")
    then, now = _dotted(load_recipe(resolved)), _dotted(recipe)
    changed = [key for key in now if now[key] != then.get(key) and (key == "run.seed" or not key.startswith("run."))]
    if changed:
        raise RecipeError(f"--resume: {folder} was started with other values of {', '.join(changed)}")


def _dotted(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as `section.key` -> value."""
    sections = {name: section for name, section in recipe.to_dict().items() if isinstance(section, dict)}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


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
