"""What watches a training run: its metrics files and trackers, and a progress bar with the numbers that matter."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from rlhf_recipes.metrics import TRAINING
from rlhf_recipes.process import progress_bar
from rlhf_recipes.runs.folder import Run


class RunLogger(TrainerCallback):
    """Writes every log of a trainer to the run's metrics.jsonl and to its trackers."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.before = run.last_step  # a stage of several rounds counts on

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.run.log({k: v for k, v in logs.items() if k != "step"}, step=self.before + state.global_step)


class ProgressBar(TrainerCallback):
    """One bar over the optimizer steps (or PPO updates) with the latest of the metrics `shown`."""

    def __init__(self, title: str, shown: Iterable[str]) -> None:
        self.title, self.shown = title, shown
        self.bar: tqdm | None = None
        self.latest: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = progress_bar(total=state.max_steps, initial=state.global_step, desc=self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.latest |= {TRAINING[name].title: f"{logs[name]:.3g}" for name in self.shown if name in logs}
        if self.bar is not None:
            self.bar.set_postfix(self.latest, refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
