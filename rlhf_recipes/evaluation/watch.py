"""The watch: what goes wrong is said while a run lasts, and acted upon."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from rlhf_recipes.evaluation.diagnosis import diagnose
from rlhf_recipes.recipe.stages import STAGES
from rlhf_recipes.runs.callbacks import ProgressBar, RunLogger
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.trainer import Resumable


class Watch(TrainerCallback):
    """Diagnoses a PPO or A2C run at every held-out evaluation and at its end, and says each finding once.

    On reward hacking it does what `watch.on_over_optimisation` says; with `rollback` the trainer keeps the best policy by gold,
    and loads it as it stops.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        reward = run.recipe.reward
        reads_end = any(term.adapter and term.read_eos for term in reward.all_terms())
        self.ends_matter = reads_end or bool(reward.missing_eos_penalty)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._act(args, control)  # a resumed run may have been about to stop

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._look(state)
        return self._act(args, control)

    def _act(self, args: Any, control: Any) -> Any:
        action = self.run.recipe.watch.on_over_optimisation
        if action != "warn" and any(finding.name == "reward hacking" for finding in self.run.findings):
            control.should_training_stop = True
            args.load_best_model_at_end = action == "rollback"
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state)

    def _look(self, state: Any) -> None:
        known = {finding.name for finding in self.run.findings}
        for finding in diagnose(state.log_history, self.run.stage, self.ends_matter):
            if finding.name not in known:
                self.run.found(finding, state.global_step)


def watch(trainer: Resumable, run: Run) -> None:
    """Makes the trainer part of the run: checkpoints, the run's logger, and one progress bar in place of the trainer's."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunLogger(run))
    trainer.add_callback(ProgressBar(run.stage, STAGES[run.stage].shown))
    trainer.attach(run)
