"""The checks before a run that need the models: seconds, on ten prompts, before anything is written."""

import sys

from accelerate import PartialState
from datasets import Dataset

from rlhf_recipes.data import encode_completion, is_chat
from rlhf_recipes.evaluation import complete
from rlhf_recipes.recipe import Recipe, RecipeError
from rlhf_recipes.roles import Roles

PROMPTS = 10
ROUNDING = 1e-3  # nats a completion


def examine(roles: Roles, prompts: Dataset, recipe: Recipe) -> None:
    """A new policy must be the reference, and its completions of ten prompts must have finite rewards.

    Args:
        prompts: tokenised.

    Raises:
        RecipeError: what is wrong, and what to change.
    """
    _examine_tokens(roles, recipe)
    if is_chat(prompts[0]["prompt"]):
        encode_completion(roles.tokenizer, prompts[0]["prompt"], "An answer.")  # raises where stages would see other tokens
    judged = complete(roles.policy, roles, prompts.select(range(min(PROMPTS, len(prompts)))), recipe)
    kl = judged.kl.abs().max().item()
    if not kl <= ROUNDING:
        raise RecipeError(
            f"the new policy is {kl:.3g} nats from the reference, and should start as it: does {recipe.model.path} behave "
            f"randomly (dropout, noise in its forward pass), or does `model.dtype` {recipe.model.dtype} overflow?"
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


def _examine_tokens(roles: Roles, recipe: Recipe) -> None:
    """The tokenizer and the backbone speak of the same tokens."""
    tokenizer, config = roles.tokenizer, roles.policy.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends != [None] and tokenizer.eos_token_id not in ends:
        raise RecipeError(
            f"`model.path` {recipe.model.path}: its config ends a text with token {ends[0]} "
            f"({tokenizer.convert_ids_to_tokens(ends[0])!r}), its tokenizer with {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token!r}); make `eos_token` of the two agree"
        )
    words, rows = len(tokenizer), roles.policy.get_input_embeddings().num_embeddings
    if words > rows:
        raise RecipeError(
            f"`model.path` {recipe.model.path}: its tokenizer has {words} tokens and its embedding {rows}; resize the "
            f"embedding, or use the tokenizer it was trained with"
        )
