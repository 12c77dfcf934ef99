"""The recipes of real models, run as they ship, two steps of every stage, on stand-ins of the same make.

No hub is reachable here, so what a recipe asks of it is made on the spot: a model of the same architecture with the structure
of the real config and tiny widths; a tokenizer of the same class with the same special tokens; rows of the same columns and
shape, from a `load_dataset` that checks what it is asked for. Overrides are sizes and paths alone.
"""

import importlib
import itertools
import json
import math
import re
import shlex
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import trl
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXTokenizer,
    Qwen2Tokenizer,
)

from rlhf_recipes.checks import files, machine, memory
from rlhf_recipes.command_line import parse_command_line
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.data.tokens import encode_completion, encode_prompt
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.tasks import load_dataset, load_task

ROOT = Path(__file__).resolve().parent.parent
QWEN3_TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()  # Qwen3's own, as TRL ships it

# --- the models --------------------------------------------------------------------------------------------------

QWEN3 = {
    "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True, "use_cache": True,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "use_sliding_window": False, "attention_dropout": 0.0,
}  # fmt: skip
# the real config.json files, whose numbers the README's estimates are computed from
REAL = {
    "EleutherAI/pythia-1b-deduped": {
        "model_type": "gpt_neox", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 8, "vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25,
        "rotary_emb_base": 10000, "use_parallel_residual": True, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    },
    "Qwen/Qwen3-1.7B": QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    },
    "Qwen/Qwen3-8B": QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-0.6B-Base": QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768,
    },
}  # fmt: skip
REAL["Skywork/Skywork-Reward-V2-Qwen3-0.6B"] = REAL["Qwen/Qwen3-0.6B-Base"] | {"max_position_embeddings": 40960}
# the same with small widths; heads, key-value heads and the share of rotated dimensions keep their ratios
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_QWEN3 = TINY | {"num_key_value_heads": 2, "head_dim": 16}

WORDS = "the a post asks whether my friend should sell an old car and what people think about it Human Assistant Here is one"
TEXT = [f"{WORDS} {i}, {WORDS.title()}: it's 1,{i}00!\n\nTL;DR: SUBREDDIT TITLE POST" for i in range(20)]
TEXT += ['one\n\n\n\ntwo\n\n\nthree\n\n \n four: "five"'] * 9  # such runs are one token in Qwen's vocabulary too
# of Qwen3's vocabulary, from 151643 on: token, and whether it is marked as special
QWEN_TOKENS = {
    **dict.fromkeys(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>"), True),
    **dict.fromkeys(("<tool_call>", "</tool_call>", "<|fim_pad|>", "<|repo_name|>", "<think>", "</think>"), False),
}


def byte_level(split, size: int = 400) -> dict:
    """Vocabulary and merges of a byte-level BPE fitted to TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    content = json.loads(tokenizer.to_str())["model"]
    return {"vocab": content["vocab"], "merges": [tuple(pair) for pair in content["merges"]]}


def pythia_tokenizer():
    """<|endoftext|> is 0 and begins and ends, <|padding|> is 1 and pads nothing; runs of spaces at the end."""
    learnt = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    vocab = {"<|endoftext|>": 0, "<|padding|>": 1} | {token: i + 2 for token, i in learnt["vocab"].items()}
    tokenizer = GPTNeoXTokenizer(vocab=vocab, merges=learnt["merges"])
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    return tokenizer


def qwen_tokenizer(eos: str):
    """Qwen's splitting of digits and contractions, no bos, <|endoftext|> pads; `eos` is <|im_end|> but in base models."""
    tokenizer = Qwen2Tokenizer(**byte_level(Qwen2Tokenizer()._tokenizer.pre_tokenizer), eos_token=eos, unk_token=None)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in QWEN_TOKENS.items()])
    tokenizer.chat_template = QWEN3_TEMPLATE
    return tokenizer


