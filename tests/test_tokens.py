"""Ends of text, special tokens, and text against token ids, on tokenizers as users bring them."""

import json
import random
import types

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_recipes.algorithms.pairs import tokenize_preferences
from rlhf_recipes.checks.machine import check
from rlhf_recipes.data.datasets import tokenize_demonstrations, tokenize_pairs, tokenize_prompts
from rlhf_recipes.data.tokenizer import end_token_ids, load_tokenizer, train_readable_tokenizer
from rlhf_recipes.data.tokens import decode_completions, encode_completion, encode_pair, encode_prompt
from rlhf_recipes.evaluation.judging import sample_texts
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe

SPACE = "\u2581"


def with_spaces(kind: str) -> PreTrainedTokenizerFast:
    """Letters, and letters after a space, which is put before a text: as Llama-2's ("prepend") and Mistral's newer
    tokenizers ("metaspace") do it."""
    letters = SPACE + "abcdefghijklmnopqrstuvwxyz?:,.!'\n"
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *letters, *(SPACE + c for c in letters[1:27])])}
    made = Tokenizer(models.BPE(words, [(SPACE, c) for c in letters[1:27]], unk_token="<unk>"))  # noqa: S106
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
        made.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="first")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_a_completions_text_is_what_it_adds_to_the_prompts(kind):
    tokenizer = with_spaces(kind)
    prompt, whole = (tokenizer(text)["input_ids"] for text in ("the movie was", "the movie was great fun"))
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "great fun"  # by itself
    ended = [*whole[len(prompt) :], tokenizer.eos_token_id]
    texts = decode_completions(tokenizer, [prompt, prompt, prompt, [1]], [ended, ended[:-1], [], whole[1:]])
    assert texts == [" great fun", " great fun", "", "the movie was great fun"]


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("the movie was", " great fun"), ("the movie wa", "s great"), ("is it? ", "yes"), ("", "a film"), ("a", "\nb"), ("a", "")],
)
def test_every_stage_learns_what_a_sampled_completion_would_be(kind, prompt, completion, tiny):
    tokenizer, recipe = with_spaces(kind), load_recipe(tiny, {"data.max_completion_tokens": 24})
    asked, said = encode_pair(tokenizer, prompt, completion)
    assert asked == encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(asked + said, skip_special_tokens=True) == prompt + completion
    assert said[-1] == tokenizer.eos_token_id
    assert decode_completions(tokenizer, [asked], [said]) == [completion]
    rows = Dataset.from_list([{"prompt": prompt, "completion": completion, "chosen": completion, "rejected": "x"}])
    ends = end_token_ids(tokenizer, recipe.path(recipe.model.path))
    assert tokenize_pairs(rows, tokenizer, True)[0]["chosen_ids"] == asked + said
    assert tokenize_demonstrations(rows.select_columns(["prompt", "completion"]), tokenizer)[0]["input_ids"] == asked + said
    pair = tokenize_preferences(rows.select_columns(["prompt", "chosen", "rejected"]), tokenizer, ends, recipe.data)[0]
    assert (pair["prompt_ids"], pair["chosen_ids"]) == (asked, said)
    if completion == " great fun":
        assert asked + said[:-1] == tokenizer(prompt + completion)["input_ids"]


def test_completions_of_bytes_are_tokenised_by_themselves(tiny):
    tokenizer = load_tokenizer(load_recipe(tiny))
    for completion in ("great", " great", "  ", "", "\nfilm", "caf\u00e9"):
        alone = tokenizer(completion, add_special_tokens=False)["input_ids"]
        assert encode_completion(tokenizer, "the film wa", completion) == [*alone, tokenizer.eos_token_id]


def test_a_tokenizer_that_appends_its_eos_does_not_end_a_prompt(tiny):
    tokenizer = load_tokenizer(load_recipe(tiny))
    plain = {text: tokenizer(text)["input_ids"] for text in ("the film", "", "ends</s>")}
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    appends = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **{k: v for k, v in tokenizer.special_tokens_map.items() if "_" in k}
    )
    assert appends("the film")["input_ids"] == [*plain["the film"], eos]
    for text, ids in plain.items():
        assert encode_prompt(appends, text) == ids
    [row] = tokenize_demonstrations(Dataset.from_dict({"text": ["the film"]}), appends)
    assert row["input_ids"] == [*plain["the film"], eos]
    plain = load_tokenizer(load_recipe(tiny))
    assert "text" in tokenize_demonstrations(Dataset.from_dict({"text": ["a"]}), plain).column_names


