"""`python -m rlhf_recipes check recipes/mytask`: every function of a task.py on ten rows, and what the stages will see."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data import (
    encode_completion,
    encode_prompt,
    join_padded,
    load_tokenizer,
    prompt_text,
    tokenize_demonstrations,
)
from rlhf_recipes.recipe import Recipe, RecipeError
from rlhf_recipes.rewards import FunctionReward, RewardError, Samples, run_async
from rlhf_recipes.tasks import COLUMNS, load_dataset, load_task

ROWS = 10
SHOWN = 160  # characters of a text
READ_BY = {
    "load_prompts": "ppo, a2c, preferences, dpo, evaluate",
    "load_preferences": "reward, dpo (`preferences.source: task`)",
    "load_demonstrations": "sft",
    "reward": "every policy stage, with `reward.function`",
    "gold_reward": "every policy stage, where it is there",
}


def check_task(recipe: Recipe, console: Console) -> list[str]:
    """Prints what every function gives; returns what is wrong, a line each."""
    task, problems = load_task(recipe), list[str]()
    tokenizer = _tokenizer(recipe, problems)
    datasets: dict[tuple[str, str], Dataset] = {}
    table = Table(title=str(task.__file__))
    for head in ("function", "split", "rows", "columns", "tokens*", "read by"):
        table.add_column(head, no_wrap=head not in ("columns", "read by"))
    for function in COLUMNS:
        if not hasattr(task, function):
            table.add_row(function, "", "absent", "", "", READ_BY[function])
            continue
        for split in ("train", "eval"):
            try:
                dataset = load_dataset(task, function, split)
                datasets[function, split] = dataset
                lengths = _lengths(dataset.select(range(min(ROWS, len(dataset)))), function, tokenizer)
                table.add_row(function, split, str(len(dataset)), ", ".join(dataset.column_names), lengths, READ_BY[function])
            except RecipeError as error:
                problems.append(f"{function}({split!r}): {error}")
                table.add_row(function, split, "[red]fails[/red]", "", "", READ_BY[function])
    console.print(table)
    console.print(f"* least, median and most of the first {ROWS} rows, as the stage will see them")
    for (function, split), dataset in datasets.items():
        if split == "train":
            _show(function, dataset[0], tokenizer, console)
    if ("load_prompts", "train") in datasets:
        prompts = datasets["load_prompts", "train"]
        if tokenizer is not None:
            problems += _too_long(prompts, tokenizer, recipe)
            samples = _samples(prompts, _answers(datasets, len(prompts)), tokenizer)
            for name in ("reward", "gold_reward"):
                if hasattr(task, name):
                    problems += _score(name, getattr(task, name), samples, console)
        problems += _overlap(datasets)
    return problems


def _tokenizer(recipe: Recipe, problems: list[str]) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(recipe)
    except RecipeError as error:
        problems.append(f"{error}; texts are shown as they are, without tokens")
        return None


def _lengths(rows: Dataset, function: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Of the first rows as the stage that reads them will see them."""
    if tokenizer is None:
        return ""
    if function == "load_prompts":
        counts = [len(encode_prompt(tokenizer, prompt)) for prompt in rows["prompt"]]
    elif function == "load_preferences":
        counts = [
            len(encode_prompt(tokenizer, row["prompt"])) + len(encode_completion(tokenizer, row["prompt"], row[side]))
            for row in rows
            for side in ("chosen", "rejected")
        ]
    else:
        tokenized = tokenize_demonstrations(rows, tokenizer)
        if "input_ids" in tokenized.column_names:
            counts = [len(ids) for ids in tokenized["input_ids"]]
        elif "messages" in tokenized.column_names:
            counts = [len(encode_prompt(tokenizer, messages)) for messages in tokenized["messages"]]
        else:
            counts = [len(tokenizer(text)["input_ids"]) for text in tokenized["text"]]
    return f"{min(counts)}, {statistics.median(counts):.0f}, {max(counts)}"


def _show(function: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, console: Console) -> None:
    """The first row, as text, and as the tokens that a stage reads."""
    console.print(f"\n[bold]{function}[/bold], first row")
    for name, value in row.items():
        text = prompt_text(value) if isinstance(value, list) and value and isinstance(value[0], dict) else str(value)
        console.print(f"  {name}: {escape(_short(text))}", highlight=False)
    if tokenizer is None or "prompt" not in row:
        return
    pieces = [("what the model reads", encode_prompt(tokenizer, row["prompt"]))]
    for side in ("chosen", "rejected", "completion"):
        if side in row:
            pieces.append((f"{side}, as it is learned", encode_completion(tokenizer, row["prompt"], row[side])))
    for title, ids in pieces:
        console.print(f"  {title}: {escape(repr(_short(tokenizer.decode(ids))))} ({len(ids)} tokens)", highlight=False)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def _too_long(prompts: Dataset, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[str]:
    limit, sample = recipe.data.max_prompt_tokens, prompts.select(range(min(1000, len(prompts))))
    dropped = sum(len(encode_prompt(tokenizer, prompt)) > limit for prompt in sample["prompt"])
    if 2 * dropped <= len(sample):
        return []
    return [f"`data.max_prompt_tokens` {limit}: {dropped} of {len(sample)} prompts are longer and would be left out"]


def _answers(datasets: dict[tuple[str, str], Dataset], count: int) -> list[Any]:
    """Completions to score: the task's own where it has some."""
    for function, column in (("load_preferences", "chosen"), ("load_demonstrations", "completion")):
        dataset = datasets.get((function, "train"))
        if dataset is not None and column in dataset.column_names:
            return dataset[: min(ROWS, count)][column]
    return [f" completion number {i}" for i in range(min(ROWS, count))]


def _samples(prompts: Dataset, answers: list[Any], tokenizer: PreTrainedTokenizerBase) -> Samples:
    """The first prompts with answers, as a policy stage would hand them to rewards."""
    rows = prompts[: len(answers)]
    ids = [encode_prompt(tokenizer, prompt) for prompt in rows["prompt"]]
    responses = [encode_completion(tokenizer, prompt, answer) for prompt, answer in zip(rows["prompt"], answers, strict=True)]
    padded, attention, context = join_padded(ids, responses, tokenizer.pad_token_id)
    columns = {key: values for key, values in rows.items() if key != "prompt"}
    return Samples(padded, context, tokenizer, rows["prompt"], columns, attention)


def _score(name: str, function: Callable[..., Any], samples: Samples, console: Console) -> list[str]:
    try:
        scores, _ = run_async(FunctionReward(function).score(samples))
    except RewardError as error:
        return [f"{name}: {error}"]
    shown = ", ".join("no opinion" if math.isnan(score) else f"{score:.3g}" for score in scores.tolist())
    console.print(f"\n[bold]{name}[/bold] of {len(samples)} prompts with answers: {shown}", highlight=False)
    known = scores[~scores.isnan()]
    return [] if len(known) == 0 or (known != known[0]).any() else [f"{name} is {known[0]:g} for all {len(known)} answers"]


def _overlap(datasets: dict[tuple[str, str], Dataset]) -> list[str]:
    """Held-out prompts that are trained on say nothing."""
    if ("load_prompts", "eval") not in datasets:
        return []
    train, held_out = ({str(p) for p in datasets["load_prompts", split]["prompt"]} for split in ("train", "eval"))
    both = len(train & held_out)
    return (
        [f"load_prompts: {both} of {len(held_out)} held-out prompts are training prompts too"]
        if 2 * both > len(held_out)
        else []
    )
