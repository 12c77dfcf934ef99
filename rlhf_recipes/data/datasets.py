"""A task's datasets as each stage trains on them: token ids."""

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.tokens import _content_text, appended, apply_template, encode_pair, encode_prompt, template_of
from rlhf_recipes.recipe.errors import RecipeError, shortened

_FOR_TEMPLATES = ("tools", "chat_template_kwargs")
_OF_TRL = {"labels", "completion_mask", "assistant_masks", "position_ids", "seq_lengths", "messages"}  # it would take them
_TRIED, _LOOKED_AT = 10, 100  # rows


# --- the datasets of the stages ------------------------------------------------------------------------------------


@contextmanager
def row_of(function: str, number: int) -> Iterator[None]:
    """While this lasts, whatever goes wrong is that row's of what `function` of task.py returned."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"`{function}`, row {number}: {error}") from error
    except Exception as error:  # tokenizers raise anything
        raise RecipeError(f"`{function}`, row {number}: cannot be tokenised: {type(error).__name__}: {error}") from error


def prompt_ids(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of `load_prompts`: its own `input_ids`, where it has them as TRL's PPO takes them, else each prompt's."""
    if "input_ids" in dataset.column_names:
        given = _given_ids(dataset, tokenizer, "load_prompts")
        if "attention_mask" not in dataset.column_names:
            return given
        masks = dataset["attention_mask"]  # of rows that were padded as they were tokenised
        return [[token for token, on in zip(*row, strict=True) if on] for row in zip(given, masks, strict=True)]
    read = dataset.select_columns([name for name in ("prompt", *_FOR_TEMPLATES) if name in dataset.column_names])
    ids = []
    for number, row in enumerate(read):
        with row_of("load_prompts", number):
            ids.append(encode_prompt(tokenizer, row["prompt"], template_of(row)))
    return ids


def _given_ids(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, function: str) -> list[list[int]]:
    """A dataset's own token ids.

    Raises:
        RecipeError: they are none, or of another vocabulary.
    """
    for number, row in enumerate(dataset["input_ids"]):
        with row_of(function, number):
            if not isinstance(row, list) or any(type(token) is not int or not 0 <= token < len(tokenizer) for token in row):
                raise RecipeError(
                    f"`input_ids`: expected tokens from 0 to {len(tokenizer) - 1}, got {shortened(row)}; without this column "
                    f"they are made from the text"
                )
    return dataset["input_ids"][:]


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
        RecipeError: fewer than `at_least` prompts fit, or one is refused by the chat template.
    """
    warn_of_doubled_tokens(dataset, tokenizer, "load_prompts")
    ids = prompt_ids(dataset, tokenizer)
    fits = [i for i, row in enumerate(ids) if 0 < len(row) <= max_tokens][:limit]
    if len(fits) < at_least:
        raise RecipeError(
            f"{len(fits)} of {len(ids)} prompts have between 1 and {max_tokens} tokens, and {at_least} are needed for one "
            f"batch; raise `data.max_prompt_tokens` or lower the batch size"
        )
    empty, dropped = sum(not row for row in ids), sum(len(row) > max_tokens for row in ids)
    speaks = os.environ.get("RANK", "0") == "0"
    if dropped and speaks:
        print(f"{dropped} of {len(ids)} prompts are longer than data.max_prompt_tokens={max_tokens} and left out")
    if empty and speaks:
        print(f"{empty} of {len(ids)} prompts are empty, with nothing that a completion could follow, and left out")
    kept = dataset.select(fits)
    if "prompt" not in dataset.column_names:
        kept = kept.add_column("prompt", tokenizer.batch_decode([ids[i] for i in fits], skip_special_tokens=True))
    if "input_ids" in dataset.column_names:
        kept = kept.remove_columns("input_ids")
    return kept.add_column("input_ids", [ids[i] for i in fits])


def tokenize_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, read_eos: bool, ends: list[int] | None = None
) -> Dataset:
    """`chosen_ids` and `rejected_ids` as TRL's RewardTrainer takes them: prompt + completion, with its end only if `read_eos`.

    A column `length` (of the longer of the two) lets `train_sampling_strategy: group_by_length` batch equals together.

    Args:
        ends: see `end_token_ids`.
    """
    warn_of_doubled_tokens(dataset, tokenizer, "load_preferences")

    def tokenize(row: dict[str, Any], number: int) -> dict[str, Any]:
        ids = {}
        for side in ("chosen", "rejected"):
            with row_of("load_preferences", number):
                prompt, completion = encode_pair(tokenizer, row["prompt"], row[side], ends, template_of(row))
            ids[f"{side}_ids"] = prompt + (completion if read_eos else completion[:-1])
        return {**ids, "length": max(map(len, ids.values()))}

    return dataset.map(tokenize, with_indices=True, desc="Tokenizing pairs")


def tokenize_demonstrations(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, ends: list[int] | None = None, by_trl: bool = False
) -> Dataset:
    """Token ids as TRL's SFTTrainer takes them, of completions with the mask of what is learned. Text is left to it, and so are
    datasets that have their `input_ids`.

    TRL would tokenise prompt and completion in one piece, to other ids than PPO sees where a token spans both.

    Args:
        ends: see `end_token_ids`.
        by_trl: leave messages to it too: it finds the assistant's tokens (`sft.assistant_only_loss`).
    """
    columns = set(dataset.column_names)
    warn_of_doubled_tokens(dataset, tokenizer, "load_demonstrations")
    if "input_ids" in columns:
        _given_ids(dataset, tokenizer, "load_demonstrations")
        names = sorted(columns & {"input_ids", "labels", "completion_mask", "assistant_masks"})
        if "attention_mask" not in columns:
            return dataset.select_columns(names)

        def without_padding(row: dict[str, Any]) -> dict[str, list[int]]:
            return {
                name: [value for value, kept in zip(row[name], row["attention_mask"], strict=True) if kept] for name in names
            }

        return dataset.map(without_padding, remove_columns=dataset.column_names, desc="Tokenizing demonstrations")

    def tokenize(row: dict[str, Any], number: int) -> dict[str, list[int]]:
        with row_of("load_demonstrations", number):
            template = template_of(row)
            if "completion" in columns:
                prompt, completion = encode_pair(tokenizer, row["prompt"], row["completion"], ends, template)
                return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}
            if "text" in columns:  # TRL would append an eos to the tokenizer's own
                prompt, end = encode_pair(tokenizer, row["text"], "", ends)
                return {"input_ids": prompt if prompt[-1:] == end else prompt + end}
            messages = row["messages"]
            if number < _TRIED and len(messages) > 1 and messages[-1]["role"] == "assistant":
                # raises where the template would train on other tokens than PPO samples
                encode_pair(tokenizer, messages[:-1], messages[-1:], ends, template)
            return {"input_ids": apply_template(tokenizer, messages, template)}

    if "completion" not in columns and "text" in columns and not appended(tokenizer):
        return dataset.remove_columns(sorted(columns & _OF_TRL))
    tokenized = dataset.map(tokenize, with_indices=True, remove_columns=dataset.column_names, desc="Tokenizing demonstrations")
    if by_trl and not columns & {"text", "completion"}:
        return dataset.select_columns(sorted(columns & {"messages", *_FOR_TEMPLATES}))
    return tokenized


def warn_of_doubled_tokens(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, function: str) -> None:
    """A line on standard error for what `doubled_tokens` finds, once a run."""
    for line in doubled_tokens(dataset, tokenizer, function):
        warn(tokenizer, line)


@functools.lru_cache
def warn(tokenizer: PreTrainedTokenizerBase, line: str) -> None:
    """Of training and held-out rows once; each run has a tokenizer of its own."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {line}", file=sys.stderr)