def write_stand_in(folder: Path, name: str, **wider: int) -> Path:
    """The model and tokenizer that the Hub has under `name`, tiny, with random weights."""
    pythia, base = name.startswith("EleutherAI"), name.endswith("Base")
    tokenizer = pythia_tokenizer() if pythia else qwen_tokenizer("<|endoftext|>" if base else "<|im_end|>")
    tokenizer.save_pretrained(folder)
    if pythia:  # whose tokenizer_config.json names no pad
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = {"bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"), "eos_token_id": tokenizer.eos_token_id}
    rows = 16 * math.ceil((len(tokenizer) + 1) / 16)  # more than there are tokens, as in the real ones
    tiny = TINY if pythia else TINY_QWEN3
    values = REAL[name] | tiny | wider | ends | {"vocab_size": rows, "initializer_range": 0.2}
    torch.manual_seed(0)
    if name.startswith("Skywork"):
        config = AutoConfig.for_model(**values, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    model.to(torch.float16 if pythia else torch.bfloat16).save_pretrained(folder)  # as the real ones are stored
    return folder


# --- the data ----------------------------------------------------------------------------------------------------


def post(i: int) -> str:
    return f"SUBREDDIT: r/{'relationships' if i % 2 else 'AskReddit'}\n\nTITLE: A post, {i}\n\nPOST: {WORDS} {i}.\n\nTL;DR:"


def tldr_rows(split: str, count: int) -> list[dict]:
    return [{"prompt": post(i), "completion": f" sell the old car {i}"} for i in range(count)]


def tldr_preference_rows(split: str, count: int) -> list[dict]:
    rows = [{"prompt": post(i), "chosen": " sell it.", "rejected": f" {WORDS}"} for i in range(count)]
    rows[1]["chosen"] = "keep it"  # without the space
    article = {"prompt": f"TITLE: News\n\n{WORDS}\n\nTL;DR:", "chosen": "one", "rejected": "other"}
    same = {"prompt": post(0), "chosen": " sell it.", "rejected": "sell it. "}
    return [*rows, article, same] if split == "validation" else rows


def say(role: str, content: str) -> dict:
    return {"content": content, "role": role}  # the Hub's order


def ultrafeedback_rows(split: str, count: int) -> list[dict]:
    rows = []
    for i in range(count):
        question = say("user", f"What do people think about an old car, {i}?")
        answers = [say("assistant", "It is fine.\n\n1. Sell it"), say("assistant", f"{WORDS} {i}")]
        rows.append({"chosen": [question, answers[0]], "rejected": [question, answers[1]],
                     "score_chosen": 8.5, "score_rejected": 6.0})  # fmt: skip
    tie = rows[0] | {"score_rejected": 8.5}
    same = rows[0] | {"rejected": rows[0]["chosen"]}
    return [*rows, tie, same]


def hh_rows(split: str, count: int) -> list[dict]:
    rows = []
    for i in range(count):
        start = f"\n\nHuman: Should I sell my old car, {i}?\n\nAssistant: "
        if i % 2:
            start += "What car is it?\n\nHuman: An old one.\nIt is:\n\n- red\n\nAssistant: "
        rows.append({"chosen": f"{start}Sell it.", "rejected": f"{start}I don't know {WORDS}"})
    return [*rows, {"chosen": rows[0]["chosen"], "rejected": rows[1]["rejected"]}]


@dataclass
class Source:
    """A dataset of the Hub: its splits, and what its rows are like."""

    splits: set[str]
    rows: object
    options: dict


SOURCES = {
    "trl-lib/tldr": Source({"train", "validation", "test"}, tldr_rows, {}),
    "trl-lib/tldr-preference": Source({"train", "validation"}, tldr_preference_rows, {}),
    "trl-lib/ultrafeedback_binarized": Source({"train", "test"}, ultrafeedback_rows, {}),
    "Anthropic/hh-rlhf": Source({"train", "test"}, hh_rows, {"data_dir": None}),
}


class Hub:
    """`datasets.load_dataset` of SOURCES; `asked` is what was asked for."""

    def __init__(self) -> None:
        self.asked: set[tuple[str, str]] = set()

    def __call__(self, path: str, split: str, **options) -> Dataset:
        source = SOURCES[path]
        assert split in source.splits, f"{path} has no split {split}"
        assert options == source.options, f"{path} is asked for with {options}"
        self.asked.add((path, split))
        return Dataset.from_list(source.rows(split, 12))


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub's datasets in the tasks of all recipes here."""
    stand_in = Hub()
    for name in STAGES:
        monkeypatch.setattr(load_task(ROOT / "recipes" / name), "load_dataset", stand_in)
    return stand_in


# --- every stage -------------------------------------------------------------------------------------------------

POLICY_STAGES = ["preferences", "ppo", "a2c", "dpo", "evaluate"]
STAGES = {
    "tldr": ["sft", "reward", *POLICY_STAGES],
    "ultrafeedback": POLICY_STAGES,
    "hh": ["sft", "reward", *POLICY_STAGES],
}
BACKBONES = {"tldr": "EleutherAI/pythia-1b-deduped", "ultrafeedback": "Qwen/Qwen3-1.7B", "hh": "Qwen/Qwen3-0.6B-Base"}
ASKED = {
    "tldr": {("trl-lib/tldr", "train"), ("trl-lib/tldr", "validation"),
             ("trl-lib/tldr-preference", "train"), ("trl-lib/tldr-preference", "validation")},
    "ultrafeedback": {("trl-lib/ultrafeedback_binarized", "train"), ("trl-lib/ultrafeedback_binarized", "test")},
    "hh": {("Anthropic/hh-rlhf", "train"), ("Anthropic/hh-rlhf", "test")},
}  # fmt: skip
SIZES = {
    "data.max_prompt_tokens": 300, "data.max_completion_tokens": 6, "run.tracker": "none",
    "preferences.prompts": 4, "preferences.batch_size": 8,
    "evaluate.prompts": 4, "evaluate.batch_size": 8, "evaluate.reference_completions": 4, "watch.prompts": 2,
}  # fmt: skip
SIZES_OF = {
    "sft": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1},
    "reward_training": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1},
    "dpo": {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 1},
    "ppo": {"total_episodes": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "local_rollout_forward_batch_size": 4, "eval_steps": 1},
}  # fmt: skip
SIZES_OF["a2c"] = SIZES_OF["ppo"]


