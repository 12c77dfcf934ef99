"""Every kind of reward, their sum and its shaping, and what happens when a python reward fails."""

import asyncio
import importlib
import json
import math
import shutil
import time
import types

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.evaluation.judging import complete, prepare_rewards
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.sections import REWARD_KINDS, RewardTerm
from rlhf_recipes.rewards import model
from rlhf_recipes.rewards.function import FunctionReward
from rlhf_recipes.rewards.model import ModelReward
from rlhf_recipes.rewards.reward import RewardError
from rlhf_recipes.rewards.total import Rewards, Term
from rlhf_recipes.roles import build_roles
from rlhf_recipes.rollouts.samples import Samples
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.tasks import load_task, optional_gold

PROMPTS, TEXTS = ["the film was", "the plot", "a"], [" great", " dull and poor", ""]


@pytest.fixture
def tokenizer(tiny):
    return load_tokenizer(load_recipe(tiny))


def samples_of(tokenizer, prompts=PROMPTS, texts=TEXTS, ended=(True, False, True), **columns):
    pad = tokenizer.pad_token_id
    asked = [tokenizer(p)["input_ids"] for p in prompts]
    said = [
        tokenizer(t, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
        for t, end in zip(texts, ended, strict=True)
    ]
    context, longest = max(map(len, asked)), max(map(len, said))
    rows = [[pad] * (context - len(a)) + a + s + [pad] * (longest - len(s)) for a, s in zip(asked, said, strict=True)]
    sequences = torch.tensor(rows)
    return Samples(sequences, context, tokenizer, prompts, columns, sequences != pad)


def load_model_reward(recipe):
    [term] = recipe.reward.all_terms()
    return model.load(term, types.SimpleNamespace(path=recipe.path, dtype=getattr(torch, recipe.model.dtype)))


def by_function(function, **settings):
    return Rewards({"mine": Term(FunctionReward(function, **settings))})


def test_a_kind_of_reward_is_a_key_and_a_module_of_its_name():
    """What a new kind takes: its file, and a line in recipe/sections.py."""
    keys = set(RewardTerm.model_fields)
    for kind in REWARD_KINDS:
        assert kind in keys
        assert callable(importlib.import_module(f"rlhf_recipes.rewards.{kind}").load)


# --- python rewards ----------------------------------------------------------------------------------------------


def test_a_function_gets_text_and_the_datasets_columns(tokenizer):
    def reward(prompts, completions, stars, **columns):
        assert prompts == PROMPTS
        assert completions == TEXTS
        assert set(columns) == {"completion_ids"}  # as TRL's GRPO gives it
        return [len(c) + 10 * s for c, s in zip(completions, stars, strict=True)]

    scores = by_function(reward)(samples_of(tokenizer, stars=[1, 2, 3]))
    assert scores.total.tolist() == [16, 34, 30]
    assert scores.valid.all()


def test_a_function_of_chat_gets_messages(tokenizer):
    chats = [[{"role": "user", "content": p}] for p in PROMPTS]

    async def reward(prompts, completions):
        assert prompts == chats
        return [len(c[0]["content"]) if c[0]["role"] == "assistant" else -1 for c in completions]

    samples = samples_of(tokenizer)
    samples.prompts = chats
    assert by_function(reward)(samples).total.tolist() == [6, 14, 0]


def test_functions_of_trls_grpo_work_unchanged(tokenizer):
    """As TRL documents them: by keyword, whatever the order."""

    def reward_len(completions, **kwargs):
        return [-abs(20 - len(c)) for c in completions]

    def reward_with_answer(completions, answer, **kwargs):
        assert kwargs.keys() == {"prompts", "completion_ids"}
        return [float(a in c) for c, a in zip(completions, answer, strict=True)]

    def swapped(completions, prompts, log_extra=None, log_metric=None, **kwargs):
        assert (prompts, log_extra, log_metric) == (PROMPTS, None, None)
        return [float(len(c)) for c in completions]

    samples = samples_of(tokenizer, answer=["great", "great", ""])
    lengths = [len(text) for text in TEXTS]
    assert by_function(reward_len)(samples).total.tolist() == [-abs(20 - n) for n in lengths]
    assert by_function(reward_with_answer)(samples).total.tolist() == [1, 0, 1]
    assert by_function(swapped)(samples).total.tolist() == lengths
    long = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
    tokens = samples.mask.sum(1).tolist()
    assert by_function(long)(samples).total.tolist() == [0 if n <= 2 else (2 - n) / 2 if n <= 4 else -1 for n in tokens]
    samples.prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    vars(samples)["texts"] = ["<think>\n1\n</think>\n2", "2", "<think>"]
    assert by_function(think_format_reward)(samples).total.tolist() == [1, 0, 0]


def test_a_function_that_names_neither_gets_prompts_and_completions_first(tokenizer):
    samples = samples_of(tokenizer, stars=[1, 2, 3])
    assert by_function(lambda x, y: [float(x == p) for x, p in zip(x, PROMPTS, strict=True)])(samples).total.tolist() == [1] * 3
    assert by_function(lambda x, y, stars: stars)(samples).total.tolist() == [1, 2, 3]
    assert by_function(lambda *both: [float(len(both))] * 3)(samples).total.tolist() == [2] * 3
    assert by_function(lambda stars, completions: stars)(samples).total.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("function", "parameter"),
    [
        (lambda texts: texts, "texts"),
        (lambda completions, answers, **columns: answers, "answers"),
        (lambda prompts, completions, trainer_state: [0.0], "trainer_state"),
        (lambda stars, y: stars, "y"),
    ],
)
def test_a_parameter_that_nothing_gives_is_named_with_the_columns_there_are(tokenizer, function, parameter):
    with pytest.raises(
        RecipeError, match=rf"has the parameter `{parameter}`, which is neither .* of load_prompts \(stars, id\)"
    ):
        by_function(function)(samples_of(tokenizer, stars=[1, 2, 3], id=[1, 2, 3]))


