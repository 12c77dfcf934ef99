"""DPO on a LoRA policy: TRL's DPOTrainer on the recipe's own roles and on the very tokens that were sampled."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import trl
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from trl.trainer import dpo_trainer as trl_dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rlhf_recipes.algorithms.pairs import load_pairs, sample_of, sample_pairs, tokenize_preferences
from rlhf_recipes.algorithms.trl_config import balances_experts, refuse_unread, refused_by_trl, stage_config
from rlhf_recipes.checks.look import made_for_others
from rlhf_recipes.checks.models import examine
from rlhf_recipes.checks.saved import read_back_policy
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.pair_files import pairs_file
from rlhf_recipes.data.tokenizer import end_token_ids, load_tokenizer
from rlhf_recipes.data.tokens import join_padded
from rlhf_recipes.evaluation.judging import judge_policy, prepare_rewards
from rlhf_recipes.evaluation.watch import watch
from rlhf_recipes.objective import robust_smoothing
from rlhf_recipes.process import progress_bar
from rlhf_recipes.recipe.errors import RecipeError, StoppedError
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.recipe.stages import STAGES
from rlhf_recipes.roles import Roles, build_roles
from rlhf_recipes.rollouts.forward import response_forward
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.sharding import whole_model
from rlhf_recipes.runs.trainer import Resumable
from rlhf_recipes.tasks import load_dataset, load_task, optional_gold

ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 2e-2}  # nats a token, of two ways to one log-probability


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's DPOConfig, and how often new pairs are sampled."""

    rounds: int = field(
        default=1,
        metadata={
            "help": "Rounds of pairs and training; from the second on the policy itself is sampled. The labels depend on "
            "the rewards alone, so DPO's optimum at this beta and reference is the same whoever was sampled."
        },
    )


def first_loss(loss_type: str, beta: float, smoothing: float) -> float | None:
    """A DPO loss where policy and reference are the same: every log-ratio is 0. None where it depends on more than that.

    Args:
        smoothing: `dpo.label_smoothing`, which only exo_pair's start depends on.
    """
    half = math.log(2)
    if loss_type == "exo_pair":  # KL((1/2, 1/2) || (1 - e, e))
        return -half - 0.5 * math.log1p(-smoothing) - 0.5 * math.log(smoothing)
    return {
        "sigmoid": half,  # -log sigmoid(0), whatever share of it the other order has
        "sigmoid_norm": half,
        "robust": half,  # ((1 - e) log 2 - e log 2) / (1 - 2e)
        "hinge": 1.0,  # max(0, 1 - 0)
        "ipo": 1 / (4 * beta**2),  # (0 - 1 / (2 beta))^2
        "nca_pair": 2 * half,  # log 2 + (log 2) / 2 + (log 2) / 2
        "bco_pair": 2 * half,
        "sppo_hard": 1 / (2 * beta**2),  # (0 - 1 / (2 beta))^2 + (0 + 1 / (2 beta))^2
        "aot": half,
        "aot_unpaired": half,
        "apo_zero": 1.0,  # 1 - 1/2 + 1/2
        "apo_down": 1.0,
        "discopop": 0.5 * half + 0.5,  # half of each: -log sigmoid(0) and exp(-0)
    }.get(loss_type)  # sft's is the policy's own cross-entropy


def _as_it_is(model: Any, accelerator: Any) -> Any:
    """The reference has no weights of its own to shard, and its log-probabilities are read before the policy's are."""
    return model


