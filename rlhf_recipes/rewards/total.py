"""Rewards: what is maximised, one number a completion, a weighted sum of reward models and python functions.

    r(x, y) = clip( sum_i w_i (r_i(x, y) - m_i) / s_i ) - length_penalty * tokens - missing_eos_penalty * [no eos]

m_i and s_i are the mean and deviation of r_i over the reference's completions of training prompts with
`reward.normalize`, else 0 and 1.
"""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.rewards.adapter import AdapterReward, load_adapter_reward
from rlhf_recipes.rewards.function import FunctionReward, RewardError, run_async
from rlhf_recipes.rewards.model import load_model_reward
from rlhf_recipes.rollouts.samples import Samples
from rlhf_recipes.tasks import load_task, task_function


@dataclass
class Scores:
    """What the rewards say of a batch.

    total: r(x, y), [batch]; 0 where not valid
    valid: false where no reward has an opinion, or one failed with `on_error: skip`: such a row is not learned from, [batch]
    terms: name -> the term's own score before weight and normalisation, NaN without an opinion, [batch]
    prefix: r of the text up to and with each position as far as adapters can tell, before clipping and penalties,
        [batch, context + response]; only if asked for
    parts: name -> share or size of what shaping did, for the metrics, [batch]
    """

    total: Tensor
    valid: Tensor
    terms: dict[str, Tensor]
    parts: dict[str, Tensor]
    prefix: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """`rewards/<name>/mean` and `/std` as TRL's GRPO names them, and the means of `parts`."""
        metrics = {}
        for name, scores in self.terms.items():
            known = scores[~scores.isnan()]
            metrics[f"rewards/{name}/mean"] = known.mean()
            metrics[f"rewards/{name}/std"] = (known - known.mean()).square().mean().sqrt()
        return metrics | {f"rewards/{name}": values.float().mean() for name, values in self.parts.items()}


# --- their sum ---------------------------------------------------------------------------------------------------


@dataclass
class Term:
    """One reward of the sum; normalised as (score - mean) / deviation."""

    scorer: Any  # AdapterReward, ModelReward or FunctionReward
    weight: float = 1.0
    mean: float = 0.0
    deviation: float = 1.0

    def shaped(self, scores: Tensor) -> Tensor:
        return self.weight * (scores - self.mean) / self.deviation


