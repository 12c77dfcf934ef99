"""Ends of text, special tokens, and text against token ids, on tokenizers as users bring them."""

import json

import pytest

from rlhf_recipes.data import end_token_ids, load_tokenizer
from rlhf_recipes.preflight import check
from rlhf_recipes.recipe import RecipeError, load_recipe


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
    with pytest.raises(RecipeError, match="`model.eos_token` '<s/>': not in the vocabulary of .*did you mean `</?s>`"):
        load_tokenizer(load_recipe(tiny, {"model.eos_token": "<s/>"}))
    tokenizer = load_tokenizer(load_recipe(tiny))
    word = next(word for word in tokenizer.get_vocab() if len(word) > 3 and word.isalpha())
    renamed = load_tokenizer(load_recipe(tiny, overrides | {"model.eos_token": word}))
    assert renamed.eos_token_id == tokenizer.get_vocab()[word]
    with pytest.raises(RecipeError, match="the pad token '<pad>' and the eos token '<pad>'; pad must exist and differ"):
        check(load_recipe(tiny, {"model.eos_token": "<pad>"}), "ppo")