class Collator(DataCollatorForPreference):
    """TRL's, with the pairs' `label_smoothing`, [pairs]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        smoothing = torch.tensor([example["label_smoothing"] for example in examples])
        return super().torch_call(examples) | {"label_smoothing": smoothing}


def fitting_pairs(pairs: Dataset, args: DPOConfig) -> Dataset:
    """Without those whose prompt alone fills `max_length`, as TRL leaves them out: nothing of their completions is left.

    Raises:
        RecipeError: there are no others.
    """
    longest, rows = args.max_length, len(pairs)
    if longest is None or args.truncation_mode != "keep_start":
        return pairs
    pairs = pairs.filter(lambda pair: len(pair["prompt_ids"]) < longest)
    if len(pairs) == 0:
        raise RecipeError(
            f"`dpo.max_length` {longest}: no completion is left of {rows} pairs; their prompts are as long: raise it"
        )
    if len(pairs) < rows and PartialState().is_main_process:
        print(f"{rows - len(pairs)} of {rows} pairs have prompts that fill dpo.max_length={longest}, left out")
    return pairs


class DPOTrainer(Resumable, trl.DPOTrainer):
    """Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: -log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)).

    Args:
        roles: the policy is trained; the reference is the explicit one that PPO and the evaluation use.
        train_dataset: `prompt_ids`, `chosen_ids`, `rejected_ids`, which reach the collator unchanged, and `label_smoothing`:
            the probability, pair by pair, that the rejected completion is the better one.
        fresh: the policy is still the reference, so the loss has a known start.

    Raises:
        RecipeError: no pair has a completion within `dpo.max_length`, or a loss that the pairs or keys do not fit.
    """

    _signature_columns: list[str]
    aux_loss_enabled: bool

    def __init__(self, args: DPOConfig, roles: Roles, train_dataset: Dataset, fresh: bool = False) -> None:
        self.roles, self.unchecked = roles, fresh
        expected = any(train_dataset["label_smoothing"])
        if expected and args.loss_type != ["sigmoid"]:
            raise RecipeError("these pairs carry `preferences.label` expected, which only `dpo.loss_type` [sigmoid] can use")
        self.smoothed = expected or (args.label_smoothing > 0 and "sigmoid" in args.loss_type)
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
                data_collator=Collator(
                    roles.tokenizer.pad_token_id,
                    max_length=args.max_length,
                    truncation_mode=args.truncation_mode,
                    pad_to_multiple_of=args.pad_to_multiple_of,
                ),
            )
        if self.aux_loss_enabled and not balances_experts(roles.policy):
            self.aux_loss_enabled = False

    def _prepare_dataset(self, dataset: Dataset, tokenizer: Any, args: DPOConfig, name: str) -> Dataset:
        """TRL's would tokenise text again."""
        dataset = fitting_pairs(dataset, args)
        if args.train_sampling_strategy == "group_by_length":
            longer = [max(len(y), len(z)) for y, z in zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)]
            lengths = [len(x) + y for x, y in zip(dataset["prompt_ids"], longer, strict=True)]
            dataset = dataset.add_column("length", lengths)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "label_smoothing", "length"})

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; of pairs with a `label_smoothing` that of both orders, each weighted by its probability.

        A pair has its own where `preferences.label` is expected. TRL's sigmoid loss knows none; its robust loss does what is
        needed (objective.robust_smoothing).
        """
        p = inputs.pop("label_smoothing")
        if self.smoothed:
            self.loss_types = ["robust" if loss == "sigmoid" else loss for loss in self.args.loss_type]
            self.label_smoothing = robust_smoothing(p, self.args.label_smoothing)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.unchecked:
            self.unchecked = False
            self._check_start(result[0] if isinstance(result, tuple) else result, inputs["completion_mask"])
        return result

    def _check_start(self, loss: Tensor, completion_mask: Tensor) -> None:
        """Of the first batch of a policy that is still the reference: both give the same log-probabilities.

        Raises:
            StoppedError: they do not, or the loss is not what it is then.
        """
        args, metrics = self.args, self._metrics["train"]
        chosen, rejected = (metrics[f"rewards/{side}"][-1] / args.beta for side in ("chosen", "rejected"))
        rounding = max(1e-3, ROUNDING[self.roles.policy.dtype] * completion_mask.sum(1).float().mean().item())
        starts = [first_loss(loss_type, args.beta, args.label_smoothing) for loss_type in args.loss_type]
        known, right = "", max(abs(chosen), abs(rejected)) <= rounding  # false too where one is no number
        if None not in starts and not args.use_weighting and not self.aux_loss_enabled:
            start = sum(w * s for w, s in zip(self.loss_weights, starts, strict=True))
            known = f" and the loss {start:.6f}"
            right = right and abs(loss.item() - start) <= 4 * args.beta * rounding * max(1, abs(start)) + 1e-4
        if not right:
            raise StoppedError(
                f"DPO does not start where it should: a new policy is the reference, so the log-ratios of chosen and rejected "
                f"are 0{known}, and the first batch has {chosen:.4g} and {rejected:.4g} nats and the loss {loss.item():.6f}: "
                f"the two see other tokens or weights. Does the backbone behave randomly (dropout, noise in its forward pass), "
                f"or does what it says of a text depend on the padding beside it?"
            )

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """log pi_ref of every completion as the collator cuts it, from the same function as PPO's and the evaluation's.

        TRL's own caches them on disk under a hash of the reference's parameters; ours has none of its own.
        """
        columns: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        starts = range(0, len(dataset), batch_size)
        main = self.accelerator.is_main_process
        for start in progress_bar(starts, show=main, desc="log-probabilities of the reference", leave=False):
            pairs = dataset.select(range(start, min(start + batch_size, len(dataset)))).to_list()
            chosen, rejected = self._seen(pairs)
            shared = [min(len(y), len(z)) for (_, y), (_, z) in zip(chosen, rejected, strict=True)]
            for side, rows in (("chosen", chosen), ("rejected", rejected)):
                prompts, completions = map(list, zip(*rows, strict=True))
                columns[f"ref_{side}_logps"] += self.reference_logps(prompts, completions, shared).tolist()
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset

    def _seen(self, pairs: list[dict[str, Any]]) -> list[list[tuple[list[int], list[int]]]]:
        """(context, completion) of every chosen and of every rejected side, as the policy's batches hold them."""
        batch = self.data_collator(pairs)
        rows = []
        for ids, on, completion in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
            row = ids[on.bool()].tolist()
            start = max(1, len(row) - int(completion.sum()))  # nothing predicts the first token
            rows.append((row[:start], row[start:]))
        return [rows[: len(pairs)], rows[len(pairs) :]]

    def whole_roles(self, build: Callable[[], Roles]) -> Roles:
        """The roles with the trained policy: those that `build` makes where an engine took the policy apart."""
        roles = self.roles

        def build_policy() -> Any:
            nonlocal roles
            before, roles = roles, build()
            roles.reward = before.reward
            return roles.policy

        whole_model(self, build_policy)
        return roles

    @torch.no_grad()
    def reference_logps(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], shared: list[int] | None = None
    ) -> Tensor:
        """log pi_ref(y | x) summed over the completion's tokens; lists of token ids -> [batch]

        Args:
            shared: tokens that both completions of a pair have; the later ones count `ld_alpha` times (LD-DPO, arXiv
                2409.06411).
        """
        *rows, context = join_padded(prompt_ids, completion_ids, self.roles.tokenizer.pad_token_id)
        sequences, attention = (tensor.to(self.accelerator.device) for tensor in rows)
        output = response_forward(self.roles.reference, sequences, attention, context, temperature=1.0)
        logprobs = output.logprobs * attention[:, context:]
        if self.args.ld_alpha is not None and shared is not None:
            place = torch.arange(logprobs.shape[1], device=logprobs.device)
            later = place >= torch.tensor(shared, device=logprobs.device).unsqueeze(1)
            logprobs = torch.where(later, self.args.ld_alpha * logprobs, logprobs)
        return logprobs.sum(1)


