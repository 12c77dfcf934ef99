"""One yardstick for every policy: its metrics on held-out prompts with 95% intervals, and how far from the optimum it is."""

import math
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.evaluation.judging import Completions, distinct_n
from rlhf_recipes.metrics import SMALL_EFFECTIVE_SIZE
from rlhf_recipes.optimum import (
    best_of_n_kl,
    best_of_n_weights,
    bootstrap_interval,
    estimate_optimal_objective,
    fraction_of_optimum,
    optimal_frontier_point,
    wins,
)
from rlhf_recipes.recipe.errors import RecipeError, nearest
from rlhf_recipes.recipe.sections import EvaluateSection, resolved
from rlhf_recipes.recipe.stages import JUDGED
from rlhf_recipes.runs.fingerprint import another_backbone, differences, of_pairs, recorded_fingerprint
from rlhf_recipes.runs.resume import newest_run, trials_of

Metrics = dict[str, dict[str, float]]
FRONTIER_BETAS = (0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.4, 0.6, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Judged:
    """What scripts/evaluate.py is asked to judge: the reference, best-of-n, or a policy in a folder."""

    name: str
    best_of: int | None = None
    folder: Path | None = None
    trained_for: dict[str, Any] | None = None  # its run's fingerprint, where there is one

    @property
    def run(self) -> str:
        """STAGE/RUN of a policy in a folder, else nothing."""
        return f"{self.folder.parent.name}/{self.folder.name}" if self.folder else ""


BEST_OF = (4, 16, 64)


def policies_to_judge(section: EvaluateSection, runs: Path, folder: Path) -> list[Judged]:
    """`evaluate.policies` as `Judged`, the reference always among them and first; the default if there are none.

    Args:
        runs: the folder of the task's runs, which the default is taken from.
        folder: the recipe's, beside which other folders are looked for.

    Raises:
        RecipeError: a word is none of `reference`, `best-of-N`, [NAME=]FOLDER; two have one name; best-of-N needs more
            completions of the reference.
    """
    most, words = section.reference_completions, section.policies
    if words is None:
        words = [f"best-of-{n}" for n in BEST_OF if n <= most]
        for stage in JUDGED:
            newest = newest_run(runs / stage)  # `latest` also links to runs that still last, or failed
            words += [] if newest is None else [f"{stage}={newest}"]
    judged = [Judged("reference")]
    for word in words:
        name, equals, path = word.rpartition("=")
        named = Path(resolved(path, folder))
        if word == "reference":
            continue
        if best_of := re.fullmatch(r"best-of-(\d{1,9})", word):
            n = int(best_of[1])
            if not 1 <= n <= most:
                raise RecipeError(
                    f"`evaluate.policies`: {word}: `evaluate.reference_completions` is {most}, and N at most that"
                )
            judged.append(Judged(word, best_of=n))
        elif os.path.isdir(named):  # false, not an error, for what can be no folder's name
            run = named.resolve()
            if not any((run / file).is_file() for file in ("adapter_config.json", "config.json")):
                raise RecipeError(
                    f"`evaluate.policies`: {word}: neither an adapter (adapter_config.json) nor a full model in it"
                )
            name = name if equals else f"{run.parent.name}/{run.name}"
            judged.append(Judged(name, folder=run, trained_for=recorded_fingerprint(run)))
        else:
            raise RecipeError(
                f"`evaluate.policies`: {word} is no folder; expected `reference`, `best-of-N` or [NAME=]FOLDER of an adapter "
                f"or a full model{nearest(word, ['reference'])}"
            )
    names = [policy.name for policy in judged]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"`evaluate.policies`: two are named {name}; name them apart with NAME=FOLDER")
    return judged


def left_out(section: EvaluateSection, runs: Path) -> list[str]:
    """What the default of `evaluate.policies` does not judge, and why, a line each."""
    if section.policies is not None:
        return []
    most = section.reference_completions
    too_many = [f"best-of-{n}" for n in BEST_OF if n > most]
    lines = [f"left out: {', '.join(too_many)}, as `evaluate.reference_completions` is {most}"] if too_many else []
    for stage in JUDGED:
        trials = trials_of(runs / stage)
        if trials and newest_run(runs / stage) is None:
            lines.append(
                f"left out: {len(trials)} runs of {stage}, which are trials of sweeps; one is judged by its folder: "
                f"--evaluate.policies '[{trials[0]}]'"
            )
    return lines


