"""What goes wrong in PPO and A2C, read off a run's metrics: a pure function from its history to findings.

Each threshold stands with what it was drawn from: runs of recipes/imdb that fail on purpose, and healthy ones
(docs/failures.md has them all).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.runs.folder import Finding

Row = dict[str, Any]  # one line of metrics.jsonl: `step` and metrics by name
FIRST_UPDATES = 3  # what a run is like before it has learned much
LEAST_UPDATES = 8  # fewer say nothing
NOISE = 3.0  # standard errors of a difference: of some ten evaluations the best is picked, so two would be chance
# healthy runs against those that fail:
TIGHT_KL = 0.5  # nats a completion: 8 against 0.0 at a hundred times the beta
LOOSE_KL_PER_TOKEN = 1.0  # nats: 0.27 against 1.1 to 2.5 without a leash
LOW_EXPLAINED_VARIANCE = 0.1  # 0.74 to 0.82 against 0.0 and below
COLLAPSED_ENTROPY = 0.5  # of the start's: 0.9 against 0.36 to 0.4
LENGTH_CORRELATION = 0.5  # with the score: 0.2 against -0.6
LENGTH_CHANGE = 0.25  # of the start's length: 1% against a half
ALL_TRUNCATED = 0.99  # where ends matter: 99.5% at 8 tokens
SAMPLING_GAP = 0.05  # nats a token: 1e-6 against 0.2 to 0.8 with dropout in one of the two
SATURATED_SPREAD = 0.1  # of the start's standard deviation: 1.0 to 1.2
SATURATED_CLIPPED = 0.8  # share at the clip: 95% where it is too low
HIGH_CLIP_FRACTION = 0.4  # 5% against 40% at twenty times the rate
HIGH_STEP_KL = 0.1  # nats a token: 0.005 against 2.5


@dataclass(frozen=True)
class History:
    """The updates' metrics and the held-out evaluations', each in the order of their steps.

    stage: "ppo" or "a2c", the section that advice names.
    ends_matter: the reward depends on whether a completion has ended.
    """

    updates: list[Row]
    evaluations: list[Row]
    stage: str
    ends_matter: bool

    def first(self, name: str) -> float:
        """Mean of a metric over the first updates."""
        return statistics.fmean(row[name] for row in self.updates[:FIRST_UPDATES])

    def peak(self, name: str) -> float:
        """The highest mean of a metric over a few updates in a row: damage that later updates do not repair."""
        return max(self._windows(name))

    def strongest(self, name: str) -> float:
        """The mean farthest from zero of a metric over a few updates in a row."""
        return max(self._windows(name), key=abs)

    def _windows(self, name: str) -> list[float]:
        values = [row[name] for row in self.updates]
        return [statistics.fmean(values[at : at + FIRST_UPDATES]) for at in range(len(values) - FIRST_UPDATES + 1)]

    def recent(self, name: str) -> float:
        """Mean of a metric over the last sixth of the updates."""
        return statistics.fmean(row[name] for row in self.updates[-max(FIRST_UPDATES, len(self.updates) // 6) :])


def diagnose(history: list[Row], stage: str, ends_matter: bool) -> list[Finding]:
    """The findings of a run so far.

    Args:
        history: the lines of metrics.jsonl.
    """
    updates = [row for row in history if "objective/kl" in row]
    evaluations = [row for row in history if "eval/reward_se" in row]
    if len(updates) < LEAST_UPDATES:
        return []
    read = History(updates, evaluations, stage, ends_matter)
    return [finding for check in CHECKS if (finding := check(read)) is not None]


def reward_hacking(h: History) -> Finding | None:
    """Gold has fallen from its best beyond noise, and the reward has risen since (Gao et al. 2022, arXiv 2210.10760)."""
    if len(h.evaluations) < 2 or "eval/gold" not in h.evaluations[-1]:
        return None
    best, last = max(h.evaluations, key=lambda row: row["eval/gold"]), h.evaluations[-1]
    fall, rise = best["eval/gold"] - last["eval/gold"], last["eval/reward"] - best["eval/reward"]
    if fall < NOISE * _error(best, last, "gold") or rise <= 0:
        return None
    return Finding(
        "reward hacking",
        f"from step {best['step']} to {last['step']} the reward rose from {best['eval/reward']:.2f} to "
        f"{last['eval/reward']:.2f} and gold fell from {best['eval/gold']:.3f} to {last['eval/gold']:.3f}, "
        f"{fall / _error(best, last, 'gold'):.1f} standard errors",
        "Raise `objective.beta`, train a better `reward`, or end at the best with `watch.on_over_optimisation: rollback`",
    )


def leash_too_tight(h: History) -> Finding | None:
    if len(h.evaluations) < 2:
        return None
    first, last = h.evaluations[0], h.evaluations[-1]
    rise = last["eval/reward"] - first["eval/reward"]
    if last["eval/kl"] > TIGHT_KL or rise > NOISE * _error(first, last, "reward"):
        return None
    return Finding(
        "leash too tight",
        f"after {len(h.updates)} updates the KL is {last['eval/kl']:.2f} nats a completion and the reward has moved by "
        f"{rise:+.2f} from {first['eval/reward']:.2f}",
        f"Lower `objective.beta`, or raise `{h.stage}.learning_rate`",
    )


def leash_too_loose(h: History) -> Finding | None:
    kl = h.recent("objective/kl") / max(1.0, h.recent("completions/mean_length"))
    if kl < LOOSE_KL_PER_TOKEN:
        return None
    return Finding(
        "leash too loose",
        f"the KL is {h.recent('objective/kl'):.1f} nats a completion, {kl:.2f} a token",
        f"Raise `objective.beta`, or hold the KL with `{h.stage}.kl_target`",
    )


def value_not_learning(h: History) -> Finding | None:
    explained = h.recent("val/explained_variance")
    if explained > LOW_EXPLAINED_VARIANCE:
        return None
    return Finding(
        "value function not learning",
        f"it explains {explained:.2f} of the returns' variance",
        f"Raise `{h.stage}.vf_coef` or train longer; `{h.stage}.reward_baseline` is a head start where the reward model reads "
        f"unfinished text well, and a burden where it does not",
    )


def entropy_collapse(h: History) -> Finding | None:
    first, recent = h.first("policy/entropy_avg"), h.recent("policy/entropy_avg")
    if recent > COLLAPSED_ENTROPY * first:
        return None
    return Finding(
        "entropy collapse",
        f"the entropy fell from {first:.2f} to {recent:.2f} nats a token",
        f"Raise `objective.beta`, or lower `{h.stage}.learning_rate`",
    )


def length_exploitation(h: History) -> Finding | None:
    """The score follows the length, and the length has moved."""
    first, recent = h.first("completions/mean_length"), h.recent("completions/mean_length")
    followed = h.strongest("completions/length_score_correlation")
    if first == 0 or abs(followed) < LENGTH_CORRELATION or abs(recent / first - 1) < LENGTH_CHANGE:
        return None
    if (recent > first) != (followed > 0):
        return None
    return Finding(
        "length exploitation",
        f"length and score correlated by {followed:+.2f}, and the mean length went from {first:.1f} to {recent:.1f} tokens",
        "Charge or credit length with `reward.length_penalty`, or take it out of the reward",
    )


def all_truncated(h: History) -> Finding | None:
    if not h.ends_matter or h.recent("completions/clipped_ratio") < ALL_TRUNCATED:
        return None
    return Finding(
        "all completions truncated",
        f"{h.recent('completions/clipped_ratio'):.1%} have no end, which the reward looks for",
        "Raise `data.max_completion_tokens` or `reward.missing_eos_penalty`, or score unfinished text with `reward.read_eos: "
        "false`",
    )


def sampling_apart(h: History) -> Finding | None:
    gap = h.recent("val/sampling_gap")
    if gap < SAMPLING_GAP:
        return None
    return Finding(
        "sampling and training apart",
        f"the log-probabilities of sampling and training differ by {gap:.3f} nats a token",
        "Use `model.dtype: float32`, or another `model.path`",
    )


def reward_saturated(h: History) -> Finding | None:
    clipped = h.recent("rewards/clipped") if "rewards/clipped" in h.updates[-1] else 0.0
    first, recent = h.first("objective/scores_std"), h.recent("objective/scores_std")
    if clipped < SATURATED_CLIPPED and recent > SATURATED_SPREAD * first:
        return None
    return Finding(
        "reward saturated",
        f"{clipped:.0%} of the rewards are at `reward.clip`, and their standard deviation went from {first:.3f} to "
        f"{recent:.3f}",
        "Raise `reward.clip`, or use a reward that still tells good completions apart",
    )


def learning_rate_too_high(h: History) -> Finding | None:
    """Also where it was so once: what a few such updates break, a decaying rate does not mend."""
    clip, step = h.peak("policy/clipfrac_avg"), h.peak("policy/step_kl")
    if clip < HIGH_CLIP_FRACTION and step < HIGH_STEP_KL:
        return None
    return Finding(
        "learning rate too high",
        f"at its worst {clip:.0%} of the tokens' ratios are clipped, and an update moves the policy by {step:.3f} nats a token",
        f"Lower `{h.stage}.learning_rate`" + (" or `ppo.num_ppo_epochs`, or set `ppo.target_kl`" if h.stage == "ppo" else ""),
    )


CHECKS: tuple[Callable[[History], Finding | None], ...] = (
    reward_hacking,
    leash_too_tight,
    leash_too_loose,
    value_not_learning,
    entropy_collapse,
    length_exploitation,
    all_truncated,
    sampling_apart,
    reward_saturated,
    learning_rate_too_high,
)


def _error(a: Row, b: Row, name: str) -> float:
    """The standard error of the difference of two evaluations."""
    return max(1e-8, (a[f"eval/{name}_se"] ** 2 + b[f"eval/{name}_se"] ** 2) ** 0.5)
