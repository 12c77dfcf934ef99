"""Chat prompts through every stage, and one way to token ids whichever stage builds them."""

import json
import shutil
import types

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import maybe_apply_chat_template

from rlhf_recipes.algorithms.pairs import tokenize_preferences
from rlhf_recipes.data.datasets import tokenize_demonstrations, tokenize_pairs, tokenize_prompts
from rlhf_recipes.data.tokenizer import end_token_ids, load_tokenizer
from rlhf_recipes.data.tokens import encode_completion, encode_prompt
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.tasks import load_dataset

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
    [dpo] = tokenize_preferences(rows, tokenizer, ends_of(tokenizer, recipe), recipe.data)
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


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def ends_of(tokenizer, recipe):
    return end_token_ids(tokenizer, recipe.path(recipe.model.path))


def texts_of(rows, tokenizer, recipe):
    """What every stage makes of a pair: prompts, demonstrations (mask applied), rewards' pairs, DPO's."""
    asked = tokenize_prompts(rows, tokenizer, 99)[0]["input_ids"]
    sft = tokenize_demonstrations(rows.rename_column("chosen", "completion"), tokenizer)[0]
    dpo = tokenize_preferences(rows, tokenizer, ends_of(tokenizer, recipe), recipe.data)[0]
    reward = tokenize_pairs(rows, tokenizer, True)[0]
    learned = [token for token, mask in zip(sft["input_ids"], sft["completion_mask"], strict=True) if mask]
    assert asked == dpo["prompt_ids"]
    assert learned == dpo["chosen_ids"]
    assert sft["input_ids"] == reward["chosen_ids"] == asked + learned
    return tokenizer.decode(asked), tokenizer.decode(learned)


@pytest.fixture
def spoken(chat):
    """A tokenizer with the template, and the recipe."""
    recipe = load_recipe(chat, {"data.max_completion_tokens": 99, "data.max_prompt_tokens": 99})
    return load_tokenizer(recipe), recipe


def test_all_turns_of_a_completion_are_learned(spoken):
    turns = [assistant("one"), user("and then?"), assistant("two")]
    rows = Dataset.from_list([{"prompt": [user("the film?")], "chosen": turns, "rejected": [assistant("one")]}])
    assert texts_of(rows, *spoken) == ("u:the film?a:", "one</s>u:and then?a:two</s>")


def test_an_answer_begun_in_the_prompt_is_continued(spoken):
    prompt = [user("2 + 2?"), assistant("Sure, it is")]
    rows = Dataset.from_list([{"prompt": prompt, "chosen": [assistant(" four")], "rejected": [assistant(" five")]}])
    assert texts_of(rows, *spoken) == ("u:2 + 2?a:Sure, it is", " four</s>")
    by_trl = maybe_apply_chat_template({"prompt": prompt}, spoken[0])["prompt"]
    assert by_trl == "u:2 + 2?a:Sure, it is"


def test_tools_and_template_variables_reach_the_template_in_every_stage(spoken):
    tokenizer, recipe = spoken
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ mood }}" + TEMPLATE
    tools = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}]  # Arrow gives both a and b
    row = {"prompt": [user("x")], "chosen": [assistant("y")], "rejected": [assistant("z")]}
    given = {"tools": tools, "chat_template_kwargs": {"mood": "glad"}}
    shown = '{"name": "f", "arguments": {"a": 1}}{"name": "g", "arguments": {"b": 2}}glad'
    for columns in (given, given | {"tools": json.dumps(tools)}):
        rows = Dataset.from_list([row | columns])
        assert texts_of(rows, tokenizer, recipe)[0].replace(" ", "") == (shown + "u:xa:").replace(" ", "")
    messages = Dataset.from_list([{"messages": [user("x"), assistant("y")]} | given])
    whole = tokenizer.decode(tokenize_demonstrations(messages, tokenizer)[0]["input_ids"])
    assert whole.replace(" ", "") == (shown + "u:xa:y</s>").replace(" ", "")
    taken = Dataset.from_list([row | {"chat_template_kwargs": {"tokenize": False}}])
    with pytest.raises(RecipeError, match="`load_prompts`, row 0: `chat_template_kwargs` has tokenize, which each stage sets"):
        tokenize_prompts(taken, tokenizer, 99)