def test_a_gold_reward_is_asked_for_its_parameters_before_a_run():
    task, prompts = types.ModuleType("task"), Dataset.from_list([{"prompt": "a", "input_ids": [1], "stars": 3}])
    assert optional_gold(task, prompts) is None
    task.gold_reward = lambda completions, stars: stars
    assert optional_gold(task, prompts) is task.gold_reward
    task.gold_reward = lambda completions, prompt: prompt  # rewards get `prompts`
    with pytest.raises(RecipeError, match=r"has the parameter `prompt`, which is neither .* \(stars\)"):
        optional_gold(task, prompts)


def test_slow_functions_are_called_once_a_batch_and_waited_for_together(tokenizer):
    calls = []

    async def slow_async(prompts, completions):
        calls.append(len(prompts))
        await asyncio.sleep(0.05)
        return [1.0] * len(prompts)

    def slow(prompts, completions):
        calls.append(len(prompts))
        time.sleep(0.05)
        return [1.0] * len(prompts)

    many = samples_of(tokenizer, PROMPTS * 20, TEXTS * 20, (True, False, True) * 20)
    functions = {f"{f.__name__}{i}": Term(FunctionReward(f)) for f in (slow, slow_async) for i in range(4)}
    started = time.perf_counter()
    scores = Rewards(functions)(many, batch_size=4)
    assert calls == [60] * 8
    assert scores.total.tolist() == [8.0] * 60
    assert time.perf_counter() - started < 0.3  # one after the other they take 0.4 s, row by row 24 s


def test_no_opinion_leaves_the_other_rewards_and_a_row_without_any_is_not_valid(tokenizer):
    some = Term(FunctionReward(lambda prompts, completions: [1.0, None, None]), weight=2.0)
    others = Term(FunctionReward(lambda prompts, completions: [10.0, 20.0, None]))
    scores = Rewards({"some": some, "others": others})(samples_of(tokenizer))
    assert scores.total.tolist() == [12.0, 20.0, 0.0]
    assert scores.valid.tolist() == [True, True, False]
    metrics = scores.metrics()
    assert metrics["rewards/some/mean"] == 1.0
    assert metrics["rewards/others/mean"] == 15.0
    assert metrics["rewards/others/std"] == 5.0
    assert metrics["rewards/skipped"].item() == pytest.approx(1 / 3)


def divide(prompts, completions):
    return [1 / len(c) for c in completions]


