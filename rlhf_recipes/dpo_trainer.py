"""DPO on a LoRA policy: TRL's DPOTrainer on the recipe's own roles and on the very tokens that were sampled."""

from typing import Any
from unittest import mock

import torch
import trl
from datasets import Dataset
from torch import Tensor
from trl.trainer import dpo_trainer as trl_dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rlhf_recipes.configs import DPOConfig
from rlhf_recipes.data import join_padded
from rlhf_recipes.engines import whole_model
from rlhf_recipes.recipe import Recipe, RecipeError
from rlhf_recipes.resumable import Resumable
from rlhf_recipes.roles import Roles, build_roles
from rlhf_recipes.runtime import progress_bar
from rlhf_recipes.sampling import response_forward


def _as_it_is(model: Any, accelerator: Any) -> Any:
    """The reference has no weights of its own to shard, and its log-probabilities are read before the policy's are."""
    return model


class Collator(DataCollatorForPreference):
    """TRL's, with the pairs' `label_smoothing`, [pairs]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        smoothing = torch.tensor([example["label_smoothing"] for example in examples])
        return super().torch_call(examples) | {"label_smoothing": smoothing}


class DPOTrainer(Resumable, trl.DPOTrainer):
    """Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: -log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)).

    Args:
        roles: the policy is trained; the reference is the explicit one that PPO and the evaluation use.
        train_dataset: `prompt_ids`, `chosen_ids`, `rejected_ids`, which reach the collator unchanged, and `label_smoothing`:
            the probability, pair by pair, that the rejected completion is the better one.
    """

    _signature_columns: list[str]

    def __init__(self, args: DPOConfig, roles: Roles, train_dataset: Dataset) -> None:
        self.roles = roles
        self.smoothed = any(train_dataset["label_smoothing"])
        if self.smoothed and args.loss_type != ["sigmoid"]:
            raise RecipeError("these pairs carry `preferences.label` expected, which only `dpo.loss_type` [sigmoid] can use")
        with (
            mock.patch.object(trl_dpo_trainer, "prepare_fsdp", _as_it_is),
            mock.patch.object(trl_dpo_trainer, "prepare_deepspeed", _as_it_is),
        ):
            super().__init__(
                model=roles.policy,
                ref_model=roles.reference,
                args=args,
                train_dataset=train_dataset,
                processing_class=roles.tokenizer,
                data_collator=Collator(roles.tokenizer.pad_token_id, max_length=args.max_length),
            )

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # TRL's would tokenise text again

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "label_smoothing"})

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; with p = `label_smoothing` that of both orders: -(1 - p) log sigmoid(z) - p log sigmoid(-z).

        TRL's sigmoid loss knows no smoothing. Its robust loss (arXiv 2403.00409) takes a share e of flipped labels out, by
        ((1 - e) * -log sigmoid(z) - e * -log sigmoid(-z)) / (1 - 2e); e = -p / (1 - 2p) puts them in.
        """
        p = inputs.pop("label_smoothing").clamp(max=0.4999)
        if self.smoothed:
            self.loss_types, self.label_smoothing = ["robust"], -p / (1 - 2 * p)
        return super().compute_loss(model, inputs, *args, **kwargs)

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

    def whole_roles(self, recipe: Recipe) -> Roles:
        """The roles with the trained policy; new ones where an engine took the policy apart, with the weights they share."""
        roles = self.roles

        def build() -> Any:
            nonlocal roles
            before, roles = roles, build_roles(recipe, roles.tokenizer)
            roles.reward = before.reward
            return roles.policy

        whole_model(self, build)
        return roles

    @torch.no_grad()
    def reference_logps(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Tensor:
        """log pi_ref(y | x) summed over the completion's tokens; lists of token ids -> [batch]"""
        *rows, context = join_padded(prompt_ids, completion_ids, self.roles.tokenizer.pad_token_id)
        sequences, attention = (tensor.to(self.accelerator.device) for tensor in rows)
        output = response_forward(self.roles.reference, sequences, attention, context, temperature=1.0)
        return (output.logprobs * attention[:, context:]).sum(1)


def dpo_fields(recipe: Recipe) -> dict[str, Any]:
    """The facts that DPO shares with other stages, under TRL's field names, and what its pairs need."""
    return {
        "beta": recipe.objective.beta,
        "max_length": None,  # pairs keep to `data`'s lengths; TRL would cut them silently
        "precompute_ref_log_probs": True,
    }
