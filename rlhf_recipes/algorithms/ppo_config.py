"""TRL's PPO, and the config that its constructor needs, made of our settings.

The only file that imports `trl.experimental.ppo` (1.12.0 is the last release that has it).
"""

import os
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState

from rlhf_recipes.recipe.online_settings import PPOSettings, online_settings
from rlhf_recipes.recipe.sections import Recipe

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental import ppo as trl_ppo
from trl.experimental.ppo import ppo_trainer as trl_ppo_trainer

__all__ = ["PPOConfig", "episodes_per_update", "ppo_fields", "trl_ppo", "trl_ppo_trainer"]


@dataclass
class PPOConfig(PPOSettings, trl_ppo.PPOConfig):
    """Our settings, with our defaults, and below them the fields of TRL's config that its constructor reads."""

    def __post_init__(self) -> None:
        # transformers ties the best model to the checkpoints' steps; here it is kept by itself, at every evaluation
        best, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()
        self.load_best_model_at_end = best


def ppo_fields(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The facts that PPO shares with other stages, under TRL's field names; and what makes it A2C."""
    settings = online_settings(stage, recipe.stages[stage])
    by_gold = {"metric_for_best_model": "gold"} if recipe.watch.on_over_optimisation == "rollback" else {}
    return {
        "kl_coef": recipe.objective.beta,
        "response_length": recipe.data.max_completion_tokens,
        "temperature": recipe.sampling.temperature,
        "stop_token": "eos",
        "num_sample_generations": 0,
        "eval_on_start": settings.eval_strategy == "steps",  # what the others are compared with
        "num_ppo_epochs": settings.num_ppo_epochs,
        "num_mini_batches": settings.num_mini_batches,
        **by_gold,
    }


def episodes_per_update(settings: PPOSettings) -> int:
    """The rollout's size over all processes: TRL's `batch_size`."""
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps * PartialState().num_processes
