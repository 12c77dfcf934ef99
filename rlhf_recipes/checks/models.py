"""The checks that need the models: one number computed in two ways must be one number.

Before a run, on ten prompts and with an adapter that was moved on purpose (a new one changes nothing, whatever is broken):
log-probabilities as sampled, as the training pass computes them, and as plain transformers and PEFT give them for one row
without padding; the reference against the plain backbone; a reward adapter's scores alone and in a batch.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data.tokens import encode_pair, is_chat, pad_left, template_of
from rlhf_recipes.evaluation.judging import complete
from rlhf_recipes.models.adapters import with_new_adapter
from rlhf_recipes.models.backbone import shared_copy, tokens_without_row
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import LoraSection, ModelSection, Recipe
from rlhf_recipes.rewards.adapter import AdapterReward
from rlhf_recipes.roles import Roles
from rlhf_recipes.rollouts.forward import response_forward
from rlhf_recipes.rollouts.sampler import Sampled, Sampler
from rlhf_recipes.runs.sharding import is_sharded

PROMPTS = 10
TOKENS = 32  # of a completion, at most
# Mean nats a token (units of reward a score) that rounding explains, by the backbone's precision.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}


def examine(roles: Roles, prompts: Dataset, recipe: Recipe) -> None:
    """A new policy must be the reference, its completions of ten prompts must have finite rewards, and one number must be one.

    Args:
        prompts: tokenised.

    Raises:
        RecipeError: what is wrong, and what to change.
    """
    prompts = prompts.select(range(min(PROMPTS, len(prompts))))
    check_tokens(roles.tokenizer, roles.backbone, recipe.model)
    longest = recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens
    _check_positions(roles.backbone, longest, "`data.max_prompt_tokens` + `data.max_completion_tokens`", recipe.model)
    if is_chat(prompts[0]["prompt"]):  # raises where stages would see other tokens
        ends = list(roles.sampler.ends.tokens)
        encode_pair(roles.tokenizer, prompts[0]["prompt"], "An answer.", ends, template_of(prompts[0]))
    judged = complete(roles.policy, roles, prompts, recipe.run.seed, recipe.evaluate.batch_size)
    kl = judged.kl.abs().max().item()
    if not kl <= ROUNDING[torch.float32]:
        raise RecipeError(
            f"the new policy is {kl:.3g} nats from the reference, and should start as it: does {recipe.model.path} behave "
            f"randomly (noise in its forward pass), or does `model.dtype` {recipe.model.dtype} overflow?"
        )
    known = judged.reward[~judged.reward.isnan()]
    if not known.isfinite().all():
        raise RecipeError(
            f"the reward of {int((~known.isfinite()).sum())} of {len(known)} completions is not finite; look at `reward` "
            f"or `model.dtype` {recipe.model.dtype}"
        )
    if len(known) == 0:
        raise RecipeError(f"no reward has an opinion on any completion of {judged.reward.numel()} prompts; look at `reward`")
    if (known == known[0]).all() and PartialState().is_main_process:
        print(
            f"warning: the reward is {known[0]:g} for all completions of {len(known)} prompts: where it does not vary "
            f"there is nothing to learn; look at `reward`",
            file=sys.stderr,
        )
    allowed = ROUNDING[roles.backbone.dtype]
    for what, gaps in path_gaps(roles, prompts, recipe.lora, recipe.run.seed).items():
        gap = gaps.mean().item()
        if not gap <= allowed:
            raise _apart(what, gap, allowed, roles.backbone, recipe.model)


def check_tokens(tokenizer: PreTrainedTokenizerBase, backbone: Any, section: ModelSection) -> None:
    """The tokenizer and the backbone speak of the same tokens.

    Raises:
        RecipeError: they do not.
    """
    config = backbone.config
    said = getattr(config, "eos_token_id", None) or config.get_text_config().eos_token_id
    ends = said if isinstance(said, list) else [said]
    if ends != [None] and tokenizer.eos_token_id not in ends and section.eos_token is None:
        raise RecipeError(
            f"`model.path` {section.path}: its config ends a text with token {ends[0]} "
            f"({tokenizer.convert_ids_to_tokens(ends[0])!r}), its tokenizer with {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token!r}); name the one that is right with `model.eos_token`"
        )
    if missing := tokens_without_row(tokenizer, backbone):
        rows = backbone.get_input_embeddings().num_embeddings
        raise RecipeError(
            f"`model.path` {section.path}: its tokenizer has {len(tokenizer)} tokens, such as {missing[0]!r}, and its "
            f"embedding {rows}; resize the embedding, or use the tokenizer it was trained with"
        )


def _check_positions(backbone: PreTrainedModel, tokens: float, what: str, section: ModelSection) -> None:
    config = backbone.config.get_text_config()
    room = next(
        (r for key in ("max_position_embeddings", "max_seq_len") if isinstance(r := getattr(config, key, None), int)), math.inf
    )
    if tokens > room:
        raise RecipeError(
            f"{what}: {tokens} tokens, and {section.path} reads {room}; lower the lengths (of sft and reward_training: "
            f"`max_length`), or leave out what is longer"
        )


@torch.no_grad()
def examine_sft(trainer: Any, tokenizer: PreTrainedTokenizerBase, sampler: Sampler, section: ModelSection) -> None:
    """What SFT makes must be a backbone that the policy stages can sample from, and its loss must be the model's own.

    Args:
        trainer: TRL's SFTTrainer, before it trains.

    Raises:
        RecipeError: what is wrong, and what to change.
    """
    model, args = trainer.model, trainer.args
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_tokens(tokenizer, base, section)
    _check_rows([trainer.train_dataset, trainer.eval_dataset], base, "sft", args.max_length, section)
    if is_sharded(trainer):
        return
    rows = trainer.train_dataset.select(range(min(PROMPTS, len(trainer.train_dataset))))
    allowed, training = ROUNDING[base.dtype], model.training
    model.eval()
    gap = _sampling_gap(model, [row[:8] for row in rows["input_ids"]], tokenizer, sampler, 4)
    if not gap <= allowed:
        raise _apart("log-probabilities as they are sampled", gap, allowed, base, section)
    if args.loss_type in ("nll", "chunked_nll") and not args.padding_free and not args.packing:
        batch = {name: tensor.to(model.device) for name, tensor in trainer.data_collator(rows.to_list()[:2]).items()}
        labels = batch.pop("labels")
        said, logits = model(**batch, labels=labels), model(**batch).logits.float()
        balance = getattr(said, "aux_loss", None)
        coefficient = getattr(base.config.get_text_config(), "router_aux_loss_coef", None) or 0
        loss = (said.loss - (0 if balance is None else coefficient * balance)).item()
        own = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
        if not abs(loss - own) <= allowed * (1 + abs(own)):
            raise RecipeError(
                f"`sft.loss_type` {args.loss_type}: TRL's loss of the first rows is {loss:.4g} and that of the model's logits "
                f"{own:.4g}: it does not follow what {type(base).__name__} does to them; give --sft.loss_type=nll"
            )
    model.train(training)


@torch.no_grad()
def examine_reward(trainer: Any, tokenizer: PreTrainedTokenizerBase, section: ModelSection) -> None:
    """The scores that training compares must be those that the policy stages will read, of one text and of a batch.

    Args:
        trainer: TRL's RewardTrainer, before it trains.

    Raises:
        RecipeError: what is wrong, and what to change.
    """
    model = trainer.model
    base = model.get_base_model()
    check_tokens(tokenizer, base, section)
    datasets = [trainer.train_dataset] + ([] if trainer.eval_dataset is None else [trainer.eval_dataset])
    _check_rows(datasets, base, "reward_training", trainer.args.max_length, section)
    if is_sharded(trainer):
        return
    rows = trainer.train_dataset.select(range(min(PROMPTS // 2, len(trainer.train_dataset)))).to_list()
    batch = {name: tensor.to(model.device) for name, tensor in trainer.data_collator(rows).items()}
    training = model.training
    with moved(model):
        together = model.eval()(**batch).logits[:, 0].float()
        ids = [row[f"{side}_ids"][: trainer.args.max_length] for side in ("chosen", "rejected") for row in rows]
        alone = torch.cat([AdapterReward(model)(torch.tensor([row], device=model.device)) for row in ids])
    model.train(training)
    gap, allowed = ((together - alone).abs() / (1 + alone.abs())).mean().item(), ROUNDING[base.dtype]
    if not gap <= allowed:
        raise _apart("scores in a batch", gap, allowed, base, section)


def _check_rows(datasets: list[Dataset], backbone: Any, stage: str, longest: int | None, section: ModelSection) -> None:
    """No row is longer than what the backbone reads: training would find out at that row.

    Args:
        datasets: tokenised.
        stage, longest: the stage's section and its `max_length`.
    """
    for dataset in datasets:
        columns = [name for name in dataset.column_names if name in ("input_ids", "chosen_ids", "rejected_ids")]
        for number, row in enumerate(dataset.select_columns(columns)):
            tokens = min(max(map(len, row.values())), longest or math.inf)
            _check_positions(backbone, tokens, f"row {number} of the data of `{stage}`", section)


def _apart(what: str, gap: float, allowed: float, backbone: Any, section: ModelSection) -> RecipeError:
    return RecipeError(
        f"`model.path` {section.path}: {what} are {gap:.3g} apart from what plain transformers and PEFT give for one row "
        f"without padding, and rounding to `model.dtype` {section.dtype} explains {allowed:g}: "
        f"{type(backbone).__name__} or `lora` does what the policy stages do not follow; use another"
    )


@torch.no_grad()
def path_gaps(roles: Roles, prompts: Dataset, lora: LoraSection, seed: int) -> dict[str, Tensor]:
    """How far numbers are from those of plain transformers and PEFT for one row without padding, the policy moved on purpose.

    Returns:
        absolute differences in nats of log-probabilities of the policy, as they are sampled and as the training pass computes
        them, and of the reference, [tokens]; relative ones of each reward adapter's scores, [prompts].
    """
    policy, temperature, training = roles.policy, roles.sampler.temperature, roles.policy.training
    queries, attention = (t.to(policy.device) for t in pad_left(prompts["input_ids"][:], roles.tokenizer.pad_token_id))
    context = queries.shape[1]
    with torch.random.fork_rng(), moved(policy):
        torch.manual_seed(seed)
        plain = with_new_adapter(shared_copy(roles.backbone), lora, "CAUSAL_LM").eval()
        set_peft_model_state_dict(plain, get_peft_model_state_dict(policy, save_embedding_layers=False))
        sampled = roles.sampler(policy, queries, attention, TOKENS)
        rows, mask = (sampled.sequences, sampled.attention), sampled.attention[:, context:]
        policy.train()
        trained = response_forward(policy, *rows, context, temperature).logprobs
        policy.train(training)
        reference = response_forward(roles.reference, *rows, context, temperature).logprobs
        by_policy, by_backbone = (_plain_logprobs(model, sampled, context, temperature) for model in (plain, roles.backbone))
    gaps = {
        "log-probabilities as they are sampled": (sampled.logprobs - by_policy).abs()[mask],
        "log-probabilities as the training pass computes them": (trained - by_policy).abs()[mask],
        "log-probabilities of the reference": (reference - by_backbone).abs()[mask],
    }
    for name, term in roles.reward.terms.items():
        if isinstance(term.scorer, AdapterReward):
            gaps[f"scores of the reward `{name}`"] = _score_gaps(term.scorer, sampled)
    return gaps


@torch.no_grad()
def examine_judged(name: str, policy: Any, roles: Roles, prompts: Dataset) -> None:
    """A policy that was made elsewhere is sampled as its own forward pass has it.

    Args:
        name: in `evaluate.policies`.
        prompts: tokenised.

    Raises:
        RecipeError: it is not.
    """
    gap = _sampling_gap(policy, prompts[:2]["input_ids"], roles.tokenizer, roles.sampler, TOKENS)
    if not gap <= ROUNDING[policy.dtype]:
        raise RecipeError(
            f"`evaluate.policies`: {name}: log-probabilities as it is sampled are {gap:.3g} nats a token from those of its own "
            f"forward pass, and rounding explains {ROUNDING[policy.dtype]:g}: an adapter or model that is not followed here"
        )


@contextmanager
def moved(policy: nn.Module) -> Iterator[None]:
    """While this lasts, everything that is trained is a little elsewhere; then it is bit for bit what it was."""
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    before = [parameter.data for parameter in trained]
    try:
        for parameter in trained:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            size = parameter.data.square().mean().sqrt()
            parameter.data = parameter.data + noise * (0.1 * size if size > 0 else 0.02)  # B starts at 0
        yield
    finally:
        for parameter, data in zip(trained, before, strict=True):
            parameter.data = data


def _sampling_gap(
    model: Any, rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, sampler: Sampler, length: int
) -> float:
    """Mean nats a token between log pi as completions of `rows` are sampled and as the model's own forward pass has it."""
    queries, attention = (tensor.to(model.device) for tensor in pad_left(rows, tokenizer.pad_token_id))
    context = queries.shape[1]
    with torch.random.fork_rng():
        sampled = sampler(model, queries, attention, length)
    plain = _plain_logprobs(model, sampled, context, sampler.temperature)
    return (sampled.logprobs - plain).abs()[sampled.attention[:, context:]].mean().item()