@pytest.mark.parametrize(
    ("function", "message", "rows"),
    [
        (lambda p, c: [0.0, math.nan, 1.0], "returned nan", [1]),
        (lambda p, c: [0.0, 1.0, math.inf], "returned inf", [2]),
        (lambda p, c: [0.0, "good", 1.0], "'good', which is no number", [1]),
        (lambda p, c: [0.0], "returned 1 scores for 3 completions", [0, 1, 2]),
        (lambda p, c: 1.0, "'float' object is not iterable", [0, 1, 2]),
        (divide, r"ZeroDivisionError: division by zero at test_rewards.py:\d+", [2]),
    ],
)
def test_a_failing_function_stops_with_the_completions_that_did_it_or_skips_them(tokenizer, tmp_path, function, message, rows):
    stopping = by_function(function)
    stopping.folder = tmp_path
    with pytest.raises(RewardError, match=message) as stop:
        stopping(samples_of(tokenizer))
    file = tmp_path / "failed_reward-mine-0.json"
    assert str(file) in str(stop.value)
    assert "`mine`" in str(stop.value)
    saved = json.loads(file.read_text())
    assert [(row["prompt"], row["completion"]) for row in saved] == [(PROMPTS[i], TEXTS[i]) for i in rows]

    scores = by_function(function, on_error="skip")(samples_of(tokenizer))
    assert (~scores.valid).nonzero().squeeze(1).tolist() == rows
    assert scores.metrics()["rewards/skipped"].item() == pytest.approx(len(rows) / 3)


def test_a_row_that_one_reward_failed_on_is_left_out_whatever_the_others_say(tokenizer):
    fine = Term(FunctionReward(lambda prompts, completions: [1.0] * 3))
    scores = Rewards({"fine": fine, "broken": Term(FunctionReward(divide, on_error="skip"))})(samples_of(tokenizer))
    assert scores.valid.tolist() == [True, True, False]


# --- models and adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "column"), [({"label": "good"}, 2), ({"label": 0, "probability": True}, 0)])
def test_a_model_reads_the_text_with_its_own_tokenizer(tiny, foreign, keys, column):
    recipe = load_recipe(
        tiny, {"reward.adapter": None, "reward.model": str(foreign), **{f"reward.{k}": v for k, v in keys.items()}}
    )
    roles = build_roles(recipe, load_tokenizer(recipe))
    model = AutoModelForSequenceClassification.from_pretrained(foreign).eval()
    tokenizer = roles.reward.terms[foreign.name].scorer.tokenizer
    scores = roles.reward(samples_of(roles.tokenizer), batch_size=2)
    for prompt, text, score in zip(PROMPTS, TEXTS, scores.total, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(prompt + text, return_tensors="pt")).logits[0]
        expected = logits.softmax(-1) if "probability" in keys else logits
        torch.testing.assert_close(score, expected[column], atol=1e-5, rtol=1e-4)
    assert len(scores.total.unique()) == 3


def test_a_models_text_loses_its_beginning_and_keeps_the_completion(foreign, tokenizer):
    own = load_tokenizer_of(foreign)
    reward = ModelReward(AutoModelForSequenceClassification.from_pretrained(foreign).eval(), own, max_length=12)
    ids = reward._tokenize(["a film " * 40], [" dull"])["input_ids"][0].tolist()
    assert len(ids) == 12
    assert own.decode(ids).endswith("film  dull")


