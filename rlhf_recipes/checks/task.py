"""`python -m rlhf_recipes check recipes/mytask`: every function of a task.py on ten rows, and what the stages will see."""

import math
import statistics
import sys
import types
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.datasets import prompt_ids, row_of, tokenize_demonstrations, tokenize_pairs, tokenize_prompts
from rlhf_recipes.data.tokenizer import end_token_ids, load_tokenizer
from rlhf_recipes.data.tokens import answered, encode_pair, is_chat, join_padded, prompt_text, render, template_of
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.sections import Recipe
from rlhf_recipes.recipe.stages import STAGES
from rlhf_recipes.rewards.function import NO_TEMPLATE, FunctionReward
from rlhf_recipes.rewards.model import load_reward_tokenizer
from rlhf_recipes.rollouts.samples import Samples
from rlhf_recipes.tasks import COLUMNS, for_rewards, load_dataset, load_task

ROWS = 10
SHOWN = 160  # characters of a text


def check_task(recipe: Recipe, console: Console) -> list[str]:
    """Prints what every function gives; returns what is wrong, a line each."""
    task, problems = load_task(recipe), list[str]()
    tokenizer, ends = _tokenizer(recipe, problems)
    datasets: dict[tuple[str, str], Dataset] = {}
    readable = set[str]()
    table = Table(title=str(task.__file__))
    for head in ("function", "split", "rows", "columns", "tokens*", "read by"):
        table.add_column(head, no_wrap=head not in ("columns", "read by"))
    for function in COLUMNS:
        if not hasattr(task, function):
            table.add_row(function, "", "absent", "", "", _readers(function))
            continue
        for split in ("train", "eval"):
            try:
                dataset = load_dataset(task, function, split)
                datasets[function, split] = dataset
                lengths = _lengths(_first(dataset), function, tokenizer, ends)
                table.add_row(function, split, str(len(dataset)), ", ".join(dataset.column_names), lengths, _readers(function))
                readable |= {function} if split == "train" and tokenizer is not None else set()
            except RecipeError as error:
                problems.append(f"{function}({split!r}): {error}")
                table.add_row(function, split, "[red]fails[/red]", "", "", _readers(function))
    console.print(table)
    console.print(f"* least, median and most of the first {ROWS} rows, as the stage will see them")
    for (function, split), dataset in datasets.items():
        if split == "train":
            _show(function, dataset[0], tokenizer if function in readable else None, ends, console)
    if "load_prompts" in readable and tokenizer is not None:
        prompts = datasets["load_prompts", "train"]
        try:
            problems += _too_long(prompts, tokenizer, recipe)
            answers = _answers(datasets, ROWS, is_chat(prompts[0]["prompt"]))
            samples = _samples(_first(prompts), answers, tokenizer, ends)
            for name in _functions(recipe, task):
                problems += _score(name, getattr(task, name), samples, answers is None, console)
            _try_templates(recipe, samples)
        except RecipeError as error:
            problems.append(str(error))
    return _overlap(datasets) + problems


def _tokenizer(recipe: Recipe, problems: list[str]) -> tuple[PreTrainedTokenizerBase | None, list[int]]:
    """The backbone's, and its ends of text."""
    try:
        tokenizer = load_tokenizer(recipe)
        return tokenizer, end_token_ids(tokenizer, recipe.path(recipe.model.path))
    except RecipeError as error:
        problems.append(f"{error}; texts are shown as they are, without tokens")
        return None, []


def _readers(function: str) -> str:
    return ", ".join(stage.name for stage in STAGES.values() if function in dict(stage.data))


def _first(dataset: Dataset) -> Dataset:
    return dataset.select(range(min(ROWS, len(dataset))))


def _functions(recipe: Recipe, task: types.ModuleType) -> list[str]:
    """The rewards of the task that the recipe names, and those that have a name of their own."""
    named = [term.function_name for term in recipe.reward.all_terms() if term.function_name]
    return [name for name in dict.fromkeys(("reward", *named, "gold_reward")) if hasattr(task, name)]


def _lengths(rows: Dataset, function: str, tokenizer: PreTrainedTokenizerBase | None, ends: list[int]) -> str:
    """Of the first rows as the stage that reads them will see them."""
    if tokenizer is None:
        return ""
    if function == "load_prompts":
        counts = [len(row) for row in tokenize_prompts(rows, tokenizer, sys.maxsize)["input_ids"]]
    elif function == "load_preferences":
        pairs = tokenize_pairs(rows, tokenizer, read_eos=True, ends=ends)
        counts = [len(row) for side in ("chosen", "rejected") for row in pairs[f"{side}_ids"]]
    else:
        tokenized = tokenize_demonstrations(rows, tokenizer, ends)
        text = "input_ids" not in tokenized.column_names
        counts = [len(row) for row in (tokenizer(tokenized["text"][:])["input_ids"] if text else tokenized["input_ids"])]
    return f"{min(counts)}, {statistics.median(counts):.0f}, {max(counts)}"