def _plain_logprobs(model: Any, sampled: Sampled, context: int, temperature: float) -> Tensor:
    """log pi of each token by the model's own forward pass over one row at a time, without padding; [batch, response]"""
    logprobs = torch.zeros_like(sampled.logprobs)
    for row, (ids, tokens) in enumerate(zip(sampled.sequences, sampled.attention, strict=True)):
        ids, count = ids[tokens], int(tokens[context:].sum())
        logits = model(input_ids=ids.unsqueeze(0)).logits[0, -count - 1 : -1].float() / temperature
        logprobs[row, :count] = logits.log_softmax(-1).gather(1, ids[-count:, None]).squeeze(1)
    return logprobs


def _score_gaps(scorer: AdapterReward, sampled: Sampled) -> Tensor:
    together, alone = scorer(sampled.sequences, sampled.attention), []
    classifier = scorer.model.get_base_model()
    trunk = getattr(classifier, classifier.base_model_prefix)
    for ids, tokens in zip(sampled.sequences, sampled.attention, strict=True):
        ids = ids[tokens]
        kept = ids if scorer.read_eos else ids[~torch.isin(ids, torch.tensor(scorer.ends, device=ids.device))]
        hidden = trunk(input_ids=kept.unsqueeze(0)).last_hidden_state[0, -1]
        alone.append(classifier.score(hidden.float())[0])
    return (together - torch.stack(alone)).abs() / (1 + together.abs())
