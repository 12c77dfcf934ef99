"""Text to token ids: tokenizers, and the datasets each stage trains on."""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, StopStringCriteria
from transformers.utils import cached_file

from rlhf_recipes.recipe import Recipe, RecipeError, nearest, shortened

Prompt = str | list[dict[str, str]]  # text, or chat messages
Template = dict[str, Any]  # what a chat template gets beside the messages
_ROLES = ("system", "user", "assistant", "tool")  # that a template knows, or refuses
_OWN_ARGUMENTS = {"conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict",
                  "return_tensors", "padding", "truncation", "max_length", "return_assistant_tokens_mask"}  # fmt: skip
_FOR_TEMPLATES = ("tools", "chat_template_kwargs")
_OF_TRL = {"labels", "completion_mask", "assistant_masks", "position_ids", "seq_lengths", "messages"}  # it would take them
_TRIED, _LOOKED_AT = 10, 100  # rows
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
        tokenizer.chat_template = (recipe.folder / recipe.model.chat_template).read_text(encoding="utf-8-sig")


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


def load_ends(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Ends:
    """Where a completion by the recipe's backbone ends."""
    return Ends(tokenizer, end_token_ids(tokenizer, recipe.path(recipe.model.path)), recipe.sampling.stop)


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


# --- one way to token ids, whichever stage asks --------------------------------------------------------------------


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages rather than text."""
    return not isinstance(prompt, str)


def prompt_text(prompt: Prompt) -> str:
    """A prompt to be read by a person."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_content_text(message)}" for message in prompt)


def _content_text(message: dict[str, Any]) -> str:
    """Of a message, whose content may be a list of parts, or absent beside `tool_calls`."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def template_of(row: dict[str, Any]) -> Template:
    """What a dataset's row gives the chat template beside its messages, under TRL's names: `tools`, as a list or as JSON, and
    the variables of `chat_template_kwargs`.

    Raises:
        RecipeError: a variable is one that each stage sets itself.
    """
    tools, variables = row.get("tools"), _without_nulls(row.get("chat_template_kwargs") or {})
    tools = json.loads(tools) if isinstance(tools, str) else _without_nulls(tools)
    if taken := sorted(variables.keys() & _OWN_ARGUMENTS):
        raise RecipeError(f"`chat_template_kwargs` has {taken[0]}, which each stage sets itself; leave it out")
    return ({"tools": tools} if tools else {}) | variables


def _without_nulls(value: Any) -> Any:
    """Without the keys that an Arrow column gives a row because another has them."""
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return value


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: Template | None = None) -> list[int]:
    """Token ids after which a completion starts: of chat, the template up to where the assistant speaks, or, where the last
    message is the assistant's already, up to that message's last word.

    An end that a tokenizer appends to every text (`add_eos_token`) is left out.

    Args:
        template: see `template_of`.

    Raises:
        RecipeError: chat, and the tokenizer has no chat template, or it refuses the messages.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        return ids[: len(ids) - _appended(tokenizer)]
    begun = prompt[-1]["role"] == "assistant"
    return _apply_template(tokenizer, prompt, template, continue_final_message=begun, add_generation_prompt=not begun)


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt, template: Template | None = None
) -> list[int]:
    """The second half of `encode_pair`."""
    return encode_pair(tokenizer, prompt, completion, template=template)[1]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completion: Prompt,
    ends: list[int] | None = None,
    template: Template | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion, an end of text last.

    Text is tokenised by itself, as a sampled completion follows its prompt token by token. Of chat, a completion starts where
    the template first writes something else because it follows, as in TRL from 1.14: some put the answer's (empty) reasoning
    there. It stops at the first end, where a sampled one stops too; a completion of several messages at the last.

    Args:
        completion: text, or the messages that follow the prompt's.
        ends: see `end_token_ids`; by default the tokenizer's eos alone.
        template: see `template_of`.

    Raises:
        RecipeError: the template refuses the messages, rewrites those of the prompt once an answer follows, or ends an answer
            without any of the ends.
    """
    eos, ends = tokenizer.eos_token_id, ends or [tokenizer.eos_token_id]
    before = encode_prompt(tokenizer, prompt, template)
    if isinstance(prompt, str):
        assert isinstance(completion, str), "a completion of text is text"
        ids = _following(tokenizer, prompt, before, completion)
        return before, ids if ids and ids[-1] in ends else [*ids, eos]  # as TRL's SFT: text may have its end already
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    whole = _apply_template(tokenizer, answered(prompt, answer), template)
    start = common_length(before, whole)
    if start < len(before):
        conversation = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
        fixed = _apply_template(tokenizer, conversation, template) if conversation else []
        if start < len(fixed) - 1:  # whose last token may be longer, with the next letters
            raise RecipeError(
                "the chat template writes a prompt differently once an answer follows it, so supervised stages would train "
                f"on other tokens than PPO samples: {tokenizer.decode(before)!r} against "
                f"{tokenizer.decode(whole[: len(before)])!r}; change the template (`model.chat_template`)"
            )
    ids = whole[start:]
    stops = [i + 1 for i, token in enumerate(ids) if token in ends]
    said = _content_text(answer[-1]).strip()
    if said and tokenizer.decode(ids[stops[-1] if stops else 0 :]).strip().endswith(said):
        return whole[:start], [*ids, eos]  # GLM-4 ends a turn by beginning the next one
    if stops:
        return whole[:start], ids[: stops[0] if len(answer) == 1 else stops[-1]]
    raise RecipeError(
        f"the chat template ends an answer with {tokenizer.decode(ids[-2:])!r} and not with the tokenizer's eos token "
        f"{tokenizer.eos_token!r} or another end of the model, so a sampled completion would not stop there; name its end with "
        f"`model.eos_token`"
    )


def answered(prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation with its completion; where the prompt's last message is the assistant's, the answer goes on with it."""
    if prompt[-1]["role"] != "assistant" or answer[0]["role"] != "assistant":
        return [*prompt, *answer]
    return [*prompt[:-1], {**answer[0], "content": _content_text(prompt[-1]) + _content_text(answer[0])}, *answer[1:]]


