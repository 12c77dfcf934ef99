"""Pairs for DPO: two completions of a prompt, the shared reward model's scores, and which of them is chosen.

A pair keeps its token ids. Text that was sampled may tokenise to other ids than were sampled, and DPO's loss is about the
probabilities of the very tokens.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.datasets import row_of, warn_of_doubled_tokens
from rlhf_recipes.data.pair_files import FILE, IDS, read_pairs
from rlhf_recipes.data.tokens import common_length, encode_pair, template_of
from rlhf_recipes.evaluation.judging import Completions, complete
from rlhf_recipes.models.reference import Reference
from rlhf_recipes.process import progress_bar, say_left_out
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import DataSection
from rlhf_recipes.roles import Roles
from rlhf_recipes.runs.folder import Run

_PROGRESS = "progress.jsonl"  # a line for each finished slice of prompts: what a resumed run need not do again


def sample_pairs(
    policy: PeftModel | Reference, roles: Roles, prompts: Dataset, run: Run, name: str = FILE, seed: int = 0
) -> dict[str, Any]:
    """Samples `preferences.pairs_per_prompt` pairs for each prompt and appends them to `name` in the run's folder.

    The prompts are sampled in slices; those that `progress.jsonl` calls done are left as they are.

    Args:
        policy: who is sampled: the policy or the reference of `roles`.
        prompts: with `prompt` and `input_ids`.
        seed: of sampling and labels, beside the slice's number.

    Returns:
        {"prompts", "pairs", "identical", "unjudged", "label_agreement"}: the pairs dropped because both completions were the
        same or one has no reward, and the share of pairs whose chosen completion has the higher reward.
    """
    section = run.recipe.preferences
    per_slice = max(1, 4 * section.batch_size // (2 * section.pairs_per_prompt))
    starts = range(0, len(prompts), per_slice)
    done = _finished_slices(run.folder / name, run.folder / _PROGRESS, name)
    title = f"pairs from the {'reference' if policy is roles.reference else 'policy'}"
    bar = progress_bar(total=len(prompts), show=run.main, desc=title, unit=" prompts")
    for number, start in enumerate(starts):
        rows = prompts.select(range(start, min(start + per_slice, len(prompts))))
        if number >= len(done):
            slice_seed = (seed * 100_003 + number) % 2**40  # `complete` has a million batches' seeds for each
            count, size = 2 * section.pairs_per_prompt, section.batch_size
            judged = complete(policy, roles, rows, slice_seed, size, samples=count, measure_kl=False)
            pairs, dropped = label_pairs(rows, judged, section.label, slice_seed)
            run.write_lines(name, pairs)
            agree = sum(p["chosen_reward"] > p["rejected_reward"] for p in pairs)
            end = (run.folder / name).stat().st_size if run.main else 0
            done.append({"file": name, "pairs": len(pairs), **dropped, "agree": agree, "end": end})
            run.write_lines(_PROGRESS, done[-1:])
        bar.update(len(rows))
    bar.close()
    PartialState().wait_for_everyone()  # the file is whole before anyone reads it
    pairs = sum(line["pairs"] for line in done)
    if pairs == 0:
        raise RecipeError(
            "both completions of every pair are the same, or a reward has no opinion on one: nothing to learn from; raise "
            "`sampling.temperature`"
        )
    return {
        "prompts": len(prompts),
        "pairs": pairs,
        "identical": sum(line["identical"] for line in done),
        "unjudged": sum(line["unjudged"] for line in done),
        "label_agreement": sum(line["agree"] for line in done) / pairs,
    }


def _finished_slices(file: Path, progress: Path, name: str) -> list[dict[str, Any]]:
    """The finished slices of `file`, which is cut back to the last of them: a killed run may have left half a line."""
    if not progress.is_file():
        return []
    lines = []
    for line in progress.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # the line that was being written
            break
    done = [line for line in lines if line["file"] == name]
    if file.is_file():
        with file.open("r+b") as stream:
            stream.truncate(done[-1]["end"] if done else 0)
    return done


def label_pairs(prompts: Dataset, judged: Completions, label: str, seed: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Pairs the completions 0 and 1, 2 and 3, ... of each prompt and labels them.

    Args:
        judged: 2n completions of each prompt.
        label: "bradley_terry" chooses the first with P = sigmoid(r1 - r2) (Bradley and Terry 1952); "argmax" the better;
            "expected" the better too, with the probability of the other order as the pair's `label_smoothing`, so that its
            loss is the mean over Bradley-Terry's draws.

    Returns:
        the pairs, and how many were dropped: `identical` completions, or one of them `unjudged` by every reward.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs, dropped = [], {"identical": 0, "unjudged": 0}
    for i, (prompt, prompt_ids) in enumerate(zip(prompts["prompt"], prompts["input_ids"], strict=True)):
        for first in range(0, judged.reward.shape[1], 2):
            r = judged.reward[i, first : first + 2]
            if r.isnan().any():
                dropped["unjudged"] += 1
                continue
            first_wins = torch.sigmoid(r[0] - r[1])
            chance = first_wins if label == "bradley_terry" else (r[0] >= r[1]).float()
            chosen = first if torch.rand((), generator=generator) < chance else first + 1
            rejected = 2 * first + 1 - chosen
            if judged.ids[i][chosen] == judged.ids[i][rejected]:
                dropped["identical"] += 1
                continue
            pairs.append({
                "prompt": prompt,
                "chosen": judged.texts[i][chosen],
                "rejected": judged.texts[i][rejected],
                "chosen_reward": judged.reward[i, chosen].item(),
                "rejected_reward": judged.reward[i, rejected].item(),
                "prompt_ids": prompt_ids,
                "label_smoothing": min(first_wins.item(), 1 - first_wins.item()) if label == "expected" else 0.0,
                "chosen_ids": judged.ids[i][chosen],
                "rejected_ids": judged.ids[i][rejected],
            })  # fmt: skip
    return pairs, dropped


def load_pairs(
    file: Path, vocabulary: int, tokenizer: PreTrainedTokenizerBase, ends: list[int], lengths: DataSection
) -> Dataset:
    """A file of pairs as DPOTrainer's collator takes them: token ids, and each pair's `label_smoothing`.

    Args:
        file: what `sample_pairs` writes, or lines of prompt, chosen and rejected, which are tokenised here.
        vocabulary: rows of the backbone's embedding.
        ends: see `end_token_ids`.

    Raises:
        RecipeError: a line is neither, or its tokens are of another tokenizer.
    """
    rows, tokens = read_pairs(file, vocabulary, partial(tokenizer.decode, skip_special_tokens=True))
    if not tokens:
        return tokenize_preferences(rows, tokenizer, ends, lengths, str(file))
    return Dataset.from_dict({name: [row[name] for row in rows] for name in IDS})


def sample_of(pairs: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """One pair: the first, or where there are none yet a made-up one."""
    if pairs is not None:
        return pairs.select(range(1))
    end = [tokenizer.eos_token_id]
    return Dataset.from_dict({"prompt_ids": [end], "chosen_ids": [end], "rejected_ids": [end], "label_smoothing": [0.0]})


def tokenize_preferences(
    pairs: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    lengths: DataSection,
    source: str = "load_preferences",
) -> Dataset:
    """Pairs as a person made them to the same token ids.

    Those with a prompt over `data.max_prompt_tokens`, or whose completions are the same, are left out; a completion over
    `data.max_completion_tokens` is cut there. Both are counted and said.

    Args:
        ends: see `end_token_ids`.

    Raises:
        RecipeError: none is left.
    """
    limit, longest = lengths.max_completion_tokens, lengths.max_prompt_tokens
    if isinstance(pairs, Dataset):
        warn_of_doubled_tokens(pairs, tokenizer, source)
    columns: dict[str, list] = {name: [] for name in IDS}
    given = cut = long = same = 0
    for number, row in enumerate(pairs):
        given += 1
        with row_of(source, number):
            (prompt, after), (other, rejected_after) = (
                encode_pair(tokenizer, row["prompt"], row[side], ends, template_of(row)) for side in ("chosen", "rejected")
            )
        shared = common_length(prompt, other)  # a template may write more before the one answer than before the other
        whole = prompt[shared:] + after, other[shared:] + rejected_after
        prompt, (chosen, rejected) = prompt[:shared], (ids[:limit] for ids in whole)
        if len(prompt) > longest or chosen == rejected:
            long += len(prompt) > longest
            same += len(prompt) <= longest
            continue
        cut += any(len(ids) > limit for ids in whole)
        for name, value in zip(IDS, (prompt, chosen, rejected, 0.0), strict=True):
            columns[name].append(value)
    kept = given - long - same
    if kept == 0:
        raise RecipeError(
            f"none of the {given} pairs of {source} can be used: {long} have a prompt of more than {longest} tokens "
            f"(`data.max_prompt_tokens`), {same} have two completions that are the same in their first {limit} tokens"
        )
    say_left_out(
        given - kept, given, f"pairs of {source}", f"identical or longer than data.max_prompt_tokens={longest}, left out"
    )
    raised = f"cut there; `data.max_completion_tokens` {limit} is what policies sample too"
    say_left_out(cut, kept, f"pairs of {source}", f"have a completion of more than {limit} tokens, {raised}")
    return Dataset.from_dict(columns)
