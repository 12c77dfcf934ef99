"""The chat recipe on its real conversations: parts, pairs, the judge, and the template that every stage goes through."""

import importlib.util
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from rlhf_recipes.data.datasets import tokenize_pairs
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.data.tokens import encode_completion, encode_prompt
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.tasks import load_dataset, load_task

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "chitchat"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("chitchat_dataset") is None, reason="pip install chitchat-dataset==0.9.0"
)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(FOLDER, {"model.path": "../imdb/checkpoints/backbone"})


@pytest.fixture(scope="module")
def task(recipe):
    return load_task(recipe)


def test_without_the_package_it_says_what_to_install(recipe, monkeypatch):
    task = load_task(recipe)
    task._dataset.cache_clear()
    task.conversations.cache_clear()
    task.replies.cache_clear()
    monkeypatch.setattr(task.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install chitchat-dataset==0\.9\.0"):
        load_dataset(task, "load_prompts", "train")


def test_a_dialogue_has_the_same_tokens_in_every_stage(recipe):
    tokenizer = load_tokenizer(recipe)
    roles, texts = ("user", "assistant", "user"), ("Hello! ", "hi", "  ?")
    prompt = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    answer = "Where are you from?"
    before, after = encode_prompt(tokenizer, prompt), encode_completion(tokenizer, prompt, answer)
    whole = [*prompt, {"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False) == before + after
    assert tokenizer.decode(before) == "<s>Hello!</s>hi</s>?</s>"
    assert tokenizer.decode(after) == f"{answer}</s>"
    assert after == encode_completion(tokenizer, "", answer)  # as it would be sampled: nothing merges across the border


@needs_package
def test_a_conversation_is_in_one_part(task):
    parts = {part: {name for name, _ in task.conversations(part)} for part in task.PARTS}
    assert all(len(names) > 100 for names in parts.values())
    assert not any(a & b for a, b in combinations(parts.values(), 2))


@needs_package
def test_two_people_take_turns(task):
    for _, turns in task.conversations("evaluation"):
        assert len(turns) >= 8
        assert all(a != b and text for (a, text), (b, _) in pairwise(turns))


@needs_package
@pytest.mark.parametrize("split", ["train", "eval"])
def test_prompts_begin_and_end_with_the_user(task, split):
    for prompt in load_dataset(task, "load_prompts", split)["prompt"]:
        assert [message["role"] for message in prompt] in (["user"], ["user", "assistant", "user"])
        assert sum(len(message["content"].split()) for message in prompt) <= task.CONTEXT_WORDS


@needs_package
def test_both_replies_of_a_pair_are_of_one_length(task, recipe):
    pairs = load_dataset(task, "load_preferences", "eval")
    answers = {(reply.text, tuple(m["content"] for m in reply.context)): reply.answer for reply in task.replies("evaluation")}
    for pair in pairs:
        assert len(pair["chosen"].split()) == len(pair["rejected"].split()) <= pair["words"]
        assert answers[pair["chosen"], tuple(m["content"] for m in pair["prompt"])] > 0
    tokens = tokenize_pairs(pairs.select(range(50)), load_tokenizer(recipe), read_eos=True)
    assert all(row["chosen_ids"][-1] == row["rejected_ids"][-1] for row in tokens)


@needs_package
def test_the_judge_knows_what_gets_a_long_answer(task):
    def gold(texts):
        return task.gold_reward([[]] * len(texts), [[{"role": "assistant", "content": text}] for text in texts])

    asking, ending = gold(["Why do you think that is? Tell me about it", "haha okay well i have to go, bye, have a great day"])
    assert ending < 0.42 < 0.58 < asking
    pairs = load_dataset(task, "load_preferences", "eval")
    right = [good > bad for good, bad in zip(gold(pairs["chosen"]), gold(pairs["rejected"]), strict=True)]
    assert sum(right) / len(right) > 0.57  # 0.594; from conversations that it has not seen
