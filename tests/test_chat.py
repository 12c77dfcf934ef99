"""Chat prompts through every stage, and one way to token ids whichever stage builds them."""

import json
import shutil

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from rlhf_recipes.data import (
    encode_completion,
    encode_prompt,
    load_tokenizer,
    tokenize_demonstrations,
    tokenize_pairs,
    tokenize_prompts,
)
from rlhf_recipes.preferences import tokenize_preferences
from rlhf_recipes.recipe import RecipeError, load_recipe

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)

TASK = """
from datasets import Dataset

def user(text):
    return [{"role": "user", "content": text}]

def assistant(text):
    return [{"role": "assistant", "content": text}]

WORDS = ["film", "plot", "cast", "score"]

def load_prompts(split):
    return Dataset.from_list([{"prompt": user(f"the {w}?"), "word": w} for w in WORDS * 6])

def load_preferences(split):
    pair = {"chosen": assistant("great"), "rejected": assistant("dull")}
    return Dataset.from_list([{"prompt": user(f"the {w}?"), **pair} for w in WORDS * 4])

def load_demonstrations(split):
    return Dataset.from_list([{"prompt": user(f"the {w}?"), "completion": assistant(f"a great {w}")} for w in WORDS * 6])

def reward(prompts, completions, word):
    assert all(p[0]["content"] == f"the {w}?" for p, w in zip(prompts, word))
    assert all(c[0]["role"] == "assistant" for c in completions)
    return [float(c[0]["content"].count("a")) for c in completions]

gold_reward = reward
"""


@pytest.fixture(scope="module")
def chat(tiny, tmp_path_factory):
    """The tiny recipe with a chat template and a task of messages."""
    folder = tmp_path_factory.mktemp("recipes") / "chat"
    shutil.copytree(tiny, folder)
    (folder / "task.py").write_text(TASK)
    backbone = folder / "checkpoints" / "backbone"
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(backbone)
    return folder


@pytest.mark.parametrize("messages", [True, False], ids=["chat", "text"])
def test_every_stage_builds_the_same_ids(chat, messages):
    recipe = load_recipe(chat, {"data.max_completion_tokens": 24})
    tokenizer = load_tokenizer(recipe)
    prompt, answer, other = (
        [{"role": "user", "content": "the film?"}],
        [{"role": "assistant", "content": "a great film"}],
        "dull",
    )
    if not messages:
        prompt, answer = "the film wa", "s great"  # a joint tokenisation would have a token across the two
    rows = Dataset.from_list([{"prompt": prompt, "completion": answer, "chosen": answer, "rejected": other}])
    if messages:
        rows = rows.remove_columns("rejected").add_column("rejected", [[{"role": "assistant", "content": other}]])

    [asked] = tokenize_prompts(rows, tokenizer, 24)["input_ids"]
    [sft] = tokenize_demonstrations(rows.select_columns(["prompt", "completion"]), tokenizer)
    [dpo] = tokenize_preferences(rows, tokenizer, recipe)
    [reward] = tokenize_pairs(rows, tokenizer, read_eos=True)
    [blind] = tokenize_pairs(rows, tokenizer, read_eos=False)

    assert asked == dpo["prompt_ids"] == encode_prompt(tokenizer, prompt)
    said = encode_completion(tokenizer, prompt, answer)
    assert said[-1] == tokenizer.eos_token_id
    assert said.count(tokenizer.eos_token_id) == 1
    assert dpo["chosen_ids"] == said
    assert sft["input_ids"] == reward["chosen_ids"] == asked + said
    assert sft["completion_mask"] == [0] * len(asked) + [1] * len(said)
    assert blind["chosen_ids"] == asked + said[:-1]
    text = tokenizer.decode(asked + said)
    assert text == ("<s>" * (not messages)) + ("u:the film?a:a great film</s>" if messages else "the film was great</s>")
    if not messages:
        assert asked + said != [*tokenizer("the film was great")["input_ids"], tokenizer.eos_token_id]


