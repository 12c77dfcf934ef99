"""Text to token ids: tokenizers, and the datasets each stage trains on."""

from collections.abc import Iterable

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_recipes.recipe import Recipe, RecipeError


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, padding on the left as generation needs.

    Raises:
        RecipeError: without a pad token of its own. TRL finds a response's end as the first pad, so pad must differ
            from eos.
    """
    tokenizer = AutoTokenizer.from_pretrained(recipe.path(recipe.model.path), padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise RecipeError(
            f"the tokenizer of `model.path` {recipe.model.path} has the pad token {tokenizer.pad_token!r} and the eos "
            f"token {tokenizer.eos_token!r}; pad must exist and differ from eos: PPO finds a response's end by its first pad"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with distinct pad, bos and eos; every text starts with bos."""
    pad, bos, eos = "<pad>", "<s>", "</s>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[pad, bos, eos],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    limit: int | None = None,
    at_least: int = 1,
) -> Dataset:
    """Adds `input_ids`; prompts over `max_tokens` are left out and counted, never cut.

    Args:
        limit: keep at most the first `limit` prompts that fit.
        at_least: how many the stage needs; PPO fills a whole batch.

    Raises:
        RecipeError: fewer than `at_least` prompts fit.
    """
    ids = tokenizer(list(dataset["prompt"]))["input_ids"]
    fits = [i for i, row in enumerate(ids) if 0 < len(row) <= max_tokens][:limit]
    if len(fits) < at_least:
        raise RecipeError(
            f"{len(fits)} of {len(ids)} prompts have between 1 and {max_tokens} tokens, and {at_least} are needed for one "
            f"batch; raise `data.max_prompt_tokens` or lower the batch size"
        )
    dropped = sum(not 0 < len(row) <= max_tokens for row in ids)
    if dropped:
        print(f"{dropped} of {len(ids)} prompts are longer than data.max_prompt_tokens={max_tokens} and left out")
    return dataset.select(fits).add_column("input_ids", [ids[i] for i in fits])


def tokenize_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, read_eos: bool) -> Dataset:
    """`chosen_ids` and `rejected_ids` as TRL's RewardTrainer takes them: prompt + text, with eos only if `read_eos`.

    A column `length` (of the longer of the two) lets `train_sampling_strategy: group_by_length` batch equals together.
    """
    eos = tokenizer.eos_token if read_eos else ""

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        chosen, rejected = (
            tokenizer([p + t + eos for p, t in zip(rows["prompt"], rows[side], strict=True)])["input_ids"]
            for side in ("chosen", "rejected")
        )
        length = [max(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
        return {"chosen_ids": chosen, "rejected_ids": rejected, "length": length}

    return dataset.map(tokenize, batched=True, desc="Tokenizing pairs")
