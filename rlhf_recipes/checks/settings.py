"""Checks of values that no type rules out."""

from typing import Any

from rlhf_recipes.metrics import BEST_BY
from rlhf_recipes.recipe.errors import RecipeError, nearest
from rlhf_recipes.recipe.online_settings import PPOSettings, online_settings
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.recipe.stages import Stage

# TRL finds out about others at the first step only
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = frozenset(
    ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
)  # read `label_smoothing`; sigmoid: algorithms/dpo.py
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
SFT_LOSSES = ("nll", "dft", "chunked_nll")
# What TRL and torch find out when the run has begun, or never.
_COUNTS = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_mini_batches",
    "num_ppo_epochs", "total_episodes", "local_rollout_forward_batch_size", "rounds", "kl_horizon", "reference_sync_steps",
    "save_total_limit",
    "max_length", "dataset_num_proc", "pad_to_multiple_of",
}  # fmt: skip
_NOT_NEGATIVE = {
    "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "vf_coef", "cliprange",
    "cliprange_value", "dataloader_num_workers", "neftune_noise_alpha", "logging_steps", "eval_steps", "save_steps",
}  # fmt: skip
_SHARES = {"gamma", "lam", "adam_beta1", "adam_beta2", "label_smoothing", "ld_alpha", "label_smoothing_factor"}


def check_settings(recipe: Recipe, stage: Stage, section: dict[str, Any]) -> None:
    """
    Args:
        section: the stage's own.

    Raises:
        RecipeError: for the first value that would stop the stage later.
    """
    name = stage.section
    check_numbers(name, section)
    if stage.supervised and section.get("loss_type", "nll") not in SFT_LOSSES:
        raise RecipeError(
            f"`{name}.loss_type`: {section['loss_type']!r} is none of {', '.join(SFT_LOSSES)}"
            f"{nearest(section['loss_type'], SFT_LOSSES)}"
        )
    if section.get("packing") and section.get("max_length", 1024) is None:
        raise RecipeError(f"`{name}.packing` fills sequences of `{name}.max_length` tokens, which is null; give a length")
    if stage.trains and not (stage.held_out_loss or stage.online) and section.get("eval_strategy", "no") != "no":
        raise RecipeError(
            f"`{name}.eval_strategy` {section['eval_strategy']}: {stage.name} judges held-out data at its end, and has none "
            f"for TRL while it trains; leave it out"
        )
    if stage.online:
        check_online(recipe, name)
    if "f_divergence_type" in stage.fields:  # its loss is one of DPO's
        check_dpo(recipe)


def check_numbers(name: str, section: dict[str, Any]) -> None:
    """Numbers that no value of TRL's types rules out."""
    for keys, fits, expected in (
        (_COUNTS, lambda n: n >= 1, "at least 1"),
        (_NOT_NEGATIVE, lambda n: n >= 0, "at least 0"),
        (_SHARES, lambda n: 0 <= n <= 1, "a number between 0 and 1"),
        ({"num_train_epochs", "discopop_tau"}, lambda n: n > 0, "more than 0"),
    ):
        for key in sorted(keys & section.keys()):
            if section[key] is not None and not fits(section[key]):
                raise RecipeError(f"`{name}.{key}`: expected {expected}, got {section[key]}")


def check_dpo(recipe: Recipe) -> None:
    if recipe.objective.beta == 0:
        raise RecipeError(
            "`objective.beta` 0: DPO cannot do without the leash: its loss is a function of beta * log(pi / pi_ref), which "
            "is then zero for every policy. scripts/ppo.py and scripts/a2c.py can"
        )
    if recipe.sampling.temperature != 1:
        raise RecipeError(
            f"`sampling.temperature` {recipe.sampling.temperature}: DPO's loss reads log pi at temperature 1, so its pairs "
            f"must be sampled there"
        )
    dpo = recipe.stages["dpo"]
    for loss in dpo.get("loss_type", []):
        if loss not in DPO_LOSSES:
            raise RecipeError(f"`dpo.loss_type`: {loss!r} is none of TRL's losses{nearest(loss, DPO_LOSSES)}")
    pairs = recipe.preferences
    to_be_made = pairs.source == "sampled" and pairs.path is None
    if to_be_made and pairs.label == "expected" and dpo.get("loss_type", ["sigmoid"]) != ["sigmoid"]:
        raise RecipeError("`preferences.label` expected is a smoothing of the labels that only `dpo.loss_type` [sigmoid] has")
    _check_label_smoothing(dpo.get("label_smoothing", 0), dpo.get("loss_type", ["sigmoid"]))
    divergence = dpo.get("f_divergence_type", "reverse_kl")
    if divergence not in F_DIVERGENCES:
        raise RecipeError(f"`dpo.f_divergence_type`: {divergence!r} is none of TRL's{nearest(divergence, F_DIVERGENCES)}")
    if recipe.preferences.source == "task" and dpo.get("rounds", 1) > 1:
        raise RecipeError("`dpo.rounds` samples new pairs, but `preferences.source` is `task`; use one of the two")