def overrides(recipe: str) -> dict:
    stages = load_recipe(ROOT / "recipes" / recipe).stages
    own = {f"{s}.{key}": value for s, values in SIZES_OF.items() if stages[s] for key, value in values.items()}
    return SIZES | own


def run(stage: str, recipe: str, output: Path, **more) -> dict:
    words = {**overrides(recipe), "run.output": str(output), "run.name": "it", **more}
    flags = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return importlib.import_module(f"scripts.{stage}").main(["--recipe", str(ROOT / "recipes" / recipe), *flags])


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_as_the_recipe_ships(name, hub, tmp_path):
    model = write_stand_in(tmp_path / "hub" / "model", BACKBONES[name])
    paths = {"model.path": str(model)}
    if name == "ultrafeedback":
        paths["reward.model"] = str(write_stand_in(tmp_path / "hub" / "judge", "Skywork/Skywork-Reward-V2-Qwen3-0.6B"))
    summaries = {}
    for stage in STAGES[name]:
        summaries[stage] = run(stage, name, tmp_path, **paths)
        folder = tmp_path / name / stage / "it"
        if stage == "sft":  # what it writes is the backbone from here on
            paths["model.path"] = str(folder / "model")
        if stage == "reward":
            paths["reward.adapter"] = str(folder / "adapter")
        for file in folder.glob("metrics.jsonl"):
            steps = [json.loads(line) for line in file.read_text().splitlines()]
            assert max(row["step"] for row in steps) >= 2
            assert all(math.isfinite(value) for row in steps for value in row.values() if isinstance(value, float)), stage
    assert hub.asked == ASKED[name]
    for stage in ("ppo", "a2c", "dpo"):
        assert summaries[stage]["policy"]["kl"] != 0  # it moved
    judged = summaries["evaluate"]["policies"]
    assert {"reference", "best-of-4", "ppo", "a2c", "dpo"} <= {re.split(r"[ =/]", policy)[0] for policy in judged}


# --- what they need ----------------------------------------------------------------------------------------------


def shapes_of(name: str) -> dict[str, list[int]]:
    """Of the real model's weights, from its config on the meta device."""
    kind = AutoModelForSequenceClassification if name.startswith("Skywork") else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(**REAL[name], num_labels=1))
    return {key: list(parameter.shape) for key, parameter in model.named_parameters()}


