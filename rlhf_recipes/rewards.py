"""Rewards: what is maximised, one number a completion, a weighted sum of reward models and python functions.

    r(x, y) = clip( sum_i w_i (r_i(x, y) - m_i) / s_i ) - length_penalty * tokens - missing_eos_penalty * [no eos]

m_i and s_i are the mean and deviation of r_i over the reference's completions of training prompts with
`reward.normalize`, else 0 and 1.
"""

import asyncio
import inspect
import json
import math
import traceback
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data import Prompt, answered, decode_completions, is_chat, render, template_of
from rlhf_recipes.recipe import RecipeError
from rlhf_recipes.tasks import reward_arguments

T = TypeVar("T")
NO_TEMPLATE = "use a model that has one, or prompts of text"


@dataclass
class Samples:
    """Completions to be scored.

    sequences: prompt + completion as token ids, padded on both sides, [batch, context + response]
    prompts: as the task gave them
    columns: the dataset's other columns, a list of `batch` values each
    attention: which of `sequences` are tokens, [batch, context + response]; all of them by default
    ended: whether a completion has an end, [batch]; by default whether it has an eos
    """

    sequences: Tensor
    context_length: int
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    columns: dict[str, list] = field(default_factory=dict)
    attention: Tensor = None  # type: ignore[assignment]
    ended: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.attention is None:
            self.attention = torch.ones_like(self.sequences, dtype=torch.bool)
        if self.ended is None:
            self.ended = ((self.responses == self.tokenizer.eos_token_id) & self.mask).any(1)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, rows: slice) -> "Samples":
        columns = {name: values[rows] for name, values in self.columns.items()}
        tensors = {name: getattr(self, name)[rows] for name in ("sequences", "attention", "ended")}
        part = replace(self, prompts=self.prompts[rows], columns=columns, **tensors)
        if "texts" in vars(self):  # decoded once, and only for those who read text
            part.texts = self.texts[rows]
        return part

    @property
    def responses(self) -> Tensor:
        return self.sequences[:, self.context_length :]

    @property
    def mask(self) -> Tensor:
        """True on the completion's tokens, its end included; [batch, response]"""
        return self.attention[:, self.context_length :]

    @cached_property
    def texts(self) -> list[str]:
        """What the completions add to the texts of their prompts, without special tokens."""
        prompts, completions = (
            [row[keep].tolist() for row, keep in zip(ids, kept, strict=True)]
            for ids, kept in (
                (self.sequences[:, : self.context_length], self.attention[:, : self.context_length]),
                (self.responses, self.mask),
            )
        )
        return decode_completions(self.tokenizer, prompts, completions)


@dataclass
class Scores:
    """What the rewards say of a batch.

    total: r(x, y), [batch]; 0 where not valid
    valid: false where no reward has an opinion, or one failed with `on_error: skip`: such a row is not learned from, [batch]
    terms: name -> the term's own score before weight and normalisation, NaN without an opinion, [batch]
    prefix: r of the text up to and with each position as far as adapters can tell, before clipping and penalties,
        [batch, context + response]; only if asked for
    parts: name -> share or size of what shaping did, for the metrics, [batch]
    """

    total: Tensor
    valid: Tensor
    terms: dict[str, Tensor]
    parts: dict[str, Tensor]
    prefix: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """`rewards/<name>/mean` and `/std` as TRL's GRPO names them, and the means of `parts`."""
        metrics = {}
        for name, scores in self.terms.items():
            known = scores[~scores.isnan()]
            metrics[f"rewards/{name}/mean"] = known.mean()
            metrics[f"rewards/{name}/std"] = (known - known.mean()).square().mean().sqrt()
        return metrics | {f"rewards/{name}": values.float().mean() for name, values in self.parts.items()}


class RewardError(RecipeError):
    """A python reward raised, or returned what is no score. `rows` are the completions that did it."""

    rows: list[dict[str, Any]]


# --- the kinds of rewards ----------------------------------------------------------------------------------------


