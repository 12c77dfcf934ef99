"""The keys of `ppo` and `a2c`: what their loop reads, under TRL's and transformers' names and defaults where these have one.

Nothing heavy is imported here. The config that TRL's constructor needs is these and TRL's own (algorithms/ppo_config.py).
"""

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_recipes.recipe.stages import STAGES


@dataclass  # not frozen: TRL's constructor fills its part of the config in
class A2CSettings:
    """One step on each rollout."""

    # how much is sampled
    per_device_train_batch_size: int = 8  # in one forward and backward pass
    gradient_accumulation_steps: int = 1  # times the batch size: the episodes of a process in each update
    total_episodes: int | None = None
    num_train_epochs: float = 3.0  # passes over the prompts, in place of `total_episodes`
    local_rollout_forward_batch_size: int = 64  # completions sampled and scored at a time

    # the optimizer
    learning_rate: float = 3e-6
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict | str | None = None
    warmup_steps: float = 0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 0.0  # 0 never clips, as TRL's PPO

    # advantages and the value function
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True  # unit variance and zero mean, as TRL always has them
    value: Literal["trunk", "adapter"] = "trunk"  # a head on the policy's trunk, or a LoRA adapter and head of its own
    vf_coef: float = 0.1
    reward_baseline: bool = False  # V(s) is the reward of the text so far plus what the value function learns beside it

    # the leash: how the KL is charged, and to whom (algorithms/leash.py)
    kl: Literal["reward", "loss", "full"] = "reward"
    kl_estimator: Literal["k1", "k3"] = "k1"  # from the sampled token, of `kl: reward` and `kl: loss`
    kl_target: float | None = None  # beta starts at objective.beta and adapts to keep the KL at so many nats a completion
    kl_horizon: int = 10000  # episodes in which `kl_target` changes beta by at most 20%
    reference: Literal["frozen", "sync", "none"] = "frozen"  # the backbone, the policy some updates ago, or nobody
    reference_sync_steps: int = 10  # updates after which `reference: sync` follows the policy

    # held-out prompts, and the best policy on them
    eval_strategy: str = "no"
    eval_steps: float | None = None
    eval_on_start: bool = False
    metric_for_best_model: str | None = None
    load_best_model_at_end: bool = False

    # checkpoints
    save_strategy: str = "steps"
    save_steps: float = 10  # updates, which are expensive
    save_total_limit: int | None = 2  # null keeps all


@dataclass
class PPOSettings(A2CSettings):
    """Several steps on each rollout, clipped."""

    num_ppo_epochs: int = 4
    num_mini_batches: int = 1  # optimizer steps in an epoch
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    target_kl: float | None = None  # an update's remaining epochs are left out once it moved the policy so many nats a token


def online_settings(stage: str, section: dict[str, Any]) -> PPOSettings:
    """Of a recipe's section `ppo` or `a2c`."""
    return PPOSettings(**STAGES[stage].defaults, **section)