@pytest.fixture
def real_sizes(monkeypatch):
    """The checks see the real models' configs and weights as if they were on this machine."""
    shapes = {name: shapes_of(name) for name in REAL}

    def backbone_of(recipe):
        return recipe.model.path if recipe.model.path in REAL else BACKBONES[recipe.task]

    def local_json(recipe, name):
        return REAL[backbone_of(recipe)] if name == "config.json" else {}

    for module in (files, machine, memory):
        monkeypatch.setattr(
            module, "backbone_of", lambda recipe: (REAL[backbone_of(recipe)], shapes[backbone_of(recipe)]), raising=False
        )
        monkeypatch.setattr(module, "shapes_of", lambda recipe, path: shapes[path], raising=False)
        monkeypatch.setattr(module, "local_json", local_json, raising=False)
    monkeypatch.setattr(machine, "_installed", lambda package: True)
    return shapes


def test_the_real_models_have_as_many_weights_as_they_are_said_to(real_sizes):
    counts = {name: sum(map(math.prod, shapes.values())) for name, shapes in real_sizes.items()}
    assert counts == {  # Pythia's model card; Qwen3's say 1.7B, 8.2B and 0.6B
        "EleutherAI/pythia-1b-deduped": 1_011_781_632,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "Qwen/Qwen3-0.6B-Base": 596_049_920,
        "Skywork/Skywork-Reward-V2-Qwen3-0.6B": 596_049_920 + 1024,
    }


ESTIMATE = re.compile(r"^\| `(\w+)` \| (?:`([^`]*)`)? *\| ([0-9.?]+) GiB \|$", re.MULTILINE)


@pytest.mark.parametrize("name", STAGES)
def test_the_estimates_in_the_readme_are_the_preflights(name, real_sizes):
    rows = ESTIMATE.findall((ROOT / "recipes" / name / "README.md").read_text())
    assert [stage for stage, flags, _ in rows if not flags] == STAGES[name]
    for stage, flags, estimate in rows:
        recipe = load_recipe(ROOT / "recipes" / name, parse_command_line(shlex.split(flags)).overrides)
        machine.check(recipe, stage)  # lengths and batch sizes fit the real model
        assert estimate == f"{sum(memory.memory_estimate(recipe, stage).values()) / 2**30:.1f}", (stage, flags)


# --- tokens ------------------------------------------------------------------------------------------------------


def stand_in_of(name: str, folder: Path):
    """A recipe over its stand-in, and the tokenizer as every stage has it."""
    recipe = load_recipe(ROOT / "recipes" / name, {"model.path": str(write_stand_in(folder, BACKBONES[name]))})
    return recipe, load_tokenizer(recipe)


@pytest.mark.parametrize(
    ("name", "pad", "eos"),
    [
        ("tldr", "<|padding|>", "<|endoftext|>"),
        ("ultrafeedback", "<|endoftext|>", "<|im_end|>"),
        ("hh", "<|fim_pad|>", "<|endoftext|>"),
    ],
)
def test_pad_is_a_token_of_the_vocabulary_and_not_the_eos(name, pad, eos, tmp_path):
    _, tokenizer = stand_in_of(name, tmp_path)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (pad, eos)
    assert tokenizer(pad)["input_ids"] == [tokenizer.pad_token_id] != [tokenizer.eos_token_id]
    before = len(AutoTokenizer.from_pretrained(tmp_path))
    assert len(tokenizer) == before  # no new row of the embedding is needed


CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And then?\n\nTell me."},
]