class Rewards(nn.Module):
    """The formula at the top of this file.

    Args:
        terms: by name.
        folder: where completions that a python reward failed on are written; None writes none.
    """

    def __init__(
        self,
        terms: dict[str, Term],
        clip: float | None = None,
        length_penalty: float = 0.0,
        missing_eos_penalty: float | None = None,
    ) -> None:
        super().__init__()
        self.terms = terms
        self.clip, self.length_penalty, self.missing_eos_penalty = clip, length_penalty, missing_eos_penalty
        self.models = nn.ModuleList([term.scorer for term in terms.values() if isinstance(term.scorer, nn.Module)])
        self.folder: Path | None = None

    @property
    def adapter(self) -> AdapterReward | None:
        """The reward adapter where it is all there is, unshaped: what TRL's own loop can take."""
        [term, *others] = self.terms.values()
        shaped = others or self.clip or self.length_penalty or (term.weight, term.mean, term.deviation) != (1, 0, 1)
        return None if shaped or not isinstance(term.scorer, AdapterReward) else term.scorer

    @torch.no_grad()
    def forward(self, samples: Samples, batch_size: int | None = None, prefix: bool = False) -> Scores:
        """Scores completions.

        Args:
            batch_size: rows that a model reads at a time; a function gets all of them at once.
            prefix: fill `Scores.prefix`.

        Raises:
            RewardError: see `FunctionReward`.
        """
        device = samples.sequences.device
        functions = {name: term.scorer for name, term in self.terms.items() if isinstance(term.scorer, FunctionReward)}
        failed = torch.zeros(len(samples), dtype=torch.bool)
        answers = run_async(self._ask(functions, samples)) if functions else []
        raw, prefix_sum = self._read_models(samples, batch_size or len(samples), prefix)
        for name, (scores, failures) in zip(functions, answers, strict=True):
            raw[name] = scores.to(device)
            failed |= failures
        raw = {name: raw[name] for name in self.terms}  # in the recipe's order
        shaped = torch.stack([term.shaped(raw[name]) for name, term in self.terms.items()])
        valid = ~shaped.isnan().all(0) & ~failed.to(device)
        total = shaped.nansum(0)
        parts: dict[str, Tensor] = {}
        if self.clip is not None:
            parts["clipped"] = total.abs() > self.clip
            total = total.clamp(-self.clip, self.clip)
        if self.length_penalty:
            parts["length_penalty"] = self.length_penalty * samples.mask.sum(1)
            total = total - parts["length_penalty"]
        if self.missing_eos_penalty is not None:
            parts["missing_eos_penalty"] = self.missing_eos_penalty * ~samples.ended
            total = total - parts["missing_eos_penalty"]
        if functions:
            parts["skipped"] = ~valid
        return Scores(total.masked_fill(~valid, 0), valid, raw, parts, prefix_sum)

    async def _ask(self, functions: dict[str, FunctionReward], samples: Samples) -> list[tuple[Tensor, Tensor]]:
        """All functions' answers, waited for at the same time."""

        async def ask(name: str) -> tuple[Tensor, Tensor]:
            try:
                return await functions[name].score(samples)
            except RewardError as failure:
                where = self._write(name, failure)
                rows = failure.rows
                failure = RewardError(
                    f"the reward `{name}` failed: {failure}{where}; `on_error: skip` would leave such rows out"
                )
                failure.rows = rows
                raise failure from None

        return await asyncio.gather(*map(ask, functions))

    def _write(self, name: str, failure: RewardError) -> str:
        if self.folder is None:
            return ""
        file = self.folder / f"failed_reward-{name}-{PartialState().process_index}.json"
        file.write_text(json.dumps(failure.rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return f"; prompt and completion are in {file}"

    def _read_models(self, samples: Samples, batch_size: int, prefix: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Each model's own scores; and, if asked for, the adapters' shaped sum at every position."""
        raw: dict[str, Tensor] = {}
        prefix_sum = torch.zeros(samples.sequences.shape, device=samples.sequences.device) if prefix else None
        for name, term in self.terms.items():
            if isinstance(term.scorer, FunctionReward):
                continue
            parts = []
            for at in range(0, len(samples), batch_size):
                rows = slice(at, at + batch_size)
                if prefix_sum is not None and isinstance(term.scorer, AdapterReward):
                    scores, prefixes = term.scorer.prefix_score(samples[rows])
                    prefix_sum[rows] += term.shaped(prefixes)
                    parts.append(scores)
                else:
                    parts.append(term.scorer.score(samples[rows]))
            raw[name] = torch.cat(parts)
            lost = int((~raw[name].isfinite()).sum())
            if lost:  # NaN would read as "no opinion"
                raise RecipeError(
                    f"the reward `{name}` gives {lost} of {len(samples)} completions a score that is not finite; look at its "
                    f"weights, or does its precision overflow (`model.dtype`)?"
                )
        return raw, prefix_sum


def load_rewards(recipe: Recipe, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Rewards:
    """The recipe's `reward`: adapters over the backbone's frozen weights, models of their own, functions of task.py."""
    terms = {}
    for spec in recipe.reward.all_terms():
        if spec.adapter:
            scorer: Any = load_adapter_reward(recipe, spec, backbone, tokenizer)
        elif spec.model:
            scorer = load_model_reward(recipe, spec)
        else:
            scorer = FunctionReward(task_function(load_task(recipe.folder), str(spec.function_name)), spec.on_error)
        terms[spec.title] = Term(scorer, spec.weight)
    section = recipe.reward
    return Rewards(terms, section.clip, section.length_penalty, section.missing_eos_penalty)
