"""Text to token ids: tokenizers, and the datasets each stage trains on."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os.path import commonprefix
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from rlhf_recipes.recipe import Recipe, RecipeError, nearest

Prompt = str | list[dict[str, str]]  # text, or chat messages
_MAY_BE_ABSENT = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, padding on the left as generation needs.

    Raises:
        RecipeError: without a pad token of its own. TRL finds a response's end as the first pad, so pad must differ
            from eos.
    """
    trusted = recipe.model.trust_remote_code
    with loading(f"the tokenizer of `model.path` {recipe.said(recipe.model.path)}", switch="model.trust_remote_code"):
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.path(recipe.model.path), padding_side="left", trust_remote_code=trusted
        )
    complete_tokenizer(tokenizer, recipe)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise RecipeError(
            f"the tokenizer of `model.path` {recipe.model.path} has the pad token {tokenizer.pad_token!r} and the eos "
            f"token {tokenizer.eos_token!r}; pad must exist and differ from eos: PPO finds a response's end by its first pad. "
            f"Name another token of its vocabulary with `model.pad_token`"
        )
    return tokenizer


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Gives a tokenizer the pad and eos token and the chat template of the recipe, where it has them.

    Raises:
        RecipeError: the vocabulary has no such token. A new one would need a new row of the embedding.
    """
    for name in ("pad_token", "eos_token"):
        token = getattr(recipe.model, name)
        if token is None:
            continue
        vocabulary = tokenizer.get_vocab()
        if token not in vocabulary:
            near = nearest(token, vocabulary)
            raise RecipeError(f"`model.{name}` {token!r}: not in the vocabulary of {recipe.model.path}{near}")
        setattr(tokenizer, name, token)
    if recipe.model.chat_template is not None:
        tokenizer.chat_template = (recipe.folder / recipe.model.chat_template).read_text(encoding="utf-8")


def end_token_ids(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> list[int]:
    """The tokens at any of which a completion of the model in `folder` ends: the tokenizer's eos first, then those of
    generation_config.json and config.json, each once and only those of the vocabulary.

    Llama 3, Qwen 3, Gemma and Phi name several: the end of a turn and the end of a text.

    Args:
        folder: as `from_pretrained` takes it, also a Hub id.

    Raises:
        RecipeError: one of the files is not what it should be.
    """
    said: list[Any] = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        with loading(f"{folder}: {name}", "cannot be read"):
            file = cached_file(str(folder), name, **_MAY_BE_ABSENT)
            config = json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else {}
            for part in (config, config.get("text_config") or {}):  # nested in models that also read images
                ids = part.get("eos_token_id")
                said += ids if isinstance(ids, list) else [ids]
    return [token for token in dict.fromkeys(said) if isinstance(token, int) and 0 <= token < len(tokenizer)]


@contextmanager
def loading(what: str, problem: str = "cannot be loaded", switch: str = "model.trust_remote_code") -> Iterator[None]:
    """While this lasts, whatever goes wrong is a file that is not what it should be.

    Args:
        switch: the key that allows a model's own code.

    Raises:
        RecipeError: `what`, and why.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # transformers, PEFT, tokenizers and safetensors have no class of errors in common
        if "trust_remote_code" in str(error):
            problem = f"it brings Python code along, which is executed only with `{switch}: true`; read that code first"
        else:
            problem = f"{problem}: {type(error).__name__}: {error}"
        raise RecipeError(f"{what}: {problem}") from error


def texts_of(demonstrations: Dataset) -> list[str]:
    """What a tokenizer is trained on.

    Raises:
        RecipeError: they have no column `text`.
    """
    if "text" not in demonstrations.column_names:
        raise RecipeError(
            f"`sft.from_scratch` trains a tokenizer on a column `text`, and load_demonstrations has "
            f"{', '.join(demonstrations.column_names)}; return text, or continue a backbone with --sft.from_scratch=false"
        )
    return demonstrations["text"][:]


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


# --- one way to token ids, whichever stage asks --------------------------------------------------------------------


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages rather than text."""
    return not isinstance(prompt, str)


def prompt_text(prompt: Prompt) -> str:
    """A prompt to be read by a person."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids after which a completion starts: of chat, the template up to where the assistant speaks.

    Raises:
        RecipeError: chat, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return _apply_template(tokenizer, prompt, add_generation_prompt=True)


