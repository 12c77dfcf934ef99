"""Four roles on one backbone: what is shared, what is frozen, what is restored."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.models.adapters import merged_adapters
from rlhf_recipes.models.backbone import load_backbone
from rlhf_recipes.models.value import ValueAdapter
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.roles import build_roles
from rlhf_recipes.rollouts.forward import model_inputs, response_forward
from rlhf_recipes.rollouts.lean import LeanSampler
from rlhf_recipes.rollouts.samples import Samples


def batch(tokenizer, texts=("the film was", "plot", "the great superb fine film")):
    """Token ids padded on the left, and which of them are tokens."""
    padded = tokenizer(list(texts), padding=True, return_tensors="pt")
    return padded["input_ids"], padded["attention_mask"].bool()


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
    inputs = model_inputs(*batch(roles.tokenizer))
    recipe = load_recipe(tiny)
    backbone = load_backbone(recipe.model, recipe.path(recipe.model.path))
    assert torch.equal(roles.reference(**inputs).logits, backbone(**inputs).logits)
    assert not torch.allclose(roles.policy(**inputs).logits, backbone(**inputs).logits)


def test_a_new_policy_is_the_reference(tiny):
    recipe = load_recipe(tiny)
    roles = build_roles(recipe, load_tokenizer(recipe))
    inputs = model_inputs(*batch(roles.tokenizer))
    assert torch.equal(roles.policy(**inputs).logits, roles.reference(**inputs).logits)


def test_merged_adapters_speak_as_the_policy_and_leave_no_trace(roles):
    layers = [m.get_base_layer().weight for m in roles.policy.modules() if isinstance(m, LoraLayer)]
    before = [(w.data_ptr(), w.detach().clone()) for w in layers]
    inputs = model_inputs(*batch(roles.tokenizer))
    policy, reward = roles.policy(**inputs).logits, roles.reward.adapter(*batch(roles.tokenizer))
    with merged_adapters(roles.policy):
        torch.testing.assert_close(roles.policy(**inputs).logits, policy, atol=1e-5, rtol=1e-5)
        assert torch.equal(roles.reward.adapter(*batch(roles.tokenizer)), reward)  # shares the weights, must not see the merge
    for (pointer, value), weight in zip(before, layers, strict=True):
        assert weight.data_ptr() == pointer
        assert torch.equal(weight, value)
    assert torch.equal(roles.policy(**inputs).logits, policy)


def test_merge_is_undone_when_generation_fails(roles):
    layer = next(m for m in roles.policy.modules() if isinstance(m, LoraLayer)).get_base_layer()
    before = layer.weight.data_ptr()

    def fail():
        with merged_adapters(roles.policy):
            assert layer.weight.data_ptr() != before
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert layer.weight.data_ptr() == before


def test_reward_adapter_of_another_backbone_is_refused(tiny):
    recipe = load_recipe(tiny, {"reward.adapter": str(tiny)})
    with pytest.raises(RecipeError, match="does not fit"):
        build_roles(recipe, load_tokenizer(recipe))


# --- the reward --------------------------------------------------------------------------------------------------


def test_reward_does_not_depend_on_padding_side_or_amount(roles):
    pad = roles.tokenizer.pad_token_id
    for text in ("the film was great", "plot", ""):
        ids = roles.tokenizer(text)["input_ids"]
        plain = roles.reward.adapter(torch.tensor([ids]))
        for left, right in ((3, 0), (0, 3), (2, 7)):
            padded = torch.tensor([[pad] * left + ids + [pad] * right])
            attention = torch.tensor([[0] * left + [1] * len(ids) + [0] * right])
            torch.testing.assert_close(roles.reward.adapter(padded, attention), plain, atol=1e-6, rtol=1e-5)


def test_prefix_scores_are_the_rewards_of_the_prefixes(roles):
    pad, eos = roles.tokenizer.pad_token_id, roles.tokenizer.eos_token_id
    ids = [pad, pad, *roles.tokenizer("the film was great")["input_ids"], eos, pad]
    attention = torch.tensor([[token != pad for token in ids]])
    scores = roles.reward.adapter.prefix_scores(torch.tensor([ids]), attention)[0]
    for end in range(3, len(ids) + 1):  # eos and the pads after it change nothing: this reward model does not read eos
        alone = roles.reward.adapter(torch.tensor([ids[:end]]), attention[:, :end])[0]
        torch.testing.assert_close(scores[end - 1], alone, atol=1e-6, rtol=1e-5)
    assert scores[2:-2].unique().numel() == len(ids) - 4


def test_reward_ignores_eos_unless_it_was_trained_to_read_it(tiny, roles):
    ids = roles.tokenizer("the film was great")["input_ids"]
    ended = torch.tensor([[*ids, roles.tokenizer.eos_token_id]])
    open_ended = roles.reward.adapter(torch.tensor([ids]))
    torch.testing.assert_close(roles.reward.adapter(ended), open_ended, atol=1e-6, rtol=1e-5)
    reading = load_recipe(tiny, {"reward.read_eos": True})
    reward = build_roles(reading, roles.tokenizer).reward.adapter
    assert not torch.allclose(reward(ended), open_ended)


def test_reward_of_nothing_but_padding_is_finite(roles):
    assert roles.reward.adapter(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4)).isfinite().all()


# --- sampling ----------------------------------------------------------------------------------------------------


def test_response_forward_is_the_plain_log_softmax(roles):
    queries, attention = batch(roles.tokenizer)
    context = queries.shape[1]
    torch.manual_seed(0)
    sampled = LeanSampler(roles.sampler.ends, 5, 0.7)(roles.policy, queries, attention)
    sequences = sampled.sequences
    assert sequences.shape == (3, context + 5)
    assert torch.equal(sampled.attention[:, :context], attention)
    output = response_forward(roles.policy, sequences, sampled.attention, context, temperature=0.7)
    logits = roles.policy(**model_inputs(sequences, sampled.attention)).logits[:, context - 1 : -1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, sequences[:, context:, None]).squeeze(-1)
    torch.testing.assert_close(output.logprobs, expected, atol=1e-6, rtol=1e-5)
    kept = sampled.attention[:, context:]
    torch.testing.assert_close(sampled.logprobs[kept], expected[kept], atol=1e-5, rtol=1e-5)
    assert not sampled.logprobs[~kept].any()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(output.entropy, entropy, atol=1e-5, rtol=1e-5)


def test_full_kl_is_the_sum_over_the_vocabulary(roles):
    ids = torch.tensor([roles.tokenizer("the film was great")["input_ids"]])
    attention = torch.ones_like(ids)
    reference = response_forward(roles.reference, ids, attention, 2, 0.9)
    assert reference.kl is None
    log_pi, log_ref = (
        (model(input_ids=ids).logits[:, 1:-1] / 0.9).log_softmax(-1) for model in (roles.policy, roles.reference)
    )
    expected = torch.nn.functional.kl_div(log_ref, log_pi, log_target=True, reduction="none").sum(-1)
    assert expected.min() > 1e-4
    kl = response_forward(roles.policy, ids, attention, 2, 0.9, reference.hidden).kl
    torch.testing.assert_close(kl, expected, atol=1e-6, rtol=1e-4)


def test_logprobs_do_not_depend_on_left_padding(roles):
    pad = roles.tokenizer.pad_token_id
    ids = torch.tensor([roles.tokenizer("the film was great")["input_ids"]])
    context, attention = ids.shape[1] - 4, torch.ones_like(ids)
    plain = response_forward(roles.policy, ids, attention, context, 1.0).logprobs
    padded = torch.cat([torch.full((1, 5), pad), ids], 1)
    attention = torch.cat([torch.zeros(1, 5), attention], 1)
    shifted = response_forward(roles.policy, padded, attention, context + 5, 1.0).logprobs
    torch.testing.assert_close(shifted, plain, atol=1e-6, rtol=1e-5)


def test_samples_follow_the_model(tiny, roles):
    """4,000 first tokens against the exact distribution: total variation within what sampling allows."""
    query = torch.tensor([roles.tokenizer("the film")["input_ids"]])
    queries = query.repeat(4000, 1)
    torch.manual_seed(0)
    sampled = LeanSampler(roles.sampler.ends, 1, 1.0)(roles.policy, queries, torch.ones_like(queries))
    tokens = sampled.sequences[:, -1]
    exact = roles.policy(query).logits[0, -1].softmax(-1)
    seen = torch.bincount(tokens, minlength=len(exact)) / len(tokens)
    expected_gap = (exact * (1 - exact) / len(tokens)).sqrt().sum() * 0.8 / 2  # E|binomial - mean| is 0.8 deviations
    assert 0.5 * (seen - exact).abs().sum() < 1.3 * expected_gap


def test_gradient_checkpointing_does_not_change_what_is_sampled(roles):
    """transformers drops the cache of a training model with checkpointing: every token would see only itself."""

    def sampled():
        torch.manual_seed(0)
        return LeanSampler(roles.sampler.ends, 8, 1.0)(roles.policy, *batch(roles.tokenizer)).sequences

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
    LeanSampler(roles.sampler.ends, 3, 1.0)(roles.policy, *batch(roles.tokenizer))
    assert set(pointers) == {layers[0].get_base_layer().weight.data_ptr()}


def favouring(roles, token, amount=50.0):
    """The policy with one token's logit raised at every position."""
    head = roles.policy.get_output_embeddings()
    return head.register_forward_hook(lambda module, args, output: output + amount * (torch.arange(output.shape[-1]) == token))