@pytest.mark.parametrize("messages", [CHAT[:1], CHAT, [{"role": "system", "content": "Be brief."}, *CHAT]])
def test_qwen3_answers_in_its_own_form_without_thinking(messages, tmp_path):
    """The same ids as Qwen3's own template with thinking switched off, and the answer alone is what is trained on."""
    _, tokenizer = stand_in_of("ultrafeedback", tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    answered = [*messages, {"role": "assistant", "content": "Three,\n\nfour."}]
    options = {"tokenize": True, "return_dict": False, "enable_thinking": False}
    prompt = encode_prompt(tokenizer, messages)
    assert prompt == own.apply_chat_template(messages, add_generation_prompt=True, **options)
    answer = encode_completion(tokenizer, messages, "Three,\n\nfour.")
    assert tokenizer.decode(answer) == "Three,\n\nfour.<|im_end|>"
    assert prompt + answer == own.apply_chat_template(answered, **options)[: len(prompt + answer)]


@pytest.mark.parametrize("name", ["ultrafeedback", "hh"])
@pytest.mark.parametrize("answer", ["Fine.", "\n\nFine.", " \n 1. Fine", '"Fine"', "", "🙂", "\u0301", ":", "?\n"])
def test_an_answer_never_changes_the_tokens_before_it(name, answer, tmp_path):
    """`encode_completion` refuses a row where it does, and one such row would end a stage."""
    _, tokenizer = stand_in_of(name, tmp_path)
    assert encode_completion(tokenizer, CHAT, answer)[-1] == tokenizer.eos_token_id


def test_the_judge_reads_the_conversation_as_it_was_trained_to(tmp_path):
    """By its own tokenizer and template: one score, that of the model card's own lines."""
    from rlhf_recipes.rewards.total import Rewards, Term
    from tests.test_rewards import load_model_reward, samples_of

    recipe, tokenizer = stand_in_of("ultrafeedback", tmp_path / "policy")
    judge = write_stand_in(tmp_path / "judge", "Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    recipe = load_recipe(recipe.folder, {"model.path": recipe.model.path, "reward.model": str(judge)})
    [spec] = recipe.reward.all_terms()
    reward = Rewards({spec.title: Term(load_model_reward(recipe))})
    prompts, texts = [CHAT, CHAT[:1]], ["Three.", "An old car, and what people think about it."]
    samples = samples_of(tokenizer, [encode_text(tokenizer, prompt) for prompt in prompts], texts, ended=[True, True])
    samples.prompts = prompts
    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.bfloat16).eval()
    own = AutoTokenizer.from_pretrained(judge)
    for prompt, text, score in zip(prompts, texts, reward(samples).total, strict=True):
        chat = own.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
        with torch.no_grad():
            expected = model(**own(chat, return_tensors="pt")).logits[0, 0].float()
        torch.testing.assert_close(score, expected, atol=0.05, rtol=0.05)  # bfloat16, padded
    assert model.config.num_labels == 1
    assert (score - reward(samples).total[0]).abs() > 0.2  # the two are told apart


def encode_text(tokenizer, prompt) -> str:
    return tokenizer.decode(encode_prompt(tokenizer, prompt))


def test_hh_is_written_as_in_the_dataset(tmp_path):
    recipe, tokenizer = stand_in_of("hh", tmp_path)
    task = load_task(recipe)
    for row in hh_rows("train", 4):
        for text in row.values():
            *prompt, answer = task.dialogue(text)
            ids = encode_prompt(tokenizer, prompt) + encode_completion(tokenizer, prompt, [answer])
            assert tokenizer.decode(ids) == f"{text}<|endoftext|>"
            assert ids.count(tokenizer.eos_token_id) == 1


# --- rows that are not as they should be -------------------------------------------------------------------------

H, A = "\n\nHuman: ", "\n\nAssistant: "
DIALOGUES = {
    "one turn": (f"{H}Hi{A}Hello", ["Hi", "Hello"]),
    "two turns": (f"{H}Hi{A}Hello{H}Bye{A}See you", ["Hi", "Hello", "Bye", "See you"]),
    "no blank lines before it": (f"Human: Hi{A}Hello", ["Hi", "Hello"]),
    "spaces and lines around the words": (f"{H} Hi \n{A}\nHello\n\n", ["Hi", "Hello"]),
    "paragraphs and lists": (f"{H}Hi{A}Well:\n\n1. a\n\n2. b", ["Hi", "Well:\n\n1. a\n\n2. b"]),
    "a speaker's name inside a line": (f"{H}Who is Human: X?{A}\nAssistant: no", ["Who is Human: X?", "Assistant: no"]),
    "a word like a speaker's name": (f"{H}Hi{A}So\n\nHuman beings\n\nHumans: all", ["Hi", "So\n\nHuman beings\n\nHumans: all"]),
    "other alphabets": (f"{H}你好{A}Привет 🙂", ["你好", "Привет 🙂"]),
    "an empty answer": (f"{H}Hi{A}", None),
    "an empty question": (f"{H}{A}Hello", None),
    "an empty turn between": (f"{H}Hi{A}{H}Bye{A}See you", None),
    "the person has the last word": (f"{H}Hi{A}Hello{H}Bye", None),
    "the assistant begins": (f"{A}Hello{H}Hi{A}Hello", None),
    "the person speaks twice": (f"{H}Hi{H}Are you there?{A}Hello", None),
    "the assistant speaks twice": (f"{H}Hi{A}Hello{A}Hello again", None),
    "words before the first speaker": (f"Note.{H}Hi{A}Hello", None),
    "nobody speaks": ("Hi", None),
    "nothing": ("", None),
}


@pytest.mark.parametrize(("text", "words"), DIALOGUES.values(), ids=DIALOGUES)
def test_dialogues_of_hh(text, words):
    found = load_task(ROOT / "recipes" / "hh").dialogue(text)
    if words is None:
        assert found is None
    else:
        assert [message["content"] for message in found] == words
        assert [message["role"] for message in found] == ["user", "assistant"] * (len(words) // 2)


def test_pairs_of_hh_have_one_prompt_and_two_answers():
    split_pair = load_task(ROOT / "recipes" / "hh").split_pair
    prompt, chosen, rejected = split_pair(f"{H}Hi{A}Hello{H}Bye{A}So long", f"{H}Hi{A}Hello{H}Bye{A}So what")
    assert [m["content"] for m in prompt] == ["Hi", "Hello", "Bye"]  # the answers' common words are not cut off
    assert [*chosen, *rejected] == [say("assistant", "So long"), say("assistant", "So what")]
    assert split_pair(f"{H}Hi{A}Hello", f"{H}Hi{A}Hello ") is None  # the same answer
    assert split_pair(f"{H}Hi{A}Hello", f"{H}Hey{A}Hello you") is None  # another question
    assert split_pair(f"{H}Hi{A}Hello", f"{H}Hi{A}Hello{H}Bye{A}Bye") is None  # another length


def test_pairs_of_ultrafeedback():
    task = load_task(ROOT / "recipes" / "ultrafeedback")
    row = ultrafeedback_rows("train", 1)[0]
    prompt, chosen, rejected = task.split_pair(row["chosen"], row["rejected"])
    ours = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert ours == trl.extract_prompt({"chosen": row["chosen"], "rejected": row["rejected"]})
    assert list(prompt[0]) == ["role", "content"]
    begun = [say("user", "a"), say("assistant", "b"), say("user", "c")]
    prompt, *answers = task.split_pair([*begun, say("assistant", "d")], [*begun, say("assistant", "d e")])
    assert len(prompt) == 3
    assert all(len(answer) == 1 for answer in answers)
    assert task.split_pair(row["chosen"], row["chosen"])[1:] == ([], [])  # no answers are left: the row is not used


def test_what_the_tasks_make_of_the_rows(hub):
    tasks = {name: load_task(ROOT / "recipes" / name) for name in STAGES}
    rows = load_dataset(tasks["tldr"], "load_preferences", "eval")
    assert len(rows) == 12  # neither the article nor the pair of one summary
    assert all(text.startswith(" ") and not text.startswith("  ") for side in ("chosen", "rejected") for text in rows[side])
    assert load_dataset(tasks["tldr"], "load_prompts", "eval")[0] == {"prompt": post(0), "author": " sell the old car 0"}
    assert len(load_dataset(tasks["ultrafeedback"], "load_preferences", "train")) == 12  # neither the tie nor the same answers
    assert len(load_dataset(tasks["ultrafeedback"], "load_prompts", "train")) == 12
    assert len(load_dataset(tasks["hh"], "load_demonstrations", "train")) == 12  # not the row of two dialogues
    assert len(load_dataset(tasks["hh"], "load_prompts", "train")) == 12


# --- on a cluster ------------------------------------------------------------------------------------------------

SLURM = ROOT / "accelerate_configs" / "slurm.sh"
FAKES = {  # what a cluster has; the launcher starts one process, which ends with 75 when it is asked to
    "scontrol": 'case $1 in show) echo node1; echo node2;; *) echo "$@" >>requeued;; esac',
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for node in 0 1; do SLURM_NODEID=$node SLURM_NNODES=2 SLURM_GPUS_ON_NODE=4 "$@" & done
        wait -n; code=$?; wait; exit $code""",
    "python": """
        printf '%s\\n' "$@" >asked-$SLURM_NODEID
        [ -f finishes ] && exit 0
        bash -c 'trap "exit 75" TERM; touch up-'$SLURM_NODEID'
            for i in {1..100}; do sleep 0.1; [ -f saved ] && exit 75; done' &
        child=$!; trap 'kill -TERM $child' TERM
        wait $child; wait $child; code=$?; touch saved; exit $code""",
}


def test_the_slurm_script_saves_requeues_and_goes_on(tmp_path):
    """Run by bash with a cluster of two machines made of shell scripts."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]",
                   "SLURM_NNODES": "2"}  # fmt: skip
    words = ["bash", str(SLURM), "scripts/ppo.py", "--recipe", "recipes/tldr"]

    job = subprocess.Popen(words, cwd=tmp_path, env=environment)
    wait_for(lambda: (tmp_path / "up-0").exists() and (tmp_path / "up-1").exists())
    job.terminate()
    assert job.wait(20) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    first = [(tmp_path / f"asked-{node}").read_text().splitlines() for node in (0, 1)]
    for node, asked in enumerate(first):
        check_launch(asked, ["--run.name", "slurm-4711"], machine_rank=node, num_machines=2, num_processes=8)
        assert asked[asked.index("--main_process_ip") + 1] == "node1"

    run = tmp_path / "outputs" / "tldr" / "ppo" / "slurm-4711"
    run.mkdir(parents=True)
    (run / "recipe.resolved.yaml").touch()
    (tmp_path / "finishes").touch()
    assert subprocess.run(words, cwd=tmp_path, env=environment, check=False).returncode == 0
    check_launch((tmp_path / "asked-1").read_text().splitlines(), ["--resume", "outputs/tldr/ppo/slurm-4711"])
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"  # not again


def wait_for(what) -> None:
    import time

    for _ in range(200):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it took too long")


def check_launch(words: list[str], end: list[str], **settings) -> None:
    """The launcher understands what the script asks of it, and hands the rest to the stage."""
    assert words[:3] == ["-m", "rlhf_recipes", "launch"]
    parsed = launch_command_parser().parse_args(words[3:])
    assert (ROOT / parsed.config_file).is_file()
    assert parsed.training_script == "scripts/ppo.py"
    assert (ROOT / parsed.training_script).is_file()
    assert parsed.training_script_args == ["--recipe", "recipes/tldr", *end]
    assert {key: getattr(parsed, key) for key in settings} == settings


@pytest.mark.parametrize("line", re.findall(r"^#   .*(accelerate_configs/slurm.sh.*)", SLURM.read_text(), re.MULTILINE))
def test_the_commands_in_the_slurm_script_dry_run(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, script, *words = shlex.split(line)
    assert importlib.import_module(f"scripts.{Path(script).stem}").main([*words, "--dry-run"]) is None


def test_the_slurm_script_is_valid_and_its_launch_files_exist():
    assert subprocess.run(["bash", "-n", str(SLURM)], check=False).returncode == 0
    files = re.findall(r"accelerate_configs/\w+\.yaml", SLURM.read_text())
    assert files
    assert all((ROOT / file).is_file() for file in files)
    options = dict(itertools.chain(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SLURM.read_text(), re.MULTILINE)))
    assert options["ntasks-per-node"] == "1"  # one launcher a machine
    assert options["signal"] == "B:TERM@600"


# --- 4 bits ------------------------------------------------------------------------------------------------------

# bitsandbytes 0.50.2 dequantises on a CPU wrongly where a row is no multiple of its blocks of 64
BLOCKS = {"hidden_size": 64, "intermediate_size": 128}
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["tldr", "hh"])
def test_every_stage_but_sft_runs_on_a_backbone_of_4_bits(name, hub, tmp_path):
    paths = {"model.path": str(write_stand_in(tmp_path / "hub", BACKBONES[name], **BLOCKS)), "model.quantization": "4bit"}
    for stage in STAGES[name][1:]:
        summary = run(stage, name, tmp_path, **paths, **{"ppo.value": "adapter"})
        if stage == "reward":
            paths["reward.adapter"] = str(tmp_path / name / stage / "it" / "adapter")
        if stage in ("ppo", "a2c", "dpo"):
            assert summary["policy"]["kl"] != 0
            weights = load_file(tmp_path / name / stage / "it" / "adapter_model.safetensors")
            assert all(weight.dtype == torch.float32 for weight in weights.values())  # small steps are not rounded away
            assert any(weight.abs().max() > 0 for key, weight in weights.items() if "lora_B" in key)


@needs_bitsandbytes
def test_all_roles_share_the_4_bit_layers_and_a_training_leaves_them_alone(hub, tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    from rlhf_recipes.models.backbone import is_4bit
    from rlhf_recipes.roles import build_roles

    run("reward", "hh", tmp_path, **{"model.path": str(write_stand_in(tmp_path / "hub", BACKBONES["hh"], **BLOCKS))})
    values = overrides("hh") | {
        "model.path": str(tmp_path / "hub"), "model.quantization": "4bit",
        "reward.adapter": str(tmp_path / "hh" / "reward" / "it" / "adapter"),
    }  # fmt: skip
    recipe = load_recipe(ROOT / "recipes" / "hh", values)
    roles = build_roles(recipe, load_tokenizer(recipe), value="adapter")
    layers = {role: [m for m in getattr(roles, role).modules() if is_4bit(m)] for role in ("policy", "value", "reward")}
    assert len(layers["policy"]) == 2 * 7  # every linear layer of both blocks
    for role in ("value", "reward"):
        assert all(a is b for a, b in zip(layers["policy"], layers[role], strict=True))
    before = [layer.weight.detach().clone() for layer in layers["policy"]]
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():  # the reference is the backbone with its linear weights rounded to 4 bits
        judged = roles.reference(input_ids=ids).logits
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.bfloat16)
        for name, module in roles.policy.named_modules():
            if is_4bit(module):
                weight = whole.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer")).weight
                rounded = dequantize_4bit(module.weight.data, module.weight.quant_state)
                assert ((rounded - weight).norm() / weight.norm()).item() == pytest.approx(
                    0.092, abs=0.01
                )  # NF4's, of normal weights
                weight.copy_(rounded)
        torch.testing.assert_close(judged, whole(input_ids=ids).logits, atol=0.1, rtol=0.05)
    for role, model in (("policy", roles.policy), ("value", roles.value.trunk)):
        output = model(input_ids=ids)
        (output.last_hidden_state if role == "value" else output.logits).sum().backward()
        grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
        assert grads
        assert all(grad is not None and grad.abs().sum() > 0 and grad.dtype == torch.float32 for grad in grads), role
    assert all(torch.equal(a, layer.weight) for a, layer in zip(before, layers["policy"], strict=True))


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("sft", {}, "sft merges an adapter into the backbone's weights"),
        ("merge", {}, "merge merges an adapter"),
        ("ppo", {"model.dtype": "float32"}, "computes in bfloat16, and `model.dtype` is float32"),
        ("dpo", {}, "needs the package bitsandbytes: pip install bitsandbytes"),
    ],
)
def test_what_4_bits_cannot_do_is_refused(stage, more, message, monkeypatch):
    monkeypatch.setattr(machine, "_installed", lambda package: False)
    with pytest.raises(RecipeError, match=message):
        machine.check(load_recipe(ROOT / "recipes" / "hh", {"model.quantization": "4bit", **more}), stage)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_4_bits_are_not_sharded(engine, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(RecipeError, match="4-bit weights are not taken apart"):
        machine.check(load_recipe(ROOT / "recipes" / "hh", {"model.quantization": "4bit"}), "dpo")
