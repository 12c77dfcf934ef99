"""One yardstick for every policy: its metrics on held-out prompts with 95% intervals, and how far from the optimum it is."""

import math
import os.path
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.evaluation import Completions, distinct_n
from rlhf_recipes.objective import (
    best_of_n_kl,
    best_of_n_weights,
    bootstrap_interval,
    estimate_optimal_objective,
    fraction_of_optimum,
    optimal_frontier_point,
    wins,
)
from rlhf_recipes.recipe import Recipe, RecipeError, nearest

Metrics = dict[str, dict[str, float]]

FRONTIER_BETAS = (0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.4, 0.6, 1.0, 2.0, 5.0)
SMALL_EFFECTIVE_SIZE = 10  # samples a prompt; below it an importance-sampling estimate leans on a handful of them


@dataclass(frozen=True)
class Judged:
    """What scripts/evaluate.py is asked to judge: the reference, best-of-n, or a policy in a folder."""

    name: str
    best_of: int | None = None
    folder: Path | None = None


def policies_to_judge(recipe: Recipe) -> list[Judged]:
    """`evaluate.policies` as `Judged`, the reference always among them and first; the default if there are none.

    Raises:
        RecipeError: a word is none of `reference`, `best-of-N`, [NAME=]FOLDER; two have one name; best-of-N needs more
            completions of the reference.
    """
    most = recipe.evaluate.reference_completions
    words = recipe.evaluate.policies
    if words is None:
        words = [f"best-of-{n}" for n in (4, 16, 64) if n <= most]
        for stage in ("ppo", "a2c", "dpo"):
            # `latest` also links to runs that go on or failed
            finished = (Path(recipe.run.output) / recipe.task / stage).glob("*/summary.json")
            newest = max(finished, key=lambda file: file.stat().st_mtime, default=None)
            words += [] if newest is None else [f"{stage}={newest.parent}"]
    judged = [Judged("reference")]
    for word in words:
        name, equals, path = word.rpartition("=")
        folder = Path(recipe.path(path))
        if word == "reference":
            continue
        if best_of := re.fullmatch(r"best-of-(\d{1,9})", word):
            n = int(best_of[1])
            if not 1 <= n <= most:
                raise RecipeError(
                    f"`evaluate.policies`: {word}: `evaluate.reference_completions` is {most}, and N at most that"
                )
            judged.append(Judged(word, best_of=n))
        elif os.path.isdir(folder):  # false, not an error, for what can be no folder's name
            run = folder.resolve()
            if not any((run / file).is_file() for file in ("adapter_config.json", "config.json")):
                raise RecipeError(
                    f"`evaluate.policies`: {word}: neither an adapter (adapter_config.json) nor a full model in it"
                )
            judged.append(Judged(name if equals else f"{run.parent.name}/{run.name}", folder=run))
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


@dataclass
class Optimum:
    """J* of each prompt [prompts], as far as the samples of `proposal` show it, and their effective sample size."""

    objective: Tensor
    effective_sample_size: Tensor
    proposal: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "objective": self.objective.mean().item(),
            "effective_sample_size": self.effective_sample_size.mean().item(),
            "proposal": self.proposal,
        }


def evaluation_of(judged: dict[str, Completions], policies: list[Judged], recipe: Recipe) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        judged: the completions of the reference and of every policy in a folder, by name.
        policies: what to report, in this order.
    """
    beta, reference = recipe.objective.beta, judged["reference"]
    for name, completions in judged.items():
        unjudged = int(completions.reward.isnan().sum())
        if unjudged:
            raise RecipeError(f"the reward has no opinion on {unjudged} completions of {name}; a yardstick needs one on each")
    optimum = estimate_optimum(judged, beta)
    from_reference = estimate_optimum({"reference": reference}, beta)
    return {
        "beta": beta,
        "prompts": len(reference.reward),
        "completions": recipe.evaluate.completions,
        "reference_completions": recipe.evaluate.reference_completions,
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
        metrics[name] = {"mean": values.mean().item(), "low": low, "high": high}

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
    return values[draws].mean(-1)


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