def test_a_completion_ends_with_any_end_token(roles):
    queries, attention = batch(roles.tokenizer)
    roles.sampler.ends.tokens = (roles.tokenizer.eos_token_id, 77)
    hook = favouring(roles, 77)
    sampled = LeanSampler(roles.sampler.ends, 4, 1.0)(roles.policy, queries, attention)
    hook.remove()
    said = sampled.sequences[:, queries.shape[1] :]
    assert said[:, 0].tolist() == [77] * 3
    assert sampled.ended.all()
    assert sampled.attention[:, queries.shape[1] :].sum(1).tolist() == [1] * 3


def test_the_pad_is_a_token_where_it_is_drawn_or_written(roles):
    """A text may hold it, and a model may draw it: it is read, scored and learned from like any other."""
    pad = roles.tokenizer.pad_token_id
    queries, attention = torch.tensor([[1, 70, pad, 80]]), torch.ones(1, 4)
    hook = favouring(roles, pad)
    sampled = LeanSampler(roles.sampler.ends, 3, 1.0)(roles.policy, queries, attention)
    hook.remove()
    assert sampled.sequences.tolist() == [[1, 70, pad, 80, pad, pad, pad]]
    assert sampled.attention.all()
    assert not sampled.ended.any()
    ours = response_forward(roles.policy, sampled.sequences, sampled.attention, 4, 1.0).logprobs
    logits = roles.policy(input_ids=sampled.sequences).logits[:, 3:-1].log_softmax(-1)
    torch.testing.assert_close(ours, logits[..., pad], atol=1e-6, rtol=1e-5)