def test_a_template_that_samples_cannot_follow_is_refused(chat):
    tokenizer = load_tokenizer(load_recipe(chat))
    prompt = [{"role": "user", "content": "the film?"}]
    tokenizer.chat_template = TEMPLATE.replace("</s>", "#")
    with pytest.raises(RecipeError, match="not with the tokenizer's eos token '</s>'"):
        encode_completion(tokenizer, prompt, "great")
    tokenizer.chat_template = TEMPLATE.replace("a:{% endif %}", "a: <think>{% endif %}")  # as Qwen 3.5's
    assert tokenizer.decode(encode_completion(tokenizer, prompt, "great")) == "great</s>"
    tokenizer.chat_template = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages[-2:] %}")
    prompt = [{"role": "user", "content": "one"}, *prompt]
    with pytest.raises(RecipeError, match="writes a prompt differently once an answer follows"):
        encode_completion(tokenizer, prompt, "great")
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        encode_prompt(tokenizer, prompt)


def test_the_doctor_and_sft_find_such_a_template_before_a_run(chat, tmp_path, capsys):
    """PPO sees no answers before it samples, and TRL tokenises `messages` itself."""
    from scripts import ppo, sft

    folder = tmp_path / "chat"
    shutil.copytree(chat, folder)
    backbone = folder / "checkpoints" / "backbone"
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.chat_template = TEMPLATE.replace("</s>", "#")
    tokenizer.save_pretrained(backbone)
    messages = 'return Dataset.from_list([{"messages": user(f"the {w}?") + assistant("fine")} for w in WORDS])'
    task = (folder / "task.py").read_text()
    (folder / "task.py").write_text(
        task.replace(
            'return Dataset.from_list([{"prompt": user(f"the {w}?"), "completion"', messages + '\n    ([{"a": "b", "completion"'
        )
    )
    for script in (ppo, sft):
        with pytest.raises(SystemExit) as stop:
            script.main(["--recipe", str(folder), "--run.output", str(tmp_path / "out"), "--sft.from_scratch", "false"])
        assert stop.value.code == 2
        assert "not with the tokenizer's eos token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_stage_runs_on_chat(chat, tmp_path, capsys):
    """SFT on prompts and completions, a reward adapter and a python reward that gets messages, pairs, PPO, DPO, evaluation."""
    from scripts import a2c, dpo, evaluate, ppo, preferences, reward, sft

    terms = "[{adapter: checkpoints/reward, name: judge}, {function: true, name: letters, weight: 2}]"
    common = ["--recipe", str(chat), "--run.output", str(tmp_path), "--run.name", "run", "--reward.read_eos", "true"]
    common += ["--reward.adapter", "null", "--reward.terms", terms, "--dpo.rounds", "2", "--sft.from_scratch", "false"]
    for script in (sft, reward, preferences, ppo, a2c, dpo, evaluate):
        script.main(common)
    summary = json.loads((tmp_path / "chat" / "ppo" / "run" / "summary.json").read_text())
    policy = summary["policy"]
    assert policy["reward"] == pytest.approx(policy["reward_judge"] + 2 * policy["reward_letters"], abs=1e-4)
    assert policy["gold"] == pytest.approx(policy["reward_letters"])
    pair = json.loads((tmp_path / "chat" / "preferences" / "run" / "pairs.jsonl").read_text().splitlines()[0])
    assert pair["prompt"][0]["role"] == "user"
    sample = json.loads((tmp_path / "chat" / "ppo" / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == "user: the film?"
    metrics = json.loads((tmp_path / "chat" / "ppo" / "run" / "metrics.jsonl").read_text().splitlines()[0])
    both = metrics["rewards/judge/mean"] + 2 * metrics["rewards/letters/mean"]
    assert metrics["objective/scores"] == pytest.approx(both, abs=1e-4)
