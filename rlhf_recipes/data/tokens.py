"""Text to token ids: tokenizers, and the datasets each stage trains on."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.recipe.errors import RecipeError, shortened

Prompt = str | list[dict[str, str]]  # text, or chat messages
Template = dict[str, Any]  # what a chat template gets beside the messages
_ROLES = ("system", "user", "assistant", "tool")  # that a template knows, or refuses
_OWN_ARGUMENTS = {"conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict",
                  "return_tensors", "padding", "truncation", "max_length", "return_assistant_tokens_mask"}  # fmt: skip


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
        return ids[: len(ids) - appended(tokenizer)]
    begun = prompt[-1]["role"] == "assistant"
    return apply_template(tokenizer, prompt, template, continue_final_message=begun, add_generation_prompt=not begun)


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
        ids = following(tokenizer, prompt, before, completion)
        return before, ids if ids and ids[-1] in ends else [*ids, eos]  # as TRL's SFT: text may have its end already
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    whole = apply_template(tokenizer, answered(prompt, answer), template)
    start = common_length(before, whole)
    if start < len(before):
        conversation = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
        fixed = apply_template(tokenizer, conversation, template) if conversation else []
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
    """A conversation with its completion; where the prompt's last message is the assistant's, the answer continues it."""
    if prompt[-1]["role"] != "assistant" or answer[0]["role"] != "assistant":
        return [*prompt, *answer]
    return [*prompt[:-1], {**answer[0], "content": _content_text(prompt[-1]) + _content_text(answer[0])}, *answer[1:]]


def following(tokenizer: PreTrainedTokenizerBase, prompt: str, before: list[int], completion: str) -> list[int]:
    """Token ids of a text that follows `before`, those of the prompt: together they decode to both texts.

    By itself it is tokenised to that, unless the tokenizer puts a space before a text: then it is tokenised after a sign
    that joins with nothing.
    """
    alone = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if not puts_space_before(tokenizer):
        return alone
    whole = tokenizer.decode(tokenizer(prompt + completion)["input_ids"], skip_special_tokens=True)
    for sign in ("", "\n", ",", "."):
        start, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sign, sign + completion))
        ids = ids[len(start) :] if ids[: len(start)] == start else alone
        if tokenizer.decode(before + ids, skip_special_tokens=True) == whole:
            return ids
    return alone


@functools.lru_cache(maxsize=8)
def puts_space_before(tokenizer: PreTrainedTokenizerBase) -> bool:
    """As Llama 2's and Mistral's do, of SentencePiece: what is tokenised apart then decodes to other texts."""
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b", " b")]
    return [tokenizer.decode(apart[0] + ids, skip_special_tokens=True) for ids in apart[1:]] != ["ab", "a b"]


@functools.lru_cache(maxsize=8)
def appended(tokenizer: PreTrainedTokenizerBase) -> int:
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


def apply_template(
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
    messages = [_without_nulls(message) | {"content": readable(tokenizer, message.get("content"))} for message in messages]
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


def readable(tokenizer: PreTrainedTokenizerBase, content: Any) -> Any:
    """A message's content in the form that the chat template reads: templates of models that also read images leave out
    text that is not in a part, others would print the parts' Python."""
    if not isinstance(content, str | list):
        return content
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    other = next((part for part in parts if not isinstance(part, dict) or part.get("type", "text") != "text"), None)
    if other is not None:
        raise RecipeError(f"a message holds {shortened(other)}; only text is read here")
    reads_text, reads_parts = reads(tokenizer, str(tokenizer.chat_template))
    if isinstance(content, str):
        return parts if reads_parts and not reads_text else content
    return parts if reads_parts else "".join(part["text"] for part in parts)


@functools.lru_cache(maxsize=8)
def reads(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[bool, bool]:
    """Whether `template`, the tokenizer's, shows content that is text, and content that is a list of parts."""

    def shows(content: Any) -> bool:
        try:
            shown = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # noqa: BLE001 - a template may raise anything
            return False
        return "probe" in shown and "{'" not in shown

    return shows("probe"), shows([{"type": "text", "text": "probe"}])
