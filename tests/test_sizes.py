"""The memory estimate: sizes by every family's names, lengths that are known, and what autograd really keeps."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf_recipes.checks import files, machine, memory
from rlhf_recipes.checks.sizes import Sizes, sizes_of
from rlhf_recipes.models.adapters import load_with_new_adapter
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import DEFAULT_RECIPE, load_recipe

FAMILIES = (
    "gpt2", "gpt_neo", "gptj", "codegen", "gpt_neox", "gpt_bigcode", "opt", "xglm", "bloom", "mpt", "falcon", "phi", "phi3",
    "stablelm", "olmo2", "llama", "smollm3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "olmoe",
    "gpt_oss", "glm4", "exaone4", "starcoder2", "lfm2", "gemma", "gemma2", "gemma3_text", "gemma3", "cohere", "granite",
    "modernbert-decoder", "biogpt", "seed_oss", "falcon_h1", "ctrl", "openai-gpt", "dbrx", "jais2", "nemotron",
)  # fmt: skip


@pytest.mark.parametrize("kind", [name for name in FAMILIES if name in CONFIG_MAPPING])
def test_sizes_are_those_of_transformers_own_config(kind):
    config = CONFIG_MAPPING[kind]()
    written, known = config.to_dict(), config.get_text_config()
    sizes = sizes_of(written)
    assert (sizes.hidden, sizes.layers, sizes.heads, sizes.vocabulary) == (
        known.hidden_size, known.num_hidden_layers, known.num_attention_heads, known.vocab_size
    )  # fmt: skip
    positions = getattr(known, "max_position_embeddings", getattr(known, "max_seq_len", None))
    assert sizes.positions == positions


def test_what_a_config_does_not_say_has_a_default():
    assert sizes_of({}) == Sizes(inner=4 * 768)
    assert sizes_of({"hidden_size": "x", "n_head": True, "num_attention_heads": 0, "n_positions": None}) == Sizes(inner=4 * 768)
    assert (
        sizes_of({"hidden_size": 64, "num_attention_heads": 4, "moe_intermediate_size": 10, "num_experts_per_tok": 3}).inner
        == 30
    )


@pytest.mark.parametrize(
    "config",
    [
        {"n_positions": 64},
        {"max_seq_len": 64},
        {"max_position_embeddings": 64},
        {"model_type": "gemma3", "text_config": {"max_position_embeddings": 64}},
    ],
)
def test_lengths_beyond_what_a_model_reads_are_refused_before_the_run(config, tiny, monkeypatch):
    monkeypatch.setattr(files, "local_json", lambda recipe, name: config if name == "config.json" else {})
    with pytest.raises(RecipeError, match="exceed the 64 tokens that"):
        machine.check(load_recipe(tiny, {"data.max_prompt_tokens": 60}), "ppo")
    machine.check(load_recipe(tiny, {"data.max_prompt_tokens": 58}), "ppo")


def kept_by_autograd(model, **inputs):
    """Bytes of what a forward pass saves for the backward one, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, else another takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_activations_are_what_autograd_keeps(attention):
    recipe = load_recipe(DEFAULT_RECIPE, {"model.attention": attention, "reward_training.per_device_train_batch_size": 4})
    model = load_with_new_adapter(recipe.model, recipe.path(recipe.model.path), recipe.lora, "SEQ_CLS").train()
    model.config.pad_token_id = 0
    ids = torch.randint(3, 6000, (8, 96))
    estimate = memory.memory_estimate(recipe, "reward", longest=96)
    assert estimate["activations"] == pytest.approx(kept_by_autograd(model, input_ids=ids), rel=0.15)
    weights = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name and "score" not in name)
    assert estimate["backbone, once for all roles"] == pytest.approx(4 * weights, rel=0.01)
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
    assert estimate["trained adapters with optimizer"] == 16 * adapters


# Peak resident memory of short runs with one thread on an AMD EPYC, in MiB: sft 6 steps, reward 12 (its longest pairs first, of
# 284 tokens), ppo 256 episodes, dpo 256 prompts and 8 steps, evaluate 64 prompts with 16 completions of the reference.
PEAKS = {"sft": 1282, "reward": 3880, "ppo": 1079, "dpo": 1343, "evaluate": 845}


@pytest.mark.parametrize("stage", PEAKS)
def test_the_estimates_of_imdb_are_near_what_was_measured(stage):
    estimate = memory.memory_estimate(load_recipe(DEFAULT_RECIPE), stage, longest=284, cpu=True)
    assert sum(estimate.values()) / 2**20 == pytest.approx(PEAKS[stage], rel=0.25)


def test_the_datas_lengths_count_and_not_the_longest_allowed():
    recipe = load_recipe(DEFAULT_RECIPE)
    unknown, long, short = (
        memory.memory_estimate(recipe, "reward", longest=longest, cpu=True)["activations"] for longest in (None, 2000, 60)
    )
    assert unknown == long  # both at max_length
    assert short < unknown / 17
    assert machine.warnings(recipe, "reward") == []  # nothing is known yet; the stage warns when it has the rows
    assert AutoConfig.for_model("llama").num_hidden_layers == sizes_of(AutoConfig.for_model("llama").to_dict()).layers
