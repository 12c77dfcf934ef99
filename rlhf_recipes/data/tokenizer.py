"""Tokenizers: loading one, making one, and the tokens and texts that end a completion."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, StopStringCriteria
from transformers.utils import cached_file

from rlhf_recipes.recipe.errors import RecipeError, loading, nearest
from rlhf_recipes.recipe.sections import ModelSection, Recipe

_MAY_BE_ABSENT = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, padding on the left as generation needs.

    Raises:
        RecipeError: see `ModelSection.check_pad`.
    """
    model = recipe.model
    with loading(f"the tokenizer of `model.path` {recipe.said(model.path)}", switch="model.trust_remote_code"):
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.path(model.path), padding_side="left", trust_remote_code=model.trust_remote_code
        )
    complete_tokenizer(tokenizer, model, recipe.folder)
    model.check_pad(tokenizer.pad_token, tokenizer.eos_token)
    return tokenizer


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, model: ModelSection, folder: Path) -> None:
    """Gives a tokenizer the pad and eos token and the chat template of the recipe, where it has them.

    Raises:
        RecipeError: the vocabulary has no such token. A new one would need a new row of the embedding.
    """
    for name in ("pad_token", "eos_token"):
        token = getattr(model, name)
        if token is None:
            continue
        vocabulary = tokenizer.get_vocab()
        if token not in vocabulary:
            near = nearest(token, vocabulary)
            raise RecipeError(f"`model.{name}` {token!r}: not in the vocabulary of {model.path}{near}")
        setattr(tokenizer, name, token)
    if model.chat_template is not None:
        tokenizer.chat_template = (folder / model.chat_template).read_text(encoding="utf-8-sig")


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
            text = config.get("text_config") or {}  # of models that also read images
            ids = config.get("eos_token_id", text.get("eos_token_id"))
            said += ids if isinstance(ids, list) else [ids]
    return [token for token in dict.fromkeys(said) if isinstance(token, int) and 0 <= token < len(tokenizer)]


class Ends:
    """Where a completion ends: with any of some tokens, or of some texts.

    Args:
        tokens: ids, the tokenizer's eos first.
        texts: `sampling.stop`; a completion ends with the token that completes one of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: list[int], texts: list[str] | None = None) -> None:
        self.tokens, self.pad = tuple(tokens), tokenizer.pad_token_id
        self.texts = StopStringCriteria(tokenizer, list(texts)) if texts else None

    def are(self, tokens: Tensor) -> Tensor:
        """Which of `tokens` [...] are end tokens; [...]"""
        return torch.isin(tokens, torch.tensor(self.tokens, device=tokens.device))

    def reached(self, responses: Tensor) -> Tensor:
        """Which of `responses` [batch, tokens so far] end with their last token; [batch]"""
        ended = self.are(responses[:, -1])
        return ended if self.texts is None else ended | self.texts(responses, None)


def load_ends(tokenizer: PreTrainedTokenizerBase, backbone: str, stop: list[str] | None) -> Ends:
    """Where a completion by a backbone ends.

    Args:
        backbone: see `end_token_ids`.
        stop: `sampling.stop`.
    """
    return Ends(tokenizer, end_token_ids(tokenizer, backbone), stop)


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


def train_readable_tokenizer(texts: list[str], vocab_size: int, model_type: str) -> PreTrainedTokenizerBase:
    """`train_tokenizer` as it is read back once it is saved beside a model of this type, with at most `vocab_size` tokens.

    transformers reads the tokenizers of some families by a class of theirs: Qwen2's splits words its own way and adds a token.

    Raises:
        RecipeError: read back again, it gives other tokens.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    again = _read_back(tokenizer, model_type)
    if len(again) > vocab_size:
        tokenizer = train_tokenizer(texts, 2 * vocab_size - len(again))
        again = _read_back(tokenizer, model_type)
    if len(again) == len(tokenizer) and _same_tokens(again, tokenizer, texts):
        return tokenizer
    if len(again) > vocab_size or not _same_tokens(_read_back(again, model_type), again, texts):
        raise RecipeError(
            f"`model.architecture.model_type` {model_type}: transformers would read the tokenizer that is trained here as "
            f"{type(again).__name__}, which gives other tokens; choose another type, such as llama"
        )
    return again


def _same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: list[str]) -> bool:
    return all(one(text)["input_ids"] == other(text)["input_ids"] for text in texts[:100])


def _read_back(tokenizer: PreTrainedTokenizerBase, model_type: str) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