def task_of(function, *rows):
    made = types.ModuleType("task")
    made.__file__ = "task.py"
    setattr(made, function, lambda split: Dataset.from_list(list(rows)))
    return load_dataset(made, function, "train")


def test_sharegpts_conversations_are_converted():
    human, gpt = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    [row] = task_of("load_demonstrations", {"conversations": [human, gpt], "id": 1})
    assert row == {"id": 1, "messages": [user("q"), assistant("a")]}
    other = {"from": "gpt", "value": "b"}
    [row] = task_of("load_preferences", {"prompt": [human], "chosen": [gpt], "rejected": [other]})
    assert row == {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    [row] = task_of("load_prompts", {"prompt": [human], "stars": 3})
    assert row == {"prompt": [user("q")], "stars": 3}


def test_a_pairs_prompt_may_be_what_its_sides_have_in_common():
    good, bad = [user("q"), assistant("a")], [user("q"), assistant("b")]
    pair = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    for given in ({"chosen": good, "rejected": bad}, {"prompt": "q", "chosen": good, "rejected": bad}):
        [row] = task_of("load_preferences", given)
        assert row == pair
    [row] = task_of("load_preferences", {"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"})
    assert row["prompt"].startswith("Human: q Assistant:")
    assert row["prompt"] + row["chosen"] == "Human: q Assistant: a"
    with pytest.raises(RecipeError, match=r"row 0 has no messages .* begin with other messages"):
        task_of("load_preferences", {"chosen": good, "rejected": [user("r"), assistant("b")]})


def test_content_is_text_or_parts_whichever_the_template_reads(spoken):
    tokenizer, _ = spoken
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "film?"}]}]
    assert encode_prompt(tokenizer, parts) == encode_prompt(tokenizer, [user("the film?")])
    tokenizer.chat_template = "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}"
    assert tokenizer.decode(encode_prompt(tokenizer, parts)) == "the ;film?;"
    assert tokenizer.decode(encode_prompt(tokenizer, [user("the film?")])) == "the film?;"
    with pytest.raises(RecipeError, match=r"a message holds {'type': 'image'}; only text is read here"):
        encode_prompt(tokenizer, [{"role": "user", "content": [{"type": "image"}]}])


def test_what_a_template_refuses_or_leaves_out_is_said_with_its_row(spoken):
    tokenizer, recipe = spoken
    fine, system = [user("x")], [{"role": "system", "content": "s"}, user("x")]
    answers = {"chosen": [assistant("y")], "rejected": [assistant("z")], "completion": [assistant("y")]}
    rows = Dataset.from_list([{"prompt": prompt, **answers} for prompt in (fine, system)])
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    for function, tokenize in (
        ("load_prompts", lambda: tokenize_prompts(rows, tokenizer, 99)),
        ("load_preferences", lambda: tokenize_pairs(rows, tokenizer, True)),
        ("load_preferences", lambda: tokenize_preferences(rows, tokenizer, ends_of(tokenizer, recipe), recipe.data)),
        ("load_demonstrations", lambda: tokenize_demonstrations(rows, tokenizer)),
    ):
        with pytest.raises(RecipeError, match=rf"`{function}`, row 1: the chat template of .* TemplateError: no system"):
            tokenize()
    for broken in ("{{ messages[0].content + 1 }}", "{{ messages[7].content.x }}", "{% for m in %}", "{{ 1 / 0 }}"):
        tokenizer.chat_template = broken
        with pytest.raises(RecipeError, match=r"`load_prompts`, row 0: the chat template of `model.path` does not take"):
            tokenize_prompts(rows, tokenizer, 99)
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(RecipeError, match="leaves out the message of the role 'human'; rename it"):
        encode_prompt(tokenizer, [{"role": "human", "content": "x"}])


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


def test_a_template_from_windows_is_the_same_template(tiny, tmp_path):
    place = tmp_path / "mine"
    shutil.copytree(tiny, place)
    (place / "plain.jinja").write_bytes(TEMPLATE.encode() + b"\n")
    (place / "windows.jinja").write_bytes(b"\xef\xbb\xbf" + TEMPLATE.encode() + b"\r\n")
    plain, windows = (
        load_tokenizer(load_recipe(place, {"model.chat_template": f"{name}.jinja"})) for name in ("plain", "windows")
    )
    assert windows.chat_template == plain.chat_template