def encode_completion(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt) -> list[int]:
    """Token ids of a completion as they follow the prompt's, eos at the end.

    Text is tokenised by itself, as a sampled completion follows its prompt token by token. Of chat, it is what the template
    adds to the prompt, up to the eos: there a sampled completion stops too.

    Raises:
        RecipeError: the template changes the prompt once an answer follows, or ends an answer without the tokenizer's eos.
    """
    eos = tokenizer.eos_token_id
    if isinstance(prompt, str):
        assert isinstance(completion, str), "a completion of text is text"
        return [*tokenizer(completion, add_special_tokens=False)["input_ids"], eos]
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    before, whole = encode_prompt(tokenizer, prompt), _apply_template(tokenizer, [*prompt, *answer])
    if whole[: len(before)] != before:
        raise RecipeError(
            "the chat template writes a prompt differently once an answer follows it, so supervised stages would train on "
            f"other tokens than PPO samples: {tokenizer.decode(before)!r} against {tokenizer.decode(whole[: len(before)])!r}; "
            "change the template in the backbone's tokenizer"
        )
    ids = whole[len(before) :]
    if eos not in ids:
        raise RecipeError(
            f"the chat template ends an answer with {tokenizer.decode(ids[-2:])!r} and not with the tokenizer's eos token "
            f"{tokenizer.eos_token!r}, so a sampled completion would not stop there; make the two agree in the backbone's "
            f"tokenizer"
        )
    return ids[: ids.index(eos) + 1]


def decode_completions(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], completions: list[list[int]]) -> list[str]:
    """The texts of completions without special tokens: each is what it adds to the text of its prompt.

    Decoded by itself, a completion of a SentencePiece tokenizer loses the space before its first word.

    Args:
        prompts, completions: rows of token ids without padding; a completion may have its end.
    """
    eos = tokenizer.eos_token_id  # `model.eos_token` may be none of the tokenizer's special tokens
    rows = [y[:-1] if y and y[-1] == eos else y for y in completions]
    before = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    whole = tokenizer.batch_decode([x + y for x, y in zip(prompts, rows, strict=True)], skip_special_tokens=True)
    return [text[len(commonprefix([start, text])) :] for start, text in zip(before, whole, strict=True)]


def join_padded(prompts: list[list[int]], completions: list[list[int]], pad: int) -> tuple[list[list[int]], int]:
    """Rows of prompt + completion, padded on both sides to one length, and the context length at which completions start."""
    context, longest = max(map(len, prompts)), max(map(len, completions))
    rows = [[pad] * (context - len(x)) + x + y + [pad] * (longest - len(y)) for x, y in zip(prompts, completions, strict=True)]
    return rows, context


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    if tokenizer.chat_template is None:
        raise RecipeError(
            "prompts are chat messages, and the tokenizer of `model.path` has no chat template; put one into its "
            "chat_template.jinja, or let load_prompts return text"
        )
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs))


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
    ids = [encode_prompt(tokenizer, prompt) for prompt in dataset["prompt"]]
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
    """`chosen_ids` and `rejected_ids` as TRL's RewardTrainer takes them: prompt + completion, with eos only if `read_eos`.

    A column `length` (of the longer of the two) lets `train_sampling_strategy: group_by_length` batch equals together.
    """

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        ids = {}
        for side in ("chosen", "rejected"):
            completion = encode_completion(tokenizer, row["prompt"], row[side])
            ids[f"{side}_ids"] = encode_prompt(tokenizer, row["prompt"]) + (completion if read_eos else completion[:-1])
        return {**ids, "length": max(map(len, ids.values()))}

    return dataset.map(tokenize, desc="Tokenizing pairs")


def tokenize_demonstrations(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Prompts and completions as TRL's SFTTrainer takes them; datasets of `text` or `messages` are left to it.

    TRL would tokenise prompt and completion in one piece, to other ids than PPO sees where a token spans both.
    """
    if "messages" in dataset.column_names:
        for messages in dataset[:10]["messages"]:  # raises where the template would train on other tokens than PPO samples
            if messages[-1]["role"] == "assistant":
                encode_completion(tokenizer, messages[:-1], messages[-1:])
    if "completion" not in dataset.column_names:
        return dataset

    def tokenize(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, completion = (
            encode_prompt(tokenizer, row["prompt"]),
            encode_completion(tokenizer, row["prompt"], row["completion"]),
        )
        return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}

    return dataset.map(tokenize, remove_columns=dataset.column_names, desc="Tokenizing demonstrations")