class AdapterReward(nn.Module):
    """A LoRA adapter and score head on the shared backbone, read at the last real token.

    Args:
        model: a PEFT sequence classifier with one label.
        ends: the end tokens, eos first.
        read_eos: whether the model was trained to read the end of a finished text; else end tokens are passed over.
    """

    model: Any

    def __init__(self, model: nn.Module, ends: Sequence[int] = (), read_eos: bool = True) -> None:
        super().__init__()
        self.model, self.ends, self.read_eos = model, tuple(ends), read_eos

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def score(self, samples: Samples) -> Tensor:
        return self(*self._finished(samples))

    def prefix_score(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """`score`, and r of the text up to and with each position [batch, context + response]."""
        scores = self.prefix_scores(*self._finished(samples))
        return scores[:, -1], scores[:, : samples.sequences.shape[1]]

    def _finished(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are tokens; a completion that ended with a text of `sampling.stop` gets the eos that the
        model was trained to read."""
        after = samples.context_length + samples.mask.sum(1)
        last = samples.sequences.gather(1, after.unsqueeze(1) - 1).squeeze(1)
        rows = (samples.ended & ~torch.isin(last, torch.tensor(self.ends, device=last.device))).nonzero().squeeze(1)
        if not self.read_eos or not self.ends or not len(rows):
            return samples.sequences, samples.attention
        ids, attention = (nn.functional.pad(tensor, (0, 1)) for tensor in (samples.sequences, samples.attention))
        ids[rows, after[rows]], attention[rows, after[rows]] = self.ends[0], True
        return ids, attention

    def forward(self, input_ids: Tensor, attention: Tensor | None = None) -> Tensor:
        """Scores prompt + completion; returns float32 [batch].

        Args:
            input_ids: padded anyhow, [batch, tokens].
            attention: which of them are tokens, [batch, tokens]; all of them by default.
        """
        hidden, last = self._read(input_ids, attention)
        return self._score(hidden[torch.arange(len(last)), last[:, -1]])

    def prefix_scores(self, input_ids: Tensor, attention: Tensor | None = None) -> Tensor:
        """r of the text up to and with each position, [batch, tokens] -> float32 [batch, tokens]; the last one is r."""
        hidden, last = self._read(input_ids, attention)
        return self._score(hidden).gather(1, last)

    def _read(self, input_ids: Tensor, attention: Tensor | None) -> tuple[Tensor, Tensor]:
        """The trunk's hidden states [batch, tokens, hidden], and the last real token up to each position [batch, tokens]."""
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention is None else attention.bool()
        if not self.read_eos:
            mask = mask & ~torch.isin(input_ids, torch.tensor(self.ends, device=input_ids.device))
        classifier = self.model.get_base_model()
        trunk = getattr(classifier, classifier.base_model_prefix)
        hidden = trunk(
            input_ids=input_ids.masked_fill(~mask, 0),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        position = torch.arange(mask.shape[1], device=mask.device)
        return hidden, torch.where(mask, position, 0).cummax(1).values

    def _score(self, hidden: Tensor) -> Tensor:
        return self.model.get_base_model().score(hidden.float()).squeeze(-1)


class ModelReward(nn.Module):
    """Any sequence classifier with a tokenizer of its own, which reads the text of prompt and completion.

    Args:
        label: the column of its output.
        probability: the softmax (of one label: sigmoid) instead of the logit.
        max_length: tokens; a longer text loses its beginning.
        pair: prompt and completion as the tokenizer's two segments instead of one text.
        title: for what is said of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        label: int = 0,
        probability: bool = False,
        max_length: int | None = None,
        pair: bool = False,
        title: str = "the reward model",
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.title = model, tokenizer, title
        self.label, self.probability, self.max_length, self.pair = label, probability, max_length, pair

    @torch.no_grad()
    def score(self, samples: Samples) -> Tensor:
        """Scores, [batch].

        Raises:
            RecipeError: its chat template does not take the messages, or there is none.
        """
        inputs = self._tokenize(samples.prompts, samples.texts, samples.columns).to(self.model.device)
        logits = self.model(**inputs).logits.float()
        if self.probability:
            logits = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)
        return logits[:, self.label].to(samples.sequences.device)

    def _tokenize(self, prompts: list[Prompt], texts: list[str], columns: dict[str, list] | None = None):
        padded = {"padding": True, "truncation": self.max_length is not None, "max_length": self.max_length}
        rows = list(zip(prompts, texts, strict=True))
        if is_chat(prompts[0]):
            given = [{name: values[i] for name, values in (columns or {}).items()} for i in range(len(rows))]
            whole = [self._render(*row, template_of(others)) for row, others in zip(rows, given, strict=True)]
            return self.tokenizer(whole, add_special_tokens=False, return_tensors="pt", **padded)
        if self.pair:
            pairs = [self._pair(str(prompt), text) for prompt, text in rows]
            return self.tokenizer.pad({name: [pair[name] for pair in pairs] for name in pairs[0]}, return_tensors="pt")
        return self.tokenizer([f"{prompt}{text}" for prompt, text in rows], return_tensors="pt", **padded)

    def _render(self, prompt: Any, text: str, template: dict[str, Any]) -> str:
        chat = answered(prompt, [{"role": "assistant", "content": text}])
        return render(self.tokenizer, chat, template, self.title, NO_TEMPLATE, tokenize=False)

    def _pair(self, prompt: str, text: str):
        """The two segments, cut as one text is: the prompt loses its beginning, and where that is not enough all of it, and the
        completion its own."""
        if self.max_length is None:
            return self.tokenizer(prompt, text)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        first, second = (len(self.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (prompt, text))
        if second >= room < first + second:
            return self.tokenizer("", text, truncation="only_second", max_length=self.max_length)
        return self.tokenizer(prompt, text, truncation="only_first", max_length=self.max_length)


class FunctionReward:
    """A python reward of task.py: a score, or None for "no opinion", a row; called as TRL's GRPO does, by keyword:
    `reward(prompts=..., completions=..., completion_ids=..., **columns)` with what it names.

    It may be async. Chat prompts are message lists, and so are the completions then.
    """

    def __init__(self, function: Callable[..., Any], on_error: Literal["stop", "skip"] = "stop") -> None:
        self.function, self.on_error = function, on_error

    async def score(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Scores, NaN for None, and which rows failed; both [batch].

        Raises:
            RewardError: with `on_error: stop`, at an exception or a value that is no score.
            RecipeError: it has a parameter that nothing gives.
        """
        self._arguments(samples[:1])
        try:
            returned = await self._call(samples)
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            returned = await self._one_by_one(samples, error)
        complaints = [_complaint(value) for value in returned]
        if self.on_error == "stop" and any(complaints):
            raise self._failure(samples, complaints)
        scores = [math.nan if value is None or _complaint(value) else float(value) for value in returned]
        return torch.tensor(scores), torch.tensor([complaint is not None for complaint in complaints])

    def _arguments(self, samples: Samples) -> tuple[list[Any], dict[str, Any]]:
        completions: list[Any] = samples.texts
        if is_chat(samples.prompts[0]):
            completions = [[{"role": "assistant", "content": text}] for text in samples.texts]
        ids = [row[keep].tolist() for row, keep in zip(samples.responses, samples.mask, strict=True)]
        own = {"prompts": samples.prompts, "completions": completions, "completion_ids": ids}
        return reward_arguments(self.function, samples.columns | own)

    async def _call(self, samples: Samples) -> list:
        arguments, named = self._arguments(samples)
        if inspect.iscoroutinefunction(self.function):
            returned = await self.function(*arguments, **named)
        else:
            returned = await asyncio.to_thread(self.function, *arguments, **named)
        returned = list(returned)
        if len(returned) != len(samples):
            raise ValueError(f"returned {len(returned)} scores for {len(samples)} completions")
        return returned

    async def _one_by_one(self, samples: Samples, error: Exception) -> list:
        """The scores of the rows that do not raise, and what those raise that do; `error` if that is none of them."""
        returned: list[Any] = []
        for i in range(len(samples)):
            try:
                returned += await self._call(samples[i : i + 1])
            except Exception as own:  # noqa: BLE001 - a user's function may raise anything
                returned.append(own)
        if not any(isinstance(value, Exception) for value in returned):
            return [error] * len(samples)
        return returned

    def _failure(self, samples: Samples, complaints: list[str | None]) -> RewardError:
        rows = [
            {"prompt": prompt, "completion": text, "what": complaint}
            for prompt, text, complaint in zip(samples.prompts, samples.texts, complaints, strict=True)
            if complaint
        ]
        failure = RewardError(f"{rows[0]['what']} ({len(rows)} of {len(samples)} completions)")
        failure.rows = rows
        return failure


def _complaint(value: Any) -> str | None:
    """What is wrong with a value that a reward returned; None if it is a score or None."""
    if value is None:
        return None
    if isinstance(value, Exception):
        frames = traceback.extract_tb(value.__traceback__)
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f"{type(value).__name__}: {value}{where}"
    try:
        return None if math.isfinite(value) else f"returned {value}"
    except TypeError:
        return f"returned {value!r}, which is no number"


# --- their sum ---------------------------------------------------------------------------------------------------


@dataclass
class Term:
    """One reward of the sum; normalised as (score - mean) / deviation."""

    scorer: Any  # AdapterReward, ModelReward or FunctionReward
    weight: float = 1.0
    mean: float = 0.0
    deviation: float = 1.0

    def shaped(self, scores: Tensor) -> Tensor:
        return self.weight * (scores - self.mean) / self.deviation


class Rewards(nn.Module):
    """The formula at the top of this file.

    Args:
        terms: by name.
        folder: where completions that a python reward failed on are written; None writes none.
    """

    def __init__(
        self,
        terms: dict[str, Term],
        clip: float | None = None,
        length_penalty: float = 0.0,
        missing_eos_penalty: float | None = None,
    ) -> None:
        super().__init__()
        self.terms = terms
        self.clip, self.length_penalty, self.missing_eos_penalty = clip, length_penalty, missing_eos_penalty
        self.models = nn.ModuleList([term.scorer for term in terms.values() if isinstance(term.scorer, nn.Module)])
        self.folder: Path | None = None

    @property
    def adapter(self) -> AdapterReward | None:
        """The reward adapter where it is all there is, unshaped: what TRL's own loop can take."""
        [term, *others] = self.terms.values()
        shaped = others or self.clip or self.length_penalty or (term.weight, term.mean, term.deviation) != (1, 0, 1)
        return None if shaped or not isinstance(term.scorer, AdapterReward) else term.scorer

    @torch.no_grad()
    def forward(self, samples: Samples, batch_size: int | None = None, prefix: bool = False) -> Scores:
        """Scores completions.

        Args:
            batch_size: rows that a model reads at a time; a function gets all of them at once.
            prefix: fill `Scores.prefix`.

        Raises:
            RewardError: see `FunctionReward`.
        """
        device = samples.sequences.device
        functions = {name: term.scorer for name, term in self.terms.items() if isinstance(term.scorer, FunctionReward)}
        failed = torch.zeros(len(samples), dtype=torch.bool)
        answers = run_async(self._ask(functions, samples)) if functions else []
        raw, prefix_sum = self._read_models(samples, batch_size or len(samples), prefix)
        for name, (scores, failures) in zip(functions, answers, strict=True):
            raw[name] = scores.to(device)
            failed |= failures
        raw = {name: raw[name] for name in self.terms}  # in the recipe's order
        shaped = torch.stack([term.shaped(raw[name]) for name, term in self.terms.items()])
        valid = ~shaped.isnan().all(0) & ~failed.to(device)
        total = shaped.nansum(0)
        parts: dict[str, Tensor] = {}
        if self.clip is not None:
            parts["clipped"] = total.abs() > self.clip
            total = total.clamp(-self.clip, self.clip)
        if self.length_penalty:
            parts["length_penalty"] = self.length_penalty * samples.mask.sum(1)
            total = total - parts["length_penalty"]
        if self.missing_eos_penalty is not None:
            parts["missing_eos_penalty"] = self.missing_eos_penalty * ~samples.ended
            total = total - parts["missing_eos_penalty"]
        if functions:
            parts["skipped"] = ~valid
        return Scores(total.masked_fill(~valid, 0), valid, raw, parts, prefix_sum)

    async def _ask(self, functions: dict[str, FunctionReward], samples: Samples) -> list[tuple[Tensor, Tensor]]:
        """All functions' answers, waited for at the same time."""

        async def ask(name: str) -> tuple[Tensor, Tensor]:
            try:
                return await functions[name].score(samples)
            except RewardError as failure:
                where = self._write(name, failure)
                rows = failure.rows
                failure = RewardError(
                    f"the reward `{name}` failed: {failure}{where}; `on_error: skip` would leave such rows out"
                )
                failure.rows = rows
                raise failure from None

        return await asyncio.gather(*map(ask, functions))

    def _write(self, name: str, failure: RewardError) -> str:
        if self.folder is None:
            return ""
        file = self.folder / f"failed_reward-{name}-{PartialState().process_index}.json"
        file.write_text(json.dumps(failure.rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return f"; prompt and completion are in {file}"

    def _read_models(self, samples: Samples, batch_size: int, prefix: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Each model's own scores; and, if asked for, the adapters' shaped sum at every position."""
        raw: dict[str, Tensor] = {}
        prefix_sum = torch.zeros(samples.sequences.shape, device=samples.sequences.device) if prefix else None
        for name, term in self.terms.items():
            if isinstance(term.scorer, FunctionReward):
                continue
            parts = []
            for at in range(0, len(samples), batch_size):
                rows = slice(at, at + batch_size)
                if prefix_sum is not None and isinstance(term.scorer, AdapterReward):
                    scores, prefixes = term.scorer.prefix_score(samples[rows])
                    prefix_sum[rows] += term.shaped(prefixes)
                    parts.append(scores)
                else:
                    parts.append(term.scorer.score(samples[rows]))
            raw[name] = torch.cat(parts)
            lost = int((~raw[name].isfinite()).sum())
            if lost:  # NaN would read as "no opinion"
                raise RecipeError(
                    f"the reward `{name}` gives {lost} of {len(samples)} completions a score that is not finite; look at its "
                    f"weights, or does its precision overflow (`model.dtype`)?"
                )
        return raw, prefix_sum


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """What `coroutine` returns, also where an event loop is running already, as in a notebook."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