def _show(
    function: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, ends: list[int], console: Console
) -> None:
    """The first row, as text, and as the tokens that a stage reads."""
    console.print(f"\n[bold]{function}[/bold], first row")
    for name, value in row.items():
        messages = isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]
        text = prompt_text(value) if messages else str(value)
        console.print(f"  {name}: {escape(_short(text))}", highlight=False)
    if tokenizer is None or "prompt" not in row:
        return
    pieces = [("what the model reads", prompt_ids(Dataset.from_list([row]), tokenizer)[0])]
    for side in ("chosen", "rejected", "completion"):
        if side in row:
            _, ids = encode_pair(tokenizer, row["prompt"], row[side], ends, template_of(row))
            pieces.append((f"{side}, as it is learned", ids))
    for title, ids in pieces:
        console.print(f"  {title}: {escape(repr(_short(tokenizer.decode(ids))))} ({len(ids)} tokens)", highlight=False)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def _too_long(prompts: Dataset, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[str]:
    limit, sample = recipe.data.max_prompt_tokens, prompts.select(range(min(1000, len(prompts))))
    dropped = sum(len(ids) > limit for ids in prompt_ids(sample, tokenizer))
    if 2 * dropped <= len(sample):
        return []
    return [f"`data.max_prompt_tokens` {limit}: {dropped} of {len(sample)} prompts are longer and would be left out"]


def _answers(datasets: dict[tuple[str, str], Dataset], count: int, chat: bool) -> list[Any] | None:
    """The task's own completions to score; None where it has none that can follow such prompts."""
    for function, column in (("load_preferences", "chosen"), ("load_demonstrations", "completion")):
        dataset = datasets.get((function, "train"))
        if dataset is not None and column in dataset.column_names and (chat or isinstance(dataset[0][column], str)):
            return dataset[:count][column]
    return None


def _samples(prompts: Dataset, answers: list[Any] | None, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> Samples:
    """The first prompts with answers, or with made-up ones, as a policy stage would hand them to rewards."""
    prompts = tokenize_prompts(prompts, tokenizer, sys.maxsize)
    answers = answers or [f" completion number {i}" for i in range(len(prompts))]
    rows, ids, responses = prompts[: len(answers)], [], []
    for number, (row, answer) in enumerate(zip(prompts, answers, strict=False)):
        with row_of("load_prompts", number):
            before, after = encode_pair(tokenizer, row["prompt"], answer, ends, template_of(row))
        ids.append(before)
        responses.append(after)
    padded, attention, context = join_padded(ids, responses, tokenizer.pad_token_id)
    columns = {key: rows[key] for key in for_rewards(rows)}
    return Samples(padded, context, tokenizer, rows["prompt"], columns, attention)


def _try_templates(recipe: Recipe, samples: Samples) -> None:
    """Reward models read chat through templates of their own.

    Raises:
        RecipeError: one has none, or it does not take the prompts.
    """
    terms = recipe.reward.all_terms() if is_chat(samples.prompts[0]) else []
    for term in (term for term in terms if term.model):
        tokenizer = load_reward_tokenizer(term, recipe.path(str(term.model)))
        for i, prompt in enumerate(samples.prompts):
            chat = answered(prompt, [{"role": "assistant", "content": samples.texts[i]}])  # type: ignore[arg-type]
            with row_of("load_prompts", i):
                template = template_of({name: values[i] for name, values in samples.columns.items()})
                render(tokenizer, chat, template, f"the reward's `model` {term.model}", NO_TEMPLATE, tokenize=False)


def _score(name: str, function: Callable[..., Any], samples: Samples, made_up: bool, console: Console) -> list[str]:
    try:
        scores, _ = FunctionReward(function).score(samples)
    except RecipeError as error:
        return [f"{name}: {error}"]
    shown = ", ".join("no opinion" if math.isnan(score) else f"{score:.3g}" for score in scores.tolist())
    kind = "made-up answers (task.py has none)" if made_up else "answers"
    console.print(f"\n[bold]{name}[/bold] of {len(samples)} prompts with {kind}: {shown}", highlight=False)
    known = scores[~scores.isnan()]
    alike = len(known) > 0 and not (known != known[0]).any()  # of made-up ones that says nothing
    return [f"{name} is {known[0]:g} for all {len(known)} answers"] if alike and not made_up else []


def _overlap(datasets: dict[tuple[str, str], Dataset]) -> list[str]:
    """Held-out prompts that are trained on say nothing."""
    if not {("load_prompts", "train"), ("load_prompts", "eval")} <= datasets.keys():
        return []
    column = "prompt" if "prompt" in datasets["load_prompts", "eval"].column_names else "input_ids"
    train, held_out = ({str(p) for p in datasets["load_prompts", split][column]} for split in ("train", "eval"))
    both = len(train & held_out)
    return (
        [f"load_prompts: {both} of {len(held_out)} held-out prompts are training prompts too"]
        if 2 * both > len(held_out)
        else []
    )