def _check_label_smoothing(smoothing: float, losses: list[str]) -> None:
    """What it means is the losses' to say."""
    if "exo_pair" in losses and not smoothing:
        raise RecipeError("`dpo.loss_type` exo_pair needs a `dpo.label_smoothing` above 0; its paper recommends 1e-3")
    if not smoothing:
        return
    if smoothing >= 0.5:
        raise RecipeError(f"`dpo.label_smoothing` {smoothing}: a label that is wrong half of the time says nothing; below 0.5")
    if not SMOOTHED.intersection(losses):
        raise RecipeError(
            f"`dpo.label_smoothing` has no effect on {', '.join(losses)}: only {', '.join(sorted(SMOOTHED))} read it; "
            f"leave it out"
        )
    others = sorted(SMOOTHED.intersection(losses) - {"sigmoid"})
    if "sigmoid" in losses and others:
        raise RecipeError(
            f"`dpo.label_smoothing` is another thing to sigmoid (labels that are wrong with this probability) than to "
            f"{', '.join(others)}; leave one of them out of `dpo.loss_type`"
        )


def check_online(recipe: Recipe, stage: str) -> None:
    settings = online_settings(stage, recipe.stages[stage])
    episodes = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    if episodes % settings.num_mini_batches:
        raise RecipeError(
            f"`{stage}.num_mini_batches` {settings.num_mini_batches} does not divide the {episodes} episodes of a process "
            f"(per_device_train_batch_size x gradient_accumulation_steps)"
        )
    _check_held_out(recipe, stage, settings)
    if settings.reward_baseline and not any(term.adapter for term in recipe.reward.all_terms()):
        raise RecipeError(
            f"`{stage}.reward_baseline` reads unfinished text, which a reward adapter can; `reward` has none: give "
            f"--{stage}.reward_baseline=false"
        )
    if settings.save_strategy not in ("no", "steps"):
        raise RecipeError(
            f"`{stage}.save_strategy` {settings.save_strategy}: PPO counts updates, not epochs; use steps or no. The best is "
            f"kept by `{stage}.metric_for_best_model`"
        )
    if settings.save_steps < 1 or settings.save_steps % 1:
        raise RecipeError(f"`{stage}.save_steps`: expected a whole number of updates, got {settings.save_steps}")
    _check_leash(recipe.objective.beta, stage, settings, episodes)
    if settings.whiten_rewards:
        minibatch = episodes // settings.num_mini_batches
        if minibatch < 8:
            raise RecipeError(f"`{stage}.whiten_rewards` needs minibatches of at least 8 episodes, not {minibatch}")
        for key, in_use in (("kl", settings.kl != "reward"), ("reward_baseline", settings.reward_baseline)):
            if in_use:
                raise RecipeError(
                    f"`{stage}.{key}` {getattr(settings, key)} is in units of the reward, which `{stage}.whiten_rewards` "
                    f"changes; drop one"
                )


def _check_leash(beta: float, stage: str, settings: PPOSettings, episodes: int) -> None:
    """How the KL is charged, and to whom."""
    for key, nats in (("kl_target", settings.kl_target), ("target_kl", settings.target_kl)):
        if nats is not None and nats <= 0:
            raise RecipeError(f"`{stage}.{key}`: expected more than 0 nats, got {nats}")
    if settings.kl_target is not None and beta == 0:
        raise RecipeError(f"`{stage}.kl_target` multiplies `objective.beta`, which is 0; start from a small one such as 0.01")
    if settings.kl_target is not None and settings.kl_horizon < episodes:
        raise RecipeError(
            f"`{stage}.kl_horizon` {settings.kl_horizon}: beta would jump; expected at least the {episodes} episodes of one "
            f"update"
        )
    if settings.reference == "none" and (beta != 0 or settings.kl != "reward"):
        raise RecipeError(
            f"`{stage}.reference` none: without a reference there is no KL to charge; say so with --objective.beta=0 and "
            f"--{stage}.kl=reward, or keep the reference"
        )


def _check_held_out(recipe: Recipe, stage: str, settings: PPOSettings) -> None:
    """Evaluation during training, and what is kept by it."""
    if settings.eval_strategy not in ("no", "steps"):
        raise RecipeError(f"`{stage}.eval_strategy` {settings.eval_strategy}: PPO counts updates, not epochs; use steps or no")
    evaluates, best = settings.eval_strategy == "steps", settings.metric_for_best_model
    action = recipe.watch.on_over_optimisation
    if action != "warn" and not evaluates:
        raise RecipeError(f"`watch.on_over_optimisation` {action} needs `{stage}.eval_strategy` steps and `{stage}.eval_steps`")
    if action == "rollback" and best not in (None, "gold"):
        raise RecipeError(
            f"`watch.on_over_optimisation` rollback ends with the best policy by gold, and `{stage}.metric_for_best_model` "
            f"says {best}; leave that out"
        )
    if evaluates and (settings.eval_steps is None or settings.eval_steps < 1 or settings.eval_steps % 1):
        raise RecipeError(f"`{stage}.eval_steps`: expected a whole number of updates, got {settings.eval_steps}")
    if best is not None and best not in BEST_BY:
        raise RecipeError(f"`{stage}.metric_for_best_model`: {best!r} is none of {', '.join(BEST_BY)}{nearest(best, BEST_BY)}")
    for key, value in (("metric_for_best_model", best), ("load_best_model_at_end", settings.load_best_model_at_end)):
        if value and not evaluates:
            raise RecipeError(f"`{stage}.{key}` needs `{stage}.eval_strategy` steps and `{stage}.eval_steps`")
    if settings.load_best_model_at_end and best is None:
        raise RecipeError(f"`{stage}.load_best_model_at_end` needs `{stage}.metric_for_best_model`, such as objective")