def trained_for_others(policies: list[Judged], judged_by: dict[str, Any]) -> list[str]:
    """Policies that were trained for something else than they are judged by here, a line each.

    Args:
        judged_by: the evaluation's fingerprint.

    Raises:
        RecipeError: an adapter was trained on another backbone.
    """
    lines = []
    for policy in policies:
        found = differences(policy.trained_for, judged_by)
        adapter = policy.folder is not None and (policy.folder / "adapter_config.json").is_file()
        if adapter and (other := another_backbone(policy.trained_for, judged_by)):
            raise RecipeError(f"`evaluate.policies`: {policy.folder}: an adapter trained on {other}")
        if not adapter:
            found.pop("backbone", None)  # a model of its own stands on none
        if of_pairs(policy.trained_for):  # no reward of its own to be taken for this one
            found.pop("reward", None)
        if found:
            lines.append(f"{policy.name} ({policy.run}) was trained for another objective: {'; '.join(found.values())}")
    derived = [policy.name for policy in policies if (policy.trained_for or {}).get("derived")]
    if derived:
        lines.append(
            f"{', '.join(derived)}: trained before runs recorded what they maximise; what their recipe.resolved.yaml says is "
            f"taken, with its files as they are now"
        )
    return lines


@dataclass
class Optimum:
    """J* of each prompt [prompts], as far as the samples of `proposal` show it, and their effective sample size.

    Of few samples it is a bound: the estimate is low on average, and an interval would be of the bound and not of J*.
    """

    objective: Tensor
    effective_sample_size: Tensor
    proposal: str

    def to_dict(self) -> dict[str, Any]:
        size = self.effective_sample_size.mean().item()
        return {
            "objective": self.objective.mean().item(),
            "effective_sample_size": size,
            "bound": size < SMALL_EFFECTIVE_SIZE,
            "proposal": self.proposal,
        }


