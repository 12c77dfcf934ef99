"""Ends of text, special tokens, and text against token ids, on tokenizers as users bring them."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_recipes.data import decode_completions, end_token_ids, load_tokenizer
from rlhf_recipes.preflight import check
from rlhf_recipes.recipe import RecipeError, load_recipe

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
    assert end_token_ids(tokenizer, str(tmp_path)) == [eos, 7, 8]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, len(tokenizer), -1, None]}))
    assert end_token_ids(tokenizer, tmp_path) == [eos, 9, 7, 8]
    assert end_token_ids(tokenizer, "no/such-model") == [eos]  # a Hub id, and no Hub
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"config.json: cannot be read"):
        end_token_ids(tokenizer, tmp_path)


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