def doubled_tokens(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, function: str) -> list[str]:
    """What the first rows have twice once they are tokenised: special tokens that stand in the text already, as in text that
    has been through a chat template; and ends inside of completions. One line for each column and token."""
    found: dict[tuple[str, str], tuple[int, str, str]] = {}
    special = sorted({*tokenizer.all_special_tokens, tokenizer.eos_token} - {None})
    ends = [token for token in special if token not in (tokenizer.bos_token, tokenizer.pad_token)]
    bos = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    for number, row in enumerate(dataset.select(range(min(_LOOKED_AT, len(dataset))))):
        for column in ("prompt", "chosen", "rejected", "completion", "text", "messages"):
            value = row.get(column)
            if isinstance(value, str):
                if bos and column in ("prompt", "text") and value.startswith(bos):
                    found.setdefault((column, bos), (number, "begins with", "the tokenizer puts it before every text"))
                token = next((token for token in ends if value.rstrip().endswith(token)), None)
                eos = tokenizer.eos_token or ""
                if eos and column in ("chosen", "rejected", "completion") and eos in value.rstrip().removesuffix(eos):
                    found.setdefault((column, eos), (number, "holds", "a sampled completion would stop there"))
                if token and column in ("chosen", "rejected", "completion"):
                    found.setdefault((column, token), (number, "ends with", "the end of a completion is added to it"))
                if token == tokenizer.eos_token and column == "prompt":
                    found.setdefault((column, token), (number, "ends with", "a completion would follow the end of a text"))
            elif isinstance(value, list):
                said = " ".join(_content_text(message) for message in value if isinstance(message, dict))
                token = next((token for token in special if token in said), None)
                if token:
                    found.setdefault((column, token), (number, "holds", "the chat template writes such tokens itself"))
    return [
        f"`{function}`: `{column}` of row {number} {where} the special token {token}, and {why}; leave it out of the text"
        for (column, token), (number, where, why) in found.items()
    ]
