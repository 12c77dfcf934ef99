"""Exact answers where every completion can be listed: a tiny vocabulary and a few tokens (recipes/lab)."""

import itertools
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_recipes.models.reference import Reference
from rlhf_recipes.optimum import kl_divergence, objective_value, optimal_objective, optimal_policy
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.roles import Roles
from rlhf_recipes.rollouts.forward import response_forward
from rlhf_recipes.rollouts.samples import Samples

MOST = 100_000  # completions of a prompt


@dataclass
class Enumeration:
    """Every completion of every prompt: log pi, log pi_ref and r, all [prompts, completions], float64."""

    log_pi: Tensor
    log_ref: Tensor
    rewards: Tensor

    def exact(self, beta: float) -> dict[str, float]:
        """Means over prompts: reward, KL(pi || pi_ref), J, J*, KL(pi || pi*) and the fraction of the optimum.

        Since J* - J(pi) = beta KL(pi || pi*), the fraction is 1 - KL(pi || pi*) / KL(pi_ref || pi*).
        """
        log_star = optimal_policy(self.log_ref, self.rewards, beta)
        to_optimum = kl_divergence(self.log_pi, log_star).mean()
        return {
            "reward": (self.log_pi.exp() * self.rewards).sum(-1).mean().item(),
            "kl": kl_divergence(self.log_pi, self.log_ref).mean().item(),
            "objective": objective_value(self.log_pi, self.log_ref, self.rewards, beta).mean().item(),
            "optimum": optimal_objective(self.log_ref, self.rewards, beta).mean().item(),
            "kl_to_optimum": to_optimum.item(),
            "fraction_of_optimum": (1 - to_optimum / kl_divergence(self.log_ref, log_star).mean()).item(),
        }


def completions_of(tokens: list[int], eos: int, pad: int, length: int) -> Tensor:
    """All completions of at most `length` tokens: ended by eos, or of full length; [completions, length], padded.

    Args:
        tokens: the vocabulary without eos.
    """
    rows = [[*prefix, eos] + [pad] * (length - n - 1) for n in range(length) for prefix in itertools.product(tokens, repeat=n)]
    return torch.tensor(rows + [list(row) for row in itertools.product(tokens, repeat=length)])


@torch.no_grad()
def enumerate_policy(
    policy: PreTrainedModel | PeftModel | Reference, roles: Roles, prompts: Dataset, recipe: Recipe
) -> Enumeration:
    """Runs policy, reference and reward over every completion of every prompt.

    Raises:
        RecipeError: there are too many, or the policy can also sample pad or bos, which are no part of a completion.
    """
    tokenizer, length = roles.tokenizer, recipe.data.max_completion_tokens
    pad, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    tokens = [token for token in range(roles.policy.config.vocab_size) if token not in (pad, eos, bos)]
    if (len(tokens) + 1) ** length > MOST:
        raise RecipeError(
            f"`evaluate.exact`: {len(tokens) + 1} tokens make over {MOST} completions of {length}; it is for laboratories "
            f"such as recipes/lab"
        )
    completions = completions_of(tokens, eos, pad, length).to(roles.policy.device)
    columns: list[list[Tensor]] = [[], [], []]
    for row in prompts:
        prompt = row["input_ids"]
        query = torch.tensor(prompt, device=completions.device).expand(len(completions), -1)
        sequences = torch.cat([query, completions], dim=1)
        mask = completions != pad
        attention = torch.cat([torch.ones_like(query, dtype=torch.bool), mask], dim=1)
        for column, model in zip(columns, (policy, roles.reference), strict=False):
            output = response_forward(model, sequences, attention, query.shape[1], recipe.sampling.temperature)
            column.append((output.logprobs.double() * mask).sum(1))
        others = {name: [value] * len(sequences) for name, value in row.items() if name not in ("prompt", "input_ids")}
        samples = Samples(sequences, query.shape[1], tokenizer, [row["prompt"]] * len(sequences), others, attention)
        columns[2].append(roles.reward(samples).total.double())
    log_pi, log_ref, rewards = (torch.stack(column).cpu() for column in columns)
    for log_p in (log_pi, log_ref):
        total = log_p.exp().sum(-1)
        if (total - 1).abs().max() > 1e-3:
            raise RecipeError(
                f"`evaluate.exact`: the completions have a probability of {total.min():.4f} in all: the policy can also "
                f"sample pad or bos, which are no part of a completion"
            )
    return Enumeration(log_pi, log_ref, rewards)