def test_a_completion_that_is_too_long_for_a_pair_loses_its_own_beginning(foreign):
    own = load_tokenizer_of(foreign)
    reward = ModelReward(AutoModelForSequenceClassification.from_pretrained(foreign).eval(), own, max_length=8, pair=True)
    added = own.num_special_tokens_to_add(pair=True)
    for prompt, text in (
        ("a", " plot"),
        ("a film " * 9, " plot"),
        ("a", " plot" * 9),
        ("a film", " plot and the"),
        ("", " dull " * 9),
    ):
        ids = reward._tokenize([prompt, "a"], [text, ""])["input_ids"][0].tolist()
        first, second = (own(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
        kept = (first + second)[-(8 - added) :]
        assert [i for i in ids if i not in own.all_special_ids] == kept


def test_a_roberta_reads_less_than_it_has_positions(tokenizer, tiny, tmp_path):
    """Its positions begin behind the padding's: 40 - 0 - 1 are left."""
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    overrides = {"reward.adapter": None, "reward.read_eos": True, "reward.model": str(tmp_path / "rm")}
    recipe = load_recipe(tiny, overrides)
    scorer = load_model_reward(recipe)
    assert scorer.max_length == 39
    samples = samples_of(tokenizer, ["the film " * 30, "a", "b"])
    assert scorer.score(samples)[0].isfinite().all()
    scorer.max_length = 40
    with pytest.raises((IndexError, RuntimeError)):
        scorer.score(samples)
    short = load_recipe(tiny, overrides | {"reward.max_length": 1})
    with pytest.raises(RecipeError, match=r"reads 1 tokens, of which 1 are its tokenizer's own; raise `max_length`"):
        load_model_reward(short)


def test_padding_never_moves_where_a_decoder_is_read(tokenizer, tiny, tmp_path):
    """Its config names another pad than its tokenizer, as those of many Llamas do (-1, or none)."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    tokenizer.padding_side = "right"
    for pad in (None, -1, 7):
        config.pad_token_id = pad
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / str(pad))
        tokenizer.save_pretrained(tmp_path / str(pad))
        recipe = load_recipe(tiny, {"reward.adapter": None, "reward.read_eos": True, "reward.model": str(tmp_path / str(pad))})
        scorer = load_model_reward(recipe)
        samples = samples_of(tokenizer, ["the film was " * 3, "the plot", "a"])
        together, alone = scorer.score(samples)[0], torch.cat([scorer.score(samples[i : i + 1])[0] for i in range(3)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        assert len(together.unique()) == 3


def test_a_reward_models_tokenizer_knows_no_more_than_its_embedding(tiny, foreign, tmp_path):
    shutil.copytree(foreign, tmp_path / "rm")
    own = load_tokenizer_of(foreign)
    own.add_tokens([f"<new {i}>" for i in range(400)])
    own.save_pretrained(tmp_path / "rm")
    recipe = load_recipe(
        tiny, {"reward.adapter": None, "reward.model": str(tmp_path / "rm"), "reward.label": 0, "reward.read_eos": True}
    )
    with pytest.raises(RecipeError, match=r"has tokens for which its embedding has no row, such as '<new \d+>'"):
        load_model_reward(recipe)


def test_a_models_score_that_is_not_finite_is_no_missing_opinion(tiny, foreign, tokenizer, roles):
    recipe = load_recipe(
        tiny, {"reward.adapter": None, "reward.model": str(foreign), "reward.label": 0, "reward.read_eos": True}
    )
    broken = load_model_reward(recipe)
    broken.model.classifier.weight[0, 0] = math.nan
    with pytest.raises(RecipeError, match=r"the reward `a` gives 3 of 3 completions a score that is not finite"):
        Rewards({"a": Term(broken)})(samples_of(tokenizer))
    roles.reward.adapter.model.get_base_model().score.modules_to_save["default"].weight.data[:] = math.inf
    with pytest.raises(RecipeError, match="not finite"):
        roles.reward(samples_of(roles.tokenizer))


def test_a_reward_models_chat_template_is_its_own_and_what_it_refuses_is_said(foreign):
    own = load_tokenizer_of(foreign)
    reward = ModelReward(
        AutoModelForSequenceClassification.from_pretrained(foreign).eval(), own, title="the reward's `model` x"
    )
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a dull"}]
    with pytest.raises(
        RecipeError, match=r"the tokenizer of the reward's `model` x has no chat template; use a model that has"
    ):
        reward._tokenize([begun], [" plot"])
    own.chat_template = "{{ tools }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    ids = reward._tokenize([begun], [" plot"], {"tools": [[{"name": "f"}]], "stars": [3]})["input_ids"][0]
    assert own.decode(ids) == "[{'name': 'f'}]user:a;assistant:a dull plot;"  # one answer
    own.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(RecipeError, match=r"template of the reward's `model` x does not take .* TemplateError: no such role"):
        reward._tokenize([begun], [" plot"])


def load_tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, truncation_side="left")


def test_a_model_of_several_labels_needs_one_named(tiny, foreign):
    for label in (None, "fine", 7):
        recipe = load_recipe(tiny, {"reward.adapter": None, "reward.model": str(foreign), "reward.label": label})
        with pytest.raises(RecipeError, match=r"none of its labels: 0 \(bad\), 1 \(so-so\), 2 \(good\)"):
            build_roles(recipe, load_tokenizer(recipe))


# --- the sum -----------------------------------------------------------------------------------------------------


def test_shaping_is_the_formula(tokenizer):
    raw = [4.0, -6.0, 1.0]
    term = Term(FunctionReward(lambda p, c: raw), weight=3.0, mean=1.0, std=2.0)
    samples = samples_of(tokenizer)
    scores = Rewards({"x": term}, clip=4.0, length_penalty=0.1, missing_eos_penalty=5.0)(samples)
    tokens = samples.mask.sum(1)
    for i, end in enumerate((True, False, True)):
        shaped = max(-4.0, min(4.0, 3.0 * (raw[i] - 1.0) / 2.0))
        assert scores.total[i].item() == pytest.approx(shaped - 0.1 * tokens[i].item() - 5.0 * (not end))
    metrics = scores.metrics()
    assert metrics["rewards/x/mean"].item() == pytest.approx(-1 / 3)  # before
    assert metrics["rewards/clipped"].item() == pytest.approx(2 / 3)
    assert metrics["rewards/missing_eos_penalty"].item() == pytest.approx(5 / 3)
    assert metrics["rewards/length_penalty"].item() == pytest.approx(0.1 * tokens.float().mean().item())


def test_adapters_and_functions_add_up_and_the_prefix_is_the_adapters_share(roles):
    samples = samples_of(roles.tokenizer)
    adapter = roles.reward.adapter
    plain = adapter(samples.sequences, samples.attention)
    both = Rewards({"adapter": Term(adapter, 0.5, mean=1.0, std=2.0), "fn": Term(FunctionReward(lambda p, c: [1.0, 2.0, 3.0]))})
    for batch_size in (1, 3):
        scores = both(samples, batch_size, prefix=True)
        torch.testing.assert_close(scores.total, 0.5 * (plain - 1) / 2 + torch.tensor([1.0, 2.0, 3.0]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(scores.prefix[:, -1], 0.5 * (plain - 1) / 2, atol=1e-5, rtol=1e-4)
    assert both.adapter is None
    assert both.terms["adapter"].scorer is adapter


def test_normalised_rewards_have_the_references_mean_and_standard_deviation(tiny, tmp_path):
    terms = [{"adapter": "checkpoints/reward", "read_eos": False}, {"function": "gold_reward", "weight": 2}]
    overrides = {
        "reward.adapter": None, "reward.read_eos": True, "reward.terms": terms, "reward.normalize": True,
        "reward.normalize_prompts": 48, "run.output": str(tmp_path), "sampling.temperature": 2.0,
        "data.max_completion_tokens": 24,
    }  # fmt: skip
    recipe = load_recipe(tiny, overrides)
    roles, task = build_roles(recipe, load_tokenizer(recipe)), load_task(recipe)
    run = Run.prepare(recipe, "ppo")
    run.folder.mkdir(parents=True)
    roles.reward.terms["gold_reward"].scorer.function = lambda p, c: [float(len(text)) for text in c]
    prepare_rewards(roles, task, run)
    from rlhf_recipes.data.datasets import tokenize_prompts
    from rlhf_recipes.tasks import load_dataset

    prompts = tokenize_prompts(load_dataset(task, "load_prompts", "train"), roles.tokenizer, 24)
    judged = complete(roles.reference, roles, prompts, recipe.run.seed, recipe.evaluate.batch_size)
    for name, raw in judged.terms.items():
        term = roles.reward.terms[name]
        shaped = (raw - term.mean) / term.std
        assert shaped.mean().abs() < 1e-4
        assert shaped.std().item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(judged.reward.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reward.adapter": None}, "`reward` needs one of adapter, model and function, and names none"),
        ({"reward.adapter": "x", "reward.function": True}, "names adapter and function"),
        ({"reward.terms": []}, "then `reward.adapter` belongs in one of them"),
        ({"reward.adapter": None, "reward.read_eos": True, "reward.terms": []}, "`reward.terms` is empty"),
        ({"reward.adapter": None, "reward.read_eos": True, "reward.terms": [{"adaptr": "x"}]}, "did you mean `adapter`"),
        ({"reward.adapter": None, "reward.read_eos": True, "reward.terms": [{"function": True}] * 2}, "two are named reward"),
        (
            {"reward.adapter": None, "reward.read_eos": True, "reward.terms": [{"function": True, "weight": "x"}]},
            r"`reward.terms\[0\].weight`: expected float",
        ),
    ],
)
def test_mistakes_in_the_reward_section(tiny, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(tiny, overrides)


def test_a_missing_function_is_named(tiny):
    recipe = load_recipe(tiny, {"reward.adapter": None, "reward.function": "politeness"})
    with pytest.raises(RecipeError, match="needs a function `politeness`"):
        build_roles(recipe, load_tokenizer(recipe))
