"""Trainers that lose nothing: checkpoints from which a run resumes bit for bit, a guard against steps that are not finite, and
an orderly end when a signal asks for one."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from rlhf_recipes import interrupts
from rlhf_recipes.process import stop_together
from rlhf_recipes.recipe.errors import RecipeError, StoppedError
from rlhf_recipes.runs.checkpoints import RESUME, STATE, prune, write_checkpoint
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.sharding import is_sharded, whole_weights
from rlhf_recipes.runs.state import optimizer_state, random_state, restore_optimizer, restore_random_state

_OPTIMIZER = "optimizer.safetensors"


class Resumable(Trainer):
    """A transformers Trainer whose checkpoints are ours; put it before TRL's trainer among the bases.

    Beside weights, optimizer and schedule a checkpoint holds what transformers' own leaves out or pickles: the random states,
    now and when the epoch's order was drawn, of every process; the losses and TRL metrics since the last log; how long
    metrics.jsonl was; the findings.
    """

    state: Any
    control: Any
    optimizer: Any
    lr_scheduler: Any
    run: Run | None = None
    skipped_steps = 0  # optimizer steps left out since the run began
    skipped_in_a_row = 0
    batch: dict[str, Any] | None = None  # of the step at hand
    epoch_random: dict[str, Any] | None = None  # before the epoch's order was drawn
    interrupted = False
    _before = 0  # optimizer steps of the run's earlier rounds
    _saved_step: int | None = None
    _restored: dict[str, Any] | None = None

    def attach(self, run: Run) -> None:
        """Makes this trainer part of a run that has begun, and resumes from the run's checkpoint if it has one."""
        self.args.output_dir = str(run.folder)
        self.run, self._before = run, run.last_step
        self.add_callback(Keeper(self))

    def try_optimizer(self) -> None:
        """transformers looks at `optim` and the schedule's arguments only as it trains: builds both, and drops them."""
        if not is_sharded(self):
            self.create_optimizer_and_scheduler(num_training_steps=1)
            self.optimizer, self.lr_scheduler, self._created_lr_scheduler = None, None, False

    def refuse_no_batch(self, section: str, rows: int) -> None:
        """
        Raises:
            RecipeError: `dataloader_drop_last` leaves no batch of so few rows, and nothing would be trained.
        """
        batch = self.args.per_device_train_batch_size * self.accelerator.num_processes
        if self.args.dataloader_drop_last and rows < batch:
            raise RecipeError(
                f"`{section}.dataloader_drop_last`: the {rows} rows are less than one batch of {batch}, and nothing would be "
                f"trained; leave it out, or lower `{section}.per_device_train_batch_size`"
            )

    # --- training ------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains from the run's checkpoint, or from the beginning.

        Raises:
            Interrupted: a signal came; the checkpoint is saved.
            StoppedError: too many steps in a row were not finite, or the disk is full.
        """
        checkpoint = self.run.take_checkpoint() if self.run is not None else None
        if checkpoint is not None:
            self._restored = json.loads((checkpoint / RESUME).read_text(encoding="utf-8"))
            self.load_weights(checkpoint)
        with interrupts.training() if self.run is not None else contextlib.nullcontext():
            result = self._train(checkpoint)
        if self.run is not None:
            self.run.last_step = self._before + self.state.global_step
            if self.interrupted:
                raise interrupts.Interrupted(f"ended after step {self.run.last_step}, as asked; {self.run.last_checkpoint()}")
        return result

    def _train(self, checkpoint: Path | None) -> Any:
        if checkpoint is None or self._restored is None or not self._restored["finished"]:
            return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # killed after its last step: transformers would take one more
        self.load_state(checkpoint)
        self._tr_loss = torch.tensor(0.0, device=self.args.device)
        self.model.train()  # TRL asks it which metrics to log
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        return self._finalize_training(None, num_train_samples=0, start_time=time.time())

    def load_state(self, checkpoint: Path) -> None:
        """The TrainerState that was saved, on this process."""
        self.state = type(self.state).load_from_json(str(checkpoint / STATE))
        self.state.is_local_process_zero, self.state.is_world_process_zero = (
            self.is_local_process_zero(), self.is_world_process_zero(),
        )  # fmt: skip

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.batch = inputs
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.skipped_steps:
            logs["skipped_steps"] = self.skipped_steps
        super().log(logs, *args, **kwargs)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save_weights(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        """Writes what is trained; called on the main process. `weights` are given where the model itself is sharded."""
        model: Any = self.accelerator.unwrap_model(self.model)
        options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        model.save_pretrained(folder, state_dict=weights, **options)

    def load_weights(self, folder: Path) -> None:
        """Reads what `save_weights` wrote, before any engine takes the model apart."""
        if isinstance(self.model, PeftModel):
            set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
        else:
            weights = {
                name: value for file in sorted(folder.glob("model*.safetensors")) for name, value in load_file(file).items()
            }
            self.model.load_state_dict(weights, strict=False)

    def own_state(self) -> dict[str, Any]:
        """What a kind of trainer adds: JSON, of this process."""
        mine = {"loss": self._tr_loss.item(), "total_loss": self._total_loss_scalar, "logged": self._globalstep_last_logged}
        return mine | {
            "metrics": {mode: dict(values) for mode, values in getattr(self, "_metrics", {}).items()},
            "tokens": getattr(self, "_total_train_tokens", 0),
        }

    def restore_own_state(self, own: dict[str, Any]) -> None:
        self._tr_loss.fill_(own["loss"])
        self._total_loss_scalar, self._globalstep_last_logged = own["total_loss"], own["logged"]
        self._initial_global_step = 0  # the mean loss is of the whole training run
        for mode, values in own["metrics"].items():
            self._metrics[mode].update(values)
        self._total_train_tokens = own["tokens"]

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-<step>` of the run, once a step, on all processes together; then prunes older ones.

        Raises:
            StoppedError: the disk is full.
        """
        step = self.state.global_step + self._before
        if self.run is None or self._saved_step == step or self.is_deepspeed_enabled or self.skipped_in_a_row:
            return  # DeepSpeed's own state is pickled; and weights that give no finite loss are no place to resume from
        self._saved_step = step
        weights = whole_weights(self)
        tensors, groups = optimizer_state(_inner(self.optimizer, "optimizer"))
        mine = {"random": random_state(self.data_generator), "epoch_random": self.epoch_random, "own": self.own_state()}
        ranks = gather_object([mine])
        failure = None
        if self.accelerator.is_main_process:
            resume = {
                "processes": self.accelerator.num_processes,
                "finished": self.state.global_step >= self.state.max_steps,
                "before": self._before,
                "skipped": self.skipped_steps,
                "schedule": _inner(self.lr_scheduler, "scheduler").state_dict(),
                "optimizer": groups,
                "run": self.run.state(),
                "ranks": ranks,
            }

            def fill(folder: Path) -> None:
                self.save_weights(folder, weights)
                save_file(tensors, folder / _OPTIMIZER)
                self.state.save_to_json(str(folder / STATE))
                (folder / RESUME).write_text(json.dumps(resume) + "\n", encoding="utf-8")

            folder = Path(self.args.output_dir)
            trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
            needed = trained + sum(t.numel() * t.element_size() for t in tensors.values())
            try:
                write_checkpoint(folder / f"checkpoint-{step}", fill, needed)
                prune(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
            except StoppedError as error:
                failure = error
        stop_together(failure)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """transformers calls this where a checkpoint is due."""
        self.store_flos()
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(
                Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step + self._before}"
            )
        self.save_checkpoint()

    @property
    def data_generator(self) -> torch.Generator | None:
        """Of the data's order, where it has one of its own."""
        return None

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """`train` has done it, before any engine took the model apart."""

    def _load_scaler(self, *args: Any, **kwargs: Any) -> None:
        """There is none: nothing trains in float16."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self._restored is not None
        tensors = load_file(Path(checkpoint) / _OPTIMIZER)
        restore_optimizer(_inner(self.optimizer, "optimizer"), tensors, self._restored["optimizer"])
        _inner(self.lr_scheduler, "scheduler").load_state_dict(self._restored["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._restored is not None:
            restore_random_state(self.mine["random"], self.data_generator)

    @property
    def mine(self) -> dict[str, Any]:
        """What the checkpoint that was resumed from says of this process."""
        assert self._restored is not None
        return self._restored["ranks"][self.accelerator.process_index]


def _inner(wrapped: Any, attribute: str) -> Any:
    """Accelerate wraps optimizers and schedulers."""
    return getattr(wrapped, attribute, wrapped)


class Keeper(TrainerCallback):
    """The moments at which a `Resumable` restores, guards, and ends in an orderly way."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer
        self.resumes_epoch = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer._restored is not None:
            trainer.skipped_steps, trainer._saved_step = trainer._restored["skipped"], state.global_step + trainer._before
            trainer.restore_own_state(trainer.mine["own"])
            self.resumes_epoch = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers skips the batches that were seen: they are the same if their order is drawn from the same state."""
        trainer = self.trainer
        if self.resumes_epoch:
            self.resumes_epoch = False
            restore_random_state(trainer.mine["random" if state.epoch % 1 == 0 else "epoch_random"])
        trainer.epoch_random = random_state()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves out a step whose gradient is not finite, on all processes; too many in a row stop the run.

        Raises:
            StoppedError: `run.max_skipped_steps` in a row; their last batch is written to failed_batch-*.safetensors.
        """
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:  # which has the gradients to itself
            return
        parameters = [p for group in trainer.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if _finite(parameters, trainer):
            trainer.skipped_in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None  # an optimizer passes over parameters without one
        trainer.skipped_steps += 1
        trainer.skipped_in_a_row += 1
        assert trainer.run is not None
        run, step = trainer.run, state.global_step + 1 + trainer._before
        if run.main:
            tqdm.write(f"step {step}: a gradient is not finite; this optimizer step is left out")
        if trainer.skipped_in_a_row >= run.recipe.run.max_skipped_steps:
            file = run.write_batch(f"failed_batch-{step}-{trainer.accelerator.process_index}", trainer.batch or {})
            raise StoppedError(
                f"step {step}: {trainer.skipped_in_a_row} optimizer steps in a row had a gradient that is not finite; the last "
                f"batch is in {file}, {run.last_checkpoint()}. Lower the learning rate or look at the batch, then start a "
                f"new run, or resume this one with --resume"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        trainer = self.trainer
        asked = torch.tensor(float(interrupts.requested()), device=args.device)
        if trainer.accelerator.reduce(asked, "sum") > 0:  # a signal may reach one process only
            trainer.interrupted = True
            control.should_save = control.should_training_stop = True
        return control


def _finite(parameters: list[Any], trainer: Resumable) -> bool:
    gradients = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in parameters]
    total = torch.stack(torch._foreach_norm(gradients)).sum() if gradients else torch.zeros((), device=trainer.args.device)
    return math.isfinite(trainer.accelerator.reduce(total, "sum").item())