def _following(tokenizer: PreTrainedTokenizerBase, prompt: str, before: list[int], completion: str) -> list[int]:
    """Token ids of a text that follows `before`, those of the prompt: together they decode to both texts.

    By itself it is tokenised to that, unless the tokenizer puts a space before a text: then it is tokenised after a sign
    that joins with nothing.
    """
    alone = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if not _puts_space_before(tokenizer):
        return alone
    whole = tokenizer.decode(tokenizer(prompt + completion)["input_ids"], skip_special_tokens=True)
    for sign in ("", "\n", ",", "."):
        start, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sign, sign + completion))
        ids = ids[len(start) :] if ids[: len(start)] == start else alone
        if tokenizer.decode(before + ids, skip_special_tokens=True) == whole:
            return ids
    return alone


@functools.lru_cache(maxsize=8)
def _puts_space_before(tokenizer: PreTrainedTokenizerBase) -> bool:
    """As Llama 2's and Mistral's do, of SentencePiece: what is tokenised apart then decodes to other texts."""
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b", " b")]
    return [tokenizer.decode(apart[0] + ids, skip_special_tokens=True) for ids in apart[1:]] != ["ab", "a b"]


@functools.lru_cache(maxsize=8)
def _appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer appends to every text; SentencePiece and byte-level ones mostly none."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    after = [len(whole) - i - len(text) for i in range(len(whole)) if text and whole[i : i + len(text)] == text]
    return after[-1] if after else 0


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
    return [text[common_length(start, text) :] for start, text in zip(before, whole, strict=True)]


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with together."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def join_padded(prompts: list[list[int]], completions: list[list[int]], pad: int) -> tuple[Tensor, Tensor, int]:
    """Rows of prompt + completion, padded on both sides to one length, and which of their positions are tokens, both [rows,
    tokens]; and the context length, at which completions start."""
    context, longest = max(map(len, prompts)), max(map(len, completions))
    pairs = list(zip(prompts, completions, strict=True))
    rows = [[pad] * (context - len(x)) + x + y + [pad] * (longest - len(y)) for x, y in pairs]
    attention = [[0] * (context - len(x)) + [1] * (len(x) + len(y)) + [0] * (longest - len(y)) for x, y in pairs]
    return torch.tensor(rows), torch.tensor(attention, dtype=torch.bool), context


def pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids padded on the left to one length, and which of their positions are tokens; both [rows, tokens]"""
    ids, attention, _ = join_padded(rows, [[] for _ in rows], pad)
    return ids, attention


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], template: Template | None, **how: Any
) -> list[int]:
    advice = "name one with `model.chat_template`, or let the dataset have text"
    return list(render(tokenizer, messages, template, "`model.path`", advice, tokenize=True, **how))


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: Template | None,
    whose: str,
    advice: str,
    **how: Any,
) -> Any:
    """`tokenizer.apply_chat_template`, of content as the template reads it: text, or a list of parts.

    Args:
        template: see `template_of`.
        whose: of which model the tokenizer is.
        advice: what to do without a template.
        how: `tokenize` and the like.

    Raises:
        RecipeError: there is no template, it refuses messages or leaves out one of a role it does not know, or they hold more
            than text.
    """
    if tokenizer.chat_template is None:
        raise RecipeError(f"prompts are chat messages, and the tokenizer of {whose} has no chat template; {advice}")
    messages = [_without_nulls(message) | {"content": _readable(tokenizer, message.get("content"))} for message in messages]
    try:
        written = tokenizer.apply_chat_template(messages, **(template or {}), return_dict=False, **how)
        unusual = [message for message in messages if message["role"] not in _ROLES]
        text = tokenizer.apply_chat_template(messages, **(template or {}), tokenize=False) if unusual else ""
    except Exception as error:  # a template may raise anything
        raise RecipeError(
            f"the chat template of {whose} does not take these messages: {type(error).__name__}: {error}; change the messages "
            f"or the template"
        ) from error
    for message in unusual:
        if _content_text(message).strip() not in text:
            raise RecipeError(f"the chat template of {whose} leaves out the message of the role {message['role']!r}; rename it")
    return written


def _readable(tokenizer: PreTrainedTokenizerBase, content: Any) -> Any:
    """A message's content in the form that the chat template reads: templates of models that also read images leave out
    text that is not in a part, others would print the parts' Python."""
    if not isinstance(content, str | list):
        return content
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    other = next((part for part in parts if not isinstance(part, dict) or part.get("type", "text") != "text"), None)
    if other is not None:
        raise RecipeError(f"a message holds {shortened(other)}; only text is read here")
    reads_text, reads_parts = _reads(tokenizer, str(tokenizer.chat_template))
    if isinstance(content, str):
        return parts if reads_parts and not reads_text else content
    return parts if reads_parts else "".join(part["text"] for part in parts)


@functools.lru_cache(maxsize=8)
def _reads(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[bool, bool]:
    """Whether `template`, the tokenizer's, shows content that is text, and content that is a list of parts."""

    def shows(content: Any) -> bool:
        try:
            shown = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # noqa: BLE001 - a template may raise anything
            return False
        return "probe" in shown and "{'" not in shown

    return shows("probe"), shows([{"type": "text", "text": "probe"}])


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
            return {"input_ids": _apply_template(tokenizer, messages, template)}

    if "completion" not in columns and "text" in columns and not _appended(tokenizer):
        return dataset.remove_columns(sorted(columns & _OF_TRL))
    tokenized = dataset.map(tokenize, with_indices=True, remove_columns=dataset.column_names, desc="Tokenizing demonstrations")
    if by_trl and not columns & {"text", "completion"}:
        return dataset.select_columns(sorted(columns & {"messages", *_FOR_TEMPLATES}))
    return tokenized


def warn_of_doubled_tokens(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, function: str) -> None:
    """A line on standard error for what `doubled_tokens` finds, once a run."""
    for line in doubled_tokens(dataset, tokenizer, function):
        _warn(tokenizer, line)


@functools.lru_cache
def _warn(tokenizer: PreTrainedTokenizerBase, line: str) -> None:
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