def test_special_tokens_that_are_there_twice_are_named_once(tiny, capsys):
    tokenizer = load_tokenizer(load_recipe(tiny))
    rows = Dataset.from_list(
        [{"prompt": "fine", "chosen": "a", "rejected": "b"}] + [{"prompt": "<s>a", "chosen": "b</s>", "rejected": "c"}] * 3
    )
    for _ in ("train", "eval"):
        tokenize_prompts(rows, tokenizer, 24)
    assert capsys.readouterr().err.splitlines() == [
        "warning: `load_prompts`: `prompt` of row 1 begins with the special token <s>, and the tokenizer puts it before every "
        "text; leave it out of the text",
        "warning: `load_prompts`: `chosen` of row 1 ends with the special token </s>, and the end of a completion is added to "
        "it; leave it out of the text",
    ]
    assert encode_completion(tokenizer, "a", "b</s>") == encode_completion(tokenizer, "a", "b")
    inside = Dataset.from_list([{"prompt": "a", "chosen": "b</s>c", "rejected": "c</s>"}])
    tokenize_prompts(inside, tokenizer, 24)
    assert (
        "`chosen` of row 0 holds the special token </s>, and a sampled completion would stop there" in capsys.readouterr().err
    )
    other = load_tokenizer(load_recipe(tiny))  # another run
    tokenize_prompts(Dataset.from_dict({"prompt": ["the film</s>"]}), other, 24)
    assert "ends with the special token </s>, and a completion would follow the end of a text" in capsys.readouterr().err
    chat = Dataset.from_list([{"messages": [{"role": "user", "content": "a</s>b"}]}])
    other.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenize_demonstrations(chat, other)
    assert "`messages` of row 0 holds the special token </s>, and the chat template writes" in capsys.readouterr().err
    tokenize_prompts(rows.select([0]), other, 24)
    assert capsys.readouterr().err == ""


def test_a_datasets_own_token_ids_are_taken_as_they_are(tiny):
    tokenizer = load_tokenizer(load_recipe(tiny))
    ids = encode_prompt(tokenizer, "the film")
    both = tokenize_prompts(Dataset.from_list([{"prompt": "other", "input_ids": ids, "stars": 3}]), tokenizer, 24)
    assert both[0] == {"prompt": "other", "stars": 3, "input_ids": ids}
    alone = tokenize_prompts(Dataset.from_list([{"input_ids": ids}]), tokenizer, 24)
    assert alone[0] == {"prompt": "the film", "input_ids": ids}
    padded = {"input_ids": [0, 0, *ids, 0], "attention_mask": [0, 0, *[1] * len(ids), 0]}  # as they were tokenised elsewhere
    assert tokenize_prompts(Dataset.from_list([padded]), tokenizer, len(ids))[0]["input_ids"] == ids
    learned = Dataset.from_list([{"input_ids": ids, "completion_mask": [0] * len(ids), "text": "x"}])
    assert set(tokenize_demonstrations(learned, tokenizer).column_names) == {"input_ids", "completion_mask"}
    for wrong in ([len(tokenizer)], [-1], ["a"], None):
        with pytest.raises(RecipeError, match=r"`load_prompts`, row 0: `input_ids`: expected tokens from 0 to \d+, got"):
            tokenize_prompts(Dataset.from_list([{"prompt": "x", "input_ids": wrong}]), tokenizer, 24)


def test_completions_of_bytes_decode_as_they_do_by_themselves(tiny):
    tokenizer, draw = load_tokenizer(load_recipe(tiny)), random.Random(0)  # noqa: S311
    prompts = [tokenizer(text)["input_ids"] for text in ("the film ", "", "caf\u00e9", "\u65e5\u672c", "x  ")] * 40
    completions = [draw.choices(range(len(tokenizer)), k=draw.randrange(9)) for _ in prompts]  # also broken UTF-8
    alone = [tokenizer.decode(row, skip_special_tokens=True) for row in completions]
    assert decode_completions(tokenizer, prompts, completions) == alone
    assert sum("\ufffd" in text for text in alone) > 20
    tokenizer.eos_token = "g"  # noqa: S105 - a token that `decode` does not skip
    end = tokenizer.eos_token_id
    assert decode_completions(tokenizer, [[1, end]], [[end, end]]) == ["g"]