def dpo_fields(beta: float) -> dict[str, Any]:
    """The facts that DPO shares with other stages, under TRL's field names, and what its pairs need."""
    return {"beta": beta, **STAGES["dpo"].defaults}


def train_dpo(recipe: Recipe) -> dict[str, Any]:
    """Trains the policy of `recipe` on given, the task's or sampled pairs and judges it on held-out prompts; returns the
    summary."""
    task, tokenizer = load_task(recipe), load_tokenizer(recipe)
    section, longest = recipe.stages["dpo"], recipe.data.max_prompt_tokens
    ends, prompts, pairs = end_token_ids(tokenizer, recipe.path(recipe.model.path)), None, None
    given = None if recipe.preferences.path is None else pairs_file(recipe.preferences.path, recipe.folder)
    if given is None and recipe.preferences.source == "task":
        pairs = tokenize_preferences(load_dataset(task, "load_preferences", "train"), tokenizer, ends, recipe.data)
    if (pairs is None and given is None) or section.get("rounds", 1) > 1:
        prompts = tokenize_prompts(load_dataset(task, "load_prompts", "train"), tokenizer, longest, recipe.preferences.prompts)
    held_out = tokenize_prompts(load_dataset(task, "load_prompts", "eval"), tokenizer, longest, recipe.evaluate.prompts)
    gold = optional_gold(task, held_out)

    roles = build_roles(recipe, tokenizer)
    examine(roles, held_out, recipe)
    vocabulary = roles.policy.get_input_embeddings().num_embeddings
    if given is not None:
        pairs = load_pairs(given, vocabulary, tokenizer, ends, recipe.data)

    args = stage_config(DPOConfig, "dpo", section, recipe.run.seed, recipe.model.dtype, **dpo_fields(recipe.objective.beta))
    pairs = None if pairs is None else fitting_pairs(pairs, args)
    with refused_by_trl("dpo"):
        trial = DPOTrainer(args, roles, sample_of(pairs, tokenizer))  # before anything is written
        trial.try_optimizer()
    refuse_unread(trial, "dpo", section, recipe.model.path)
    if pairs is not None:
        trial.refuse_no_batch("dpo", len(pairs))

    run = Run.prepare(recipe, "dpo")
    run.start()
    for line in made_for_others(recipe, given) if given is not None else ():
        run.say(line)
    prepare_rewards(roles, task, run)
    first = run.memory.get("round", 0)  # above 0 in a run that is resumed
    pairs = None if first else pairs
    for number in range(first, args.rounds):
        if pairs is None:
            policy, name = (roles.policy, f"pairs-{number + 1}.jsonl") if number else (roles.reference, "pairs.jsonl")
            run.say(f"no pairs given: sampling them first, into {run.folder / name}" if number == 0 else "sampling new pairs")
            sample_pairs(policy, roles, prompts, run, name, seed=recipe.run.seed + number)
            pairs = load_pairs(run.folder / name, vocabulary, tokenizer, ends, recipe.data)
        run.memory["round"] = number
        trainer = DPOTrainer(args, roles, pairs, fresh=number == 0 and run.checkpoint is None)
        trainer.refuse_no_batch("dpo", len(pairs))
        watch(trainer, run)
        trainer.train()
        pairs = None

    roles = trainer.whole_roles(partial(build_roles, recipe, tokenizer))
    run.save_adapter(roles.policy, run.folder)
    if run.main:
        read_back_policy(run.folder, roles, held_out)
    return judge_policy(run, roles, held_out, gold)
