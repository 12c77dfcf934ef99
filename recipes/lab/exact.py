"""The exact reward, KL, J, J* and distance from pi* of policies, by enumeration: here every completion can be listed.

    python recipes/lab/exact.py [RUN ...]

By default of the run of each policy stage that finished last. A run is judged by the beta and the reward that it was trained
with, and so is the reference beside it. Prints a table, and writes exact.json into the run's folder.
"""

import json
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_recipes import environment
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.evaluation.judged import judged_policy
from rlhf_recipes.evaluation.tables import print_rows
from rlhf_recipes.models.reference import Policy
from rlhf_recipes.optimum import kl_divergence, objective_value, optimal_objective, optimal_policy
from rlhf_recipes.process import configure
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.roles import Roles, build_roles
from rlhf_recipes.rollouts.forward import response_forward
from rlhf_recipes.rollouts.samples import Samples
from rlhf_recipes.runs.fingerprint import RESOLVED
from rlhf_recipes.runs.resume import newest_run
from rlhf_recipes.tasks import for_rewards, load_dataset, load_task

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

        Raises:
            RecipeError: beta is 0.
        """
        if beta == 0:
            raise RecipeError("the exact optimum divides by `objective.beta`, which is 0")
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
    rows = [[*prefix, eos] + [pad] * (length - n - 1) for n in range(length) for prefix in product(tokens, repeat=n)]
    return torch.tensor(rows + [list(row) for row in product(tokens, repeat=length)])


@torch.no_grad()
def enumerate_policy(policy: Policy, roles: Roles, prompts: Dataset, length: int, temperature: float) -> Enumeration:
    """Runs policy, reference and reward over every completion of every prompt.

    Args:
        length: tokens of a completion, at most.

    Raises:
        RecipeError: there are too many, or the policy can also sample pad or bos, which are no part of a completion.
    """
    tokenizer = roles.tokenizer
    pad, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    tokens = [token for token in range(roles.policy.config.vocab_size) if token not in (pad, eos, bos)]
    if (len(tokens) + 1) ** length > MOST:
        raise RecipeError(
            f"{len(tokens) + 1} tokens make over {MOST} completions of {length}, too many to list; it is for laboratories such "
            f"as recipes/lab"
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
            output = response_forward(model, sequences, attention, query.shape[1], temperature)
            column.append((output.logprobs.double() * mask).sum(1))
        others = {name: [row[name]] * len(sequences) for name in for_rewards(row)}
        samples = Samples(sequences, query.shape[1], tokenizer, [row["prompt"]] * len(sequences), others, attention)
        columns[2].append(roles.reward(samples).total.double())
    log_pi, log_ref, rewards = (torch.stack(column).cpu() for column in columns)
    for log_p in (log_pi, log_ref):
        total = log_p.exp().sum(-1)
        if (total - 1).abs().max() > 1e-3:
            raise RecipeError(
                f"the completions have a probability of {total.min():.4f} in all: the policy can also sample pad or bos, which "
                f"are no part of a completion"
            )
    return Enumeration(log_pi, log_ref, rewards)


def exact_numbers(run: Path) -> dict[str, dict[str, float]]:
    """`Enumeration.exact` of the reference and of a run's policy, by the run's own recipe."""
    recipe = load_recipe(run / RESOLVED)
    tokenizer, beta = load_tokenizer(recipe), recipe.objective.beta
    prompts = tokenize_prompts(
        load_dataset(load_task(recipe), "load_prompts", "eval"), tokenizer, recipe.data.max_prompt_tokens
    )
    roles, length, temperature = build_roles(recipe, tokenizer), recipe.data.max_completion_tokens, recipe.sampling.temperature
    numbers = {}
    for name, folder in {"reference": None, "policy": run}.items():
        with judged_policy(folder, roles, recipe.model) as policy:
            numbers[name] = {"beta": beta} | enumerate_policy(policy, roles, prompts, length, temperature).exact(beta)
    return numbers


def main(words: list[str]) -> None:
    recipe = load_recipe(Path(__file__).parent)
    configure(recipe.run.seed)
    newest = [newest_run(recipe.runs / stage) for stage in ("ppo", "a2c", "dpo")]
    runs = [Path(word) for word in words] or [run for run in newest if run is not None]
    if not runs:
        raise RecipeError(f"no finished run of {recipe.task} in {recipe.runs.parent}; train one first, or name its folder")
    rows = []
    for run in runs:
        numbers = exact_numbers(run)
        (run / "exact.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        names = {"reference": "reference", "policy": f"{run.resolve().parent.name}/{run.resolve().name}"}
        rows += [[names[who], *(f"{value:.4f}" for value in own.values())] for who, own in numbers.items()]
    print_rows(["", *numbers["policy"]], rows, title="by enumeration of every completion")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        environment.fail(f"error: {error}", error.exit_code)