def test_ends_are_the_tokenizers_eos_and_what_the_model_says(tiny, tmp_path):
    tokenizer = load_tokenizer(load_recipe(tiny))
    eos = tokenizer.eos_token_id
    assert end_token_ids(tokenizer, tmp_path) == [eos]  # neither file is there
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "text_config": {"eos_token_id": [8, eos]}}))
    assert end_token_ids(tokenizer, str(tmp_path)) == [eos, 7]  # the text part's is a default where the whole says one
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [8, eos]}}))
    assert end_token_ids(tokenizer, str(tmp_path)) == [eos, 8]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8, len(tokenizer), -1, None]}))
    assert end_token_ids(tokenizer, tmp_path) == [eos, 9, 8]
    assert end_token_ids(tokenizer, "no/such-model") == [eos]  # a Hub id, and no Hub
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"config.json: cannot be read"):
        end_token_ids(tokenizer, tmp_path)


def test_a_completion_ends_at_the_first_of_the_models_ends(tiny):
    """Phi's template writes its turn's end, and after the last turn the tokenizer's eos."""
    tokenizer = load_tokenizer(load_recipe(tiny))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<s>{% endfor %}</s>"
    ask, turn, eos = [{"role": "user", "content": "a"}], tokenizer.bos_token_id, tokenizer.eos_token_id
    words = tokenizer("the film", add_special_tokens=False)["input_ids"]
    assert encode_pair(tokenizer, ask, "the film")[1] == [*words, turn, eos]
    assert encode_pair(tokenizer, ask, "the film", [eos, turn])[1] == [*words, turn]
    rows = Dataset.from_list([{"prompt": ask, "chosen": "the film", "rejected": "the"}])
    assert tokenize_pairs(rows, tokenizer, False, [eos, turn])[0]["chosen_ids"][-len(words) :] == words
    assert encode_pair(tokenizer, "a", "the film<s>", [eos, turn])[1] == [*words, turn]  # text has its end already


def test_a_backbone_without_bos_writes_texts_without_prompts(roles, tiny):
    tokenizer = roles.tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    special = {"eos_token": "</s>", "pad_token": "<pad>"}
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, padding_side="left", **special)
    assert without("")["input_ids"] == []
    [row] = sample_texts(roles.policy, without, roles.sampler, types.ModuleType("task"), samples=2, seed=0)
    assert row["prompt"] == ""
    assert row["completion"]


def test_the_recipe_names_the_end(tiny):
    overrides = {"model.eos_token": "great", "evaluate.prompts": 8}
    with pytest.raises(RecipeError, match=r"`model.eos_token` '<s/>': not in the vocabulary of .*did you mean `</?s>`"):
        load_tokenizer(load_recipe(tiny, {"model.eos_token": "<s/>"}))
    tokenizer = load_tokenizer(load_recipe(tiny))
    word = next(word for word in tokenizer.get_vocab() if len(word) > 3 and word.isalpha())
    renamed = load_tokenizer(load_recipe(tiny, overrides | {"model.eos_token": word}))
    assert renamed.eos_token_id == tokenizer.get_vocab()[word]
    with pytest.raises(RecipeError, match=r"the pad token '<pad>' and the eos token '<pad>'; pad must exist and differ"):
        check(load_recipe(tiny, {"model.eos_token": "<pad>"}), "ppo")


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_tokenizer_trained_here_is_the_one_that_is_read_back(model_type, tmp_path):
    texts = [f"question {i}: yes, of course" for i in range(32)]
    made = train_readable_tokenizer(texts, 300, model_type)
    assert len(made) <= 300
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(made)
    assert [again(text)["input_ids"] for text in texts] == [made(text)["input_ids"] for text in texts]
    assert made.decode(made(texts[3])["input_ids"], skip_special_tokens=True) == texts[3]
    assert len({made.pad_token_id, made.bos_token_id, made.eos_token_id}) == 3


def test_padding_of_given_rows_is_not_learned(tiny):
    tokenizer = load_tokenizer(load_recipe(tiny))
    rows = [{"input_ids": [0, 0, 1, 70, 0, 2], "attention_mask": [0, 0, 1, 1, 1, 1], "labels": [-100, -100, -100, 70, 0, 2]}]
    [row] = tokenize_demonstrations(Dataset.from_list(rows), tokenizer)
    assert row == {"input_ids": [1, 70, 0, 2], "labels": [-100, 70, 0, 2]}
