"""What is maximised: one number a completion, the weighted sum of the recipe's rewards.

    r(x, y) = clip( sum_i w_i (r_i(x, y) - m_i) / s_i ) - length_penalty * tokens - missing_eos_penalty * [no eos]

m_i and s_i are the mean and standard deviation of r_i over the reference's completions of training prompts with
`reward.normalize`, else 0 and 1.
"""

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn

from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import RewardSection
from rlhf_recipes.rewards.adapter import AdapterReward
from rlhf_recipes.rewards.reward import PrefixReward, Reward, RewardError, Shared
from rlhf_recipes.rollouts.samples import Samples


@dataclass
class Scores:
    """The rewards of a batch.

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


@dataclass
class Term:
    """One reward of the sum; normalised with mean and standard deviation."""

    scorer: Reward
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def shaped(self, scores: Tensor) -> Tensor:
        return self.weight * (scores - self.mean) / self.std


class Rewards(nn.Module):
    """The formula at the top of this file.

    Args:
        terms: by name.
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
        self.folder: Path | None = None  # where completions that a reward failed on are written

    @property
    def adapter(self) -> AdapterReward | None:
        """The reward adapter where it is all there is."""
        [term, *others] = self.terms.values()
        return term.scorer if isinstance(term.scorer, AdapterReward) and not others else None

    @torch.no_grad()
    def forward(self, samples: Samples, batch_size: int | None = None, prefix: bool = False) -> Scores:
        """Scores completions.

        Args:
            batch_size: rows that a model reads at a time; others get all of them at once.
            prefix: fill `Scores.prefix`.

        Raises:
            RewardError: see `FunctionReward`.
        """
        device = samples.sequences.device
        answers = self._ask(samples)
        raw, prefix_sum = self._read(samples, batch_size or len(samples), prefix)
        raw |= {name: scores.to(device) for name, (scores, _) in answers.items()}
        raw = {name: raw[name] for name in self.terms}  # in the recipe's order
        shaped = torch.stack([term.shaped(raw[name]) for name, term in self.terms.items()])
        valid = ~shaped.isnan().all(0)
        for _, failed in answers.values():
            valid = valid if failed is None else valid & ~failed.to(device)
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
        if answers:
            parts["skipped"] = ~valid
        return Scores(total.masked_fill(~valid, 0), valid, raw, parts, prefix_sum)

    def _ask(self, samples: Samples) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The answers of the rewards that are no modules, waited for at the same time."""
        names = [name for name, term in self.terms.items() if not isinstance(term.scorer, nn.Module)]
        if not names:
            return {}
        _ = samples.texts  # decoded once, before several threads read it

        def ask(name: str) -> tuple[Tensor, Tensor | None]:
            try:
                return self.terms[name].scorer.score(samples)
            except RewardError as failure:
                where = self._write(name, failure)
                message = f"the reward `{name}` failed: {failure}{where}; `on_error: skip` would leave such rows out"
                raise RewardError(message, failure.rows) from None

        with ThreadPoolExecutor(len(names)) as threads:
            return dict(zip(names, threads.map(ask, names), strict=True))

    def _write(self, name: str, failure: RewardError) -> str:
        if self.folder is None:
            return ""
        file = self.folder / f"failed_reward-{name}-{PartialState().process_index}.json"
        file.write_text(json.dumps(failure.rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return f"; prompt and completion are in {file}"

    def _read(self, samples: Samples, batch_size: int, prefix: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Each module's own scores; and, if asked for, the shaped sum at every position of those that read prefixes."""
        raw: dict[str, Tensor] = {}
        prefix_sum = torch.zeros(samples.sequences.shape, device=samples.sequences.device) if prefix else None
        for name, term in self.terms.items():
            if not isinstance(term.scorer, nn.Module):
                continue
            parts = []
            for at in range(0, len(samples), batch_size):
                rows = slice(at, at + batch_size)
                if prefix_sum is not None and isinstance(term.scorer, PrefixReward):
                    scores, prefixes = term.scorer.prefix_score(samples[rows])
                    prefix_sum[rows] += term.shaped(prefixes)
                else:
                    scores, _ = term.scorer.score(samples[rows])
                parts.append(scores)
            raw[name] = torch.cat(parts)
            lost = int((~raw[name].isfinite()).sum())
            if lost:  # NaN would read as "no opinion"
                raise RecipeError(
                    f"the reward `{name}` gives {lost} of {len(samples)} completions a score that is not finite; look at its "
                    f"weights, or does its precision overflow (`model.dtype`)?"
                )
        return raw, prefix_sum


def load_rewards(section: RewardSection, shared: Shared) -> Rewards:
    """The recipe's `reward`: adapters over the backbone's frozen weights, models of their own, functions of task.py."""
    terms = {}
    for term in section.all_terms():
        kind = importlib.import_module(f"{__package__}.{term.kind}")
        terms[term.title] = Term(kind.load(term, shared), term.weight)
    return Rewards(terms, section.clip, section.length_penalty, section.missing_eos_penalty)