def evaluation_of(
    judged: dict[str, Completions],
    policies: list[Judged],
    beta: float,
    section: EvaluateSection,
    judged_by: dict[str, Any],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        judged: the completions of the reference and of every policy in a folder, by name.
        policies: what to report, in this order.
        judged_by: the evaluation's fingerprint.
        notes: what a reader should know beside the numbers.
    """
    reference = judged["reference"]
    for name, completions in judged.items():
        unjudged = int(completions.reward.isnan().sum())
        if unjudged:
            raise RecipeError(f"the reward has no opinion on {unjudged} completions of {name}; a yardstick needs one on each")
    optimum = estimate_optimum(judged, beta)
    from_reference = estimate_optimum({"reference": reference}, beta)
    return {
        "beta": beta,
        "prompts": len(reference.reward),
        "completions": section.completions,
        "reference_completions": section.reference_completions,
        "optimum": optimum.to_dict() | {"from_reference": from_reference.to_dict()},
        "policies": {
            policy.name: (
                measure_best_of_n(reference, policy.best_of, optimum, beta)
                if policy.best_of is not None
                else measure(judged[policy.name], reference, optimum, beta)
            )
            for policy in policies
        },
        "folders": {policy.name: str(policy.folder) for policy in policies if policy.folder is not None},
        "runs": {policy.name: policy.run for policy in policies if policy.folder is not None},
        "judged_by": judged_by,
        "trained_for": {policy.name: policy.trained_for for policy in policies if policy.folder is not None},
        "notes": list(notes),
        "frontiers": frontiers(judged),
    }


def estimate_optimum(judged: dict[str, Completions], beta: float) -> Optimum:
    """The highest of the estimates of J* from each policy's samples: all of them are low on average (objective.py)."""
    estimates = [
        Optimum(*estimate_optimal_objective(completions.reward, beta, completions.kl), proposal=name)
        for name, completions in judged.items()
    ]
    return max(estimates, key=lambda optimum: optimum.objective.mean().item())


def measure(policy: Completions, reference: Completions, optimum: Optimum, beta: float) -> Metrics:
    """Every metric of the yardstick as mean, low and high.

    The intervals are bootstrapped over prompts, except distinct_2's, which depends on how many texts are pooled: it is
    taken over one completion of every prompt, and the interval is over the K such sets (normal, standard error).
    """
    by_prompt = {
        "reward": policy.reward.mean(1),
        "kl": policy.kl.mean(1),
        "kl_k3": policy.kl_k3.mean(1),
        "objective": (policy.reward - beta * policy.kl).mean(1),
        "win_rate": wins(policy.reward, reference.reward).mean(1),
        "length": policy.length.float().mean(1),
    }
    if len(policy.terms) > 1:
        by_prompt |= {f"reward_{name}": own.nanmean(1) for name, own in policy.terms.items()}
    if policy.gold is not None and reference.gold is not None:
        by_prompt["gold"] = policy.gold.mean(1)
        by_prompt["gold_win_rate"] = wins(policy.gold, reference.gold).mean(1)
    sets = [[row[k] for row in policy.texts] for k in range(policy.reward.shape[1])]
    return _with_intervals(by_prompt, reference, optimum, sets)


def measure_best_of_n(reference: Completions, n: int, optimum: Optimum, beta: float) -> Metrics:
    """The same metrics for best-of-n by the reward, exactly over all n-subsets of the reference's samples.

    Its KL is the closed form log n - (n - 1) / n, for both estimators. Its opponents in a win are the same samples, itself
    among them, so a win rate of n / (n + 1) reads up to 1 / (2K) higher with K samples.
    """
    weights = best_of_n_weights(reference.reward, n)
    kl = torch.full((len(weights),), best_of_n_kl(n))
    reward = (weights * reference.reward).sum(1)
    by_prompt = {
        "reward": reward,
        "kl": kl,
        "kl_k3": kl,
        "objective": reward - beta * kl,
        "win_rate": (weights * wins(reference.reward, reference.reward)).sum(1),
        "length": (weights * reference.length).sum(1),
    }
    if len(reference.terms) > 1:
        for name, own in reference.terms.items():
            known = weights * ~own.isnan()
            by_prompt[f"reward_{name}"] = (known * own.nan_to_num()).sum(1) / known.sum(1)
    if reference.gold is not None:
        by_prompt["gold"] = (weights * reference.gold).sum(1)
        by_prompt["gold_win_rate"] = (weights * wins(reference.gold, reference.gold)).sum(1)
    groups = reference.reward.shape[1] // n
    best = [reference.reward[:, g * n : (g + 1) * n].argmax(1) + g * n for g in range(groups)]
    sets = [[row[k] for row, k in zip(reference.texts, chosen.tolist(), strict=True)] for chosen in best]
    return _with_intervals(by_prompt, reference, optimum, sets)


def _with_intervals(by_prompt: dict[str, Tensor], reference: Completions, optimum: Optimum, sets: list[list[str]]) -> Metrics:
    base = reference.reward.mean(1)
    prompts = len(base)
    metrics = {}
    for name, values in by_prompt.items():
        low, high = bootstrap_interval(partial(_mean_of, values), prompts)
        metrics[name] = {"mean": _mean_of(values, torch.arange(prompts)).item(), "low": low, "high": high}

    def fraction(draws: Tensor) -> Tensor:
        return fraction_of_optimum(by_prompt["objective"][draws], base[draws], optimum.objective[draws])

    low, high = bootstrap_interval(fraction, prompts)
    metrics["fraction_of_optimum"] = {"mean": fraction(torch.arange(prompts)).item(), "low": low, "high": high}
    distinct = torch.tensor([distinct_n(texts, 2) for texts in sets])
    error = 1.96 * distinct.std().item() / math.sqrt(len(sets)) if len(sets) > 1 else 0.0
    mean = distinct.mean().item()
    metrics["distinct_2"] = {"mean": mean, "low": mean - error, "high": mean + error}
    return metrics


def _mean_of(values: Tensor, draws: Tensor) -> Tensor:
    """NaN is a prompt on whose completions a term of the reward has no opinion."""
    drawn = values[draws]
    return drawn.nanmean(-1) if values.isnan().any() else drawn.mean(-1)


def frontiers(judged: dict[str, Completions]) -> dict[str, list[dict[str, Any]]]:
    """The optimal reward-KL frontier over FRONTIER_BETAS, each point from the proposal with the largest effective sample
    size, and best-of-n's, from the reference's samples."""
    optimal = []
    for beta in FRONTIER_BETAS:
        points = []
        for name, completions in judged.items():
            reward, kl, size = (x.mean().item() for x in optimal_frontier_point(completions.reward, beta, completions.kl))
            points.append({"beta": beta, "reward": reward, "kl": kl, "effective_sample_size": size, "proposal": name})
        optimal.append(max(points, key=lambda point: point["effective_sample_size"]))
    rewards = judged["reference"].reward
    best_of_n, n = [], 1
    while n <= rewards.shape[1]:
        reward = (best_of_n_weights(rewards, n) * rewards).sum(1).mean().item()
        best_of_n.append({"n": n, "kl": best_of_n_kl(n), "reward": reward})
        n *= 2
    return {"optimal": optimal, "best_of_n": best_of_n}
