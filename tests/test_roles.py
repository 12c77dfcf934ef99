"""Four roles on one backbone: what is shared, what is frozen, what is restored."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from rlhf_recipes.data import load_tokenizer
from rlhf_recipes.recipe import RecipeError, load_recipe
from rlhf_recipes.roles import ValueAdapter, build_roles, load_backbone, load_rewards, merged_adapters
from rlhf_recipes.sampling import model_inputs, response_forward, response_mask, sample_completions


def batch(tokenizer, texts=("the film was", "plot", "the great superb fine film")):
    return tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"]


def base_tensors(model):
    """name -> tensor of every frozen base weight, by its name in the bare trunk."""
    tensors = {}
    for name, p in model.named_parameters():
        if "lora_" not in name and "layers." in name:
            tensors["layers." + name.split("layers.", 1)[1].replace(".base_layer", "")] = p
    return tensors


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_base_weights_are_in_memory_once(tiny, value):
    recipe = load_recipe(tiny)
    roles = build_roles(recipe, load_tokenizer(recipe), value=value)
    policy = base_tensors(roles.policy)
    others = [roles.reward] + ([roles.value] if value == "adapter" else [])
    assert len(policy) == 18
    for other in others:
        tensors = base_tensors(other)
        assert tensors.keys() == policy.keys()
        for name, tensor in tensors.items():
            assert tensor.untyped_storage().data_ptr() == policy[name].untyped_storage().data_ptr(), name
    assert not list(roles.reference.parameters())
    assert isinstance(roles.value, ValueAdapter) == (value == "adapter")


def test_adapters_off_equals_the_backbone_exactly(tiny, roles):
    inputs = model_inputs(batch(roles.tokenizer), roles.tokenizer.pad_token_id)
    backbone = load_backbone(load_recipe(tiny))
    assert torch.equal(roles.reference(**inputs).logits, backbone(**inputs).logits)
    assert not torch.allclose(roles.policy(**inputs).logits, backbone(**inputs).logits)


def test_a_new_policy_is_the_reference(tiny):
    recipe = load_recipe(tiny)
    roles = build_roles(recipe, load_tokenizer(recipe))
    inputs = model_inputs(batch(roles.tokenizer), roles.tokenizer.pad_token_id)
    assert torch.equal(roles.policy(**inputs).logits, roles.reference(**inputs).logits)


def test_merged_adapters_speak_as_the_policy_and_leave_no_trace(roles):
    layers = [m.get_base_layer().weight for m in roles.policy.modules() if isinstance(m, LoraLayer)]
    before = [(w.data_ptr(), w.detach().clone()) for w in layers]
    inputs = model_inputs(batch(roles.tokenizer), roles.tokenizer.pad_token_id)
    policy, reward = roles.policy(**inputs).logits, roles.reward.adapter(batch(roles.tokenizer))
    with merged_adapters(roles.policy):
        torch.testing.assert_close(roles.policy(**inputs).logits, policy, atol=1e-5, rtol=1e-5)
        assert torch.equal(roles.reward.adapter(batch(roles.tokenizer)), reward)  # shares the weights, must not see the merge
    for (pointer, value), weight in zip(before, layers, strict=True):
        assert weight.data_ptr() == pointer
        assert torch.equal(weight, value)
    assert torch.equal(roles.policy(**inputs).logits, policy)


def test_merge_is_undone_when_generation_fails(roles):
    weight = next(m.get_base_layer().weight for m in roles.policy.modules() if isinstance(m, LoraLayer))
    before = weight.data_ptr()

    def fail():
        with merged_adapters(roles.policy):
            assert weight.data_ptr() != before
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert weight.data_ptr() == before


def test_reward_adapter_of_another_backbone_is_refused(tiny):
    recipe = load_recipe(tiny, {"reward.adapter": str(tiny)})
    with pytest.raises(RecipeError, match="does not fit"):
        load_rewards(recipe, load_backbone(recipe), load_tokenizer(recipe))


# --- the reward --------------------------------------------------------------------------------------------------


def test_reward_does_not_depend_on_padding_side_or_amount(roles):
    pad = roles.tokenizer.pad_token_id
    for text in ("the film was great", "plot", ""):
        ids = roles.tokenizer(text)["input_ids"]
        plain = roles.reward.adapter(torch.tensor([ids]))
        for left, right in ((3, 0), (0, 3), (2, 7)):
            padded = torch.tensor([[pad] * left + ids + [pad] * right])
            torch.testing.assert_close(roles.reward.adapter(padded), plain, atol=1e-6, rtol=1e-5)


def test_prefix_scores_are_the_rewards_of_the_prefixes(roles):
    pad, eos = roles.tokenizer.pad_token_id, roles.tokenizer.eos_token_id
    ids = [pad, pad, *roles.tokenizer("the film was great")["input_ids"], eos, pad]
    scores = roles.reward.adapter.prefix_scores(torch.tensor([ids]))[0]
    for end in range(3, len(ids) + 1):  # eos and the pads after it change nothing: this reward model does not read eos
        torch.testing.assert_close(scores[end - 1], roles.reward.adapter(torch.tensor([ids[:end]]))[0], atol=1e-6, rtol=1e-5)
    assert scores[2:-2].unique().numel() == len(ids) - 4


def test_reward_ignores_eos_unless_it_was_trained_to_read_it(tiny, roles):
    ids = roles.tokenizer("the film was great")["input_ids"]
    ended = torch.tensor([[*ids, roles.tokenizer.eos_token_id]])
    open_ended = roles.reward.adapter(torch.tensor([ids]))
    torch.testing.assert_close(roles.reward.adapter(ended), open_ended, atol=1e-6, rtol=1e-5)
    reading = load_recipe(tiny, {"reward.read_eos": True})
    reward = load_rewards(reading, load_backbone(reading), roles.tokenizer).adapter
    assert not torch.allclose(reward(ended), open_ended)


def test_reward_of_nothing_but_padding_is_finite(roles):
    assert roles.reward.adapter(torch.full((1, 4), roles.tokenizer.pad_token_id)).isfinite().all()


# --- sampling ----------------------------------------------------------------------------------------------------


def test_response_forward_is_the_plain_log_softmax(roles):
    pad = roles.tokenizer.pad_token_id
    queries = batch(roles.tokenizer)
    torch.manual_seed(0)
    sequences, sampling_logprobs = sample_completions(roles.policy, queries, roles.tokenizer, 5, temperature=0.7)
    assert sequences.shape == (3, queries.shape[1] + 5)
    output = response_forward(roles.policy, sequences, queries.shape[1], pad, temperature=0.7)
    logits = roles.policy(**model_inputs(sequences, pad)).logits[:, queries.shape[1] - 1 : -1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, sequences[:, queries.shape[1] :, None]).squeeze(-1)
    torch.testing.assert_close(output.logprobs, expected, atol=1e-6, rtol=1e-5)
    kept = response_mask(sequences[:, queries.shape[1] :], pad)
    torch.testing.assert_close(sampling_logprobs[kept], expected[kept], atol=1e-5, rtol=1e-5)
    assert not sampling_logprobs[~kept].any()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(output.entropy, entropy, atol=1e-5, rtol=1e-5)


def test_full_kl_is_the_sum_over_the_vocabulary(roles):
    pad = roles.tokenizer.pad_token_id
    ids = torch.tensor([roles.tokenizer("the film was great")["input_ids"]])
    reference = response_forward(roles.reference, ids, 2, pad, 0.9)
    assert reference.kl is None
    log_pi, log_ref = (
        (model(input_ids=ids).logits[:, 1:-1] / 0.9).log_softmax(-1) for model in (roles.policy, roles.reference)
    )
    expected = torch.nn.functional.kl_div(log_ref, log_pi, log_target=True, reduction="none").sum(-1)
    assert expected.min() > 1e-4
    kl = response_forward(roles.policy, ids, 2, pad, 0.9, reference.hidden).kl
    torch.testing.assert_close(kl, expected, atol=1e-6, rtol=1e-4)


def test_logprobs_do_not_depend_on_left_padding(roles):
    pad = roles.tokenizer.pad_token_id
    ids = torch.tensor([roles.tokenizer("the film was great")["input_ids"]])
    context = ids.shape[1] - 4
    plain = response_forward(roles.policy, ids, context, pad, 1.0).logprobs
    padded = torch.cat([torch.full((1, 5), pad), ids], 1)
    shifted = response_forward(roles.policy, padded, context + 5, pad, 1.0).logprobs
    torch.testing.assert_close(shifted, plain, atol=1e-6, rtol=1e-5)


def test_samples_follow_the_model(tiny, roles):
    """4,000 first tokens against the exact distribution: total variation within what sampling allows."""
    query = torch.tensor([roles.tokenizer("the film")["input_ids"]])
    torch.manual_seed(0)
    tokens = sample_completions(roles.policy, query.repeat(4000, 1), roles.tokenizer, 1, temperature=1.0)[0][:, -1]
    exact = roles.policy(query).logits[0, -1].softmax(-1)
    seen = torch.bincount(tokens, minlength=len(exact)) / len(tokens)
    expected_gap = (exact * (1 - exact) / len(tokens)).sqrt().sum() * 0.8 / 2  # E|binomial - mean| is 0.8 deviations
    assert 0.5 * (seen - exact).abs().sum() < 1.3 * expected_gap


def test_gradient_checkpointing_does_not_change_what_is_sampled(roles):
    """transformers drops the cache of a training model with checkpointing: every token would see only itself."""
    queries = batch(roles.tokenizer)

    def sampled():
        torch.manual_seed(0)
        return sample_completions(roles.policy, queries, roles.tokenizer, 8, temperature=1.0)[0]

    expected = sampled()
    roles.policy.train()
    roles.policy.gradient_checkpointing_enable()
    assert torch.equal(sampled(), expected)
    assert roles.policy.training


def test_half_precision_policies_are_sampled_unmerged(tiny):
    """W + BA rounded to bfloat16 loses a small BA, so W stays as it is while the policy speaks."""
    recipe = load_recipe(tiny, {"model.dtype": "bfloat16"})
    roles = build_roles(recipe, load_tokenizer(recipe))
    layers = [m for m in roles.policy.modules() if isinstance(m, LoraLayer)]
    assert all(p.dtype == torch.float32 for m in layers for n, p in m.named_parameters() if "lora_" in n)
    pointers = []
    layers[0].register_forward_hook(lambda module, args, output: pointers.append(module.get_base_layer().weight.data_ptr()))
    sample_completions(roles.policy, batch(roles.tokenizer), roles.tokenizer, 3, temperature=1.0)
    assert set(pointers) == {layers[0].get_base_layer().weight.data_ptr()}


def test_a_backbone_that_caps_its_logits_is_refused(tiny, tmp_path):
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "capped")
    config = AutoConfig.for_model(
        "gemma2", vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, initializer_range=3.0, final_logit_softcapping=5.0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "capped/checkpoints/backbone")
    with pytest.raises(RecipeError, match="changes its logits after the output embedding"):
        load_backbone(load_recipe(tmp_path / "capped"))