def test_a_completion_ends_with_a_text_of_sampling_stop(tiny, roles):
    """Also where it takes several tokens; rewards and penalties take that for an end."""
    stopping = load_recipe(tiny, {"sampling.stop": ["xy", "."], "reward.missing_eos_penalty": 3.0, "reward.read_eos": True})
    reading = build_roles(stopping, roles.tokenizer)
    x, y, eos = *(roles.tokenizer.convert_tokens_to_ids(c) for c in "xy"), roles.tokenizer.eos_token_id
    queries, attention = torch.tensor([[1, 70, 80]] * 2), torch.ones(2, 3)
    script = iter([x, y, x, x, x])
    head = reading.policy.get_output_embeddings()
    hook = head.register_forward_hook(lambda m, a, output: output + 50.0 * (torch.arange(output.shape[-1]) == next(script)))
    sampled = LeanSampler(reading.sampler.ends, 5, 1.0)(reading.policy, queries, attention)
    hook.remove()
    assert sampled.sequences[:, 3:5].tolist() == [[x, y]] * 2
    assert sampled.ended.all()
    assert not sampled.attention[:, 5:].any()

    def scored(rows, kept, ended):
        ids, mask = torch.tensor(rows), torch.tensor(kept)
        return reading.reward(Samples(ids, 3, roles.tokenizer, ["a"] * len(ids), {}, mask, torch.tensor(ended)), prefix=True)

    stopped = scored([[1, 70, 80, x, y, 0]], [[1, 1, 1, 1, 1, 0]], [True])
    finished = scored([[1, 70, 80, x, y, eos]], [[1, 1, 1, 1, 1, 1]], [True])
    cut = scored([[1, 70, 80, x, y, 0]], [[1, 1, 1, 1, 1, 0]], [False])
    torch.testing.assert_close(stopped.total, finished.total)
    torch.testing.assert_close(stopped.prefix[:, :5], finished.prefix[:, :5])
    assert (stopped.total - cut.total).abs().item() > 1  # without an end, unread and penalised
    assert cut.parts["missing_eos_penalty"].tolist() == [3.0]
    assert stopped.parts["missing_eos_penalty"].tolist() == [0.0]
