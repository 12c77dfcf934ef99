"""DPO on a LoRA policy: TRL's DPOTrainer on the recipe's own roles and on the very tokens that were sampled."""

from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor

from rlhf_recipes.configs import DPOConfig
from rlhf_recipes.recipe import Recipe
from rlhf_recipes.roles import Roles
from rlhf_recipes.runtime import progress_bar
from rlhf_recipes.sampling import response_forward, response_mask


class DPOTrainer(trl.DPOTrainer):
    """Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: -log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)).

    Args:
        roles: the policy is trained; the reference is the explicit one that PPO and the evaluation use.
        train_dataset: `prompt_ids`, `chosen_ids`, `rejected_ids`; they reach the collator unchanged.
    """

    def __init__(self, args: DPOConfig, roles: Roles, train_dataset: Dataset) -> None:
        self.roles = roles
        super().__init__(
            model=roles.policy,
            ref_model=roles.reference,
            args=args,
            train_dataset=train_dataset,
            processing_class=roles.tokenizer,
        )

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # TRL's would tokenise text again

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """log pi_ref of every completion, from the same function as PPO's and the evaluation's.

        TRL's own caches them on disk under a hash of the reference's parameters; ours has none of its own.
        """
        columns: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        starts = range(0, len(dataset), batch_size)
        main = self.accelerator.is_main_process
        for start in progress_bar(starts, show=main, desc="log-probabilities of the reference", leave=False):
            rows = dataset[start : start + batch_size]
            for side in ("chosen", "rejected"):
                logps = self.reference_logps(rows["prompt_ids"], rows[f"{side}_ids"])
                columns[f"ref_{side}_logps"] += logps.tolist()
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset

    @torch.no_grad()
    def reference_logps(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Tensor:
        """log pi_ref(y | x) summed over the completion's tokens; lists of token ids -> [batch]"""
        pad = self.roles.tokenizer.pad_token_id
        context, longest = max(map(len, prompt_ids)), max(map(len, completion_ids))
        sequences = torch.tensor([
            [pad] * (context - len(x)) + x + y + [pad] * (longest - len(y))
            for x, y in zip(prompt_ids, completion_ids, strict=True)
        ]).to(self.accelerator.device)  # fmt: skip
        output = response_forward(self.roles.reference, sequences, context, pad, temperature=1.0)
        return (output.logprobs * response_mask(sequences[:, context:], pad)).sum(1)


def dpo_fields(recipe: Recipe) -> dict[str, Any]:
    """The facts that DPO shares with other stages, under TRL's field names, and what its pairs need."""
    return {
        "beta": recipe.objective.beta,
        "max_length": None,  # pairs keep to `data`'s lengths; TRL would cut them silently
        "precompute_ref_log_probs": True,
    }
