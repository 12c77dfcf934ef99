"""PEFT's own fields in `lora`: each works in every role or is refused with the reason; and adapters made elsewhere."""

import dataclasses
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_recipes.checks.models import moved, path_gaps
from rlhf_recipes.checks.saved import read_back_policy
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.evaluation.judged import judged_policy
from rlhf_recipes.models.adapters import load_policy_adapter
from rlhf_recipes.models.backbone import shared_copy
from rlhf_recipes.models.reference import Reference
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.keys import LORA_REFUSED
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.sections import LoraSection
from rlhf_recipes.roles import build_roles
from rlhf_recipes.rollouts.forward import response_forward
from rlhf_recipes.rollouts.lean import LeanSampler
from rlhf_recipes.tasks import load_dataset, load_task

TAKEN = {
    "r": {"r": 2},
    "alpha": {"alpha": 3.0},
    "dropout": {"dropout": 0.5},
    "target_modules": {"target_modules": ["q_proj", "v_proj"]},
    "exclude_modules": {"exclude_modules": "model.layers.0.*"},
    "target_parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "rank_pattern": {"rank_pattern": {"q_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 1.0}},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 6, 70]},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
}


def ready(tiny, values):
    recipe = load_recipe(tiny, {f"lora.{key}": value for key, value in values.items()})
    tokenizer = load_tokenizer(recipe)
    prompts = tokenize_prompts(load_dataset(load_task(recipe), "load_prompts", "train"), tokenizer, 24, limit=10)
    return recipe, build_roles(recipe, tokenizer, value="adapter"), prompts


def test_every_field_of_peft_is_taken_or_refused():
    ours = set(LoraSection.model_fields)
    assert ours == TAKEN.keys()
    theirs = {field.name for field in dataclasses.fields(LoraConfig)}
    assert theirs == (ours - {"alpha", "dropout"}) | {"lora_alpha", "lora_dropout"} | (LORA_REFUSED.keys() & theirs)


@pytest.mark.parametrize("field", TAKEN)
def test_a_field_that_is_taken_works_in_every_role(field, tiny, tmp_path):
    recipe, roles, prompts = ready(tiny, TAKEN[field])
    [config] = roles.policy.peft_config.values()
    if field not in ("alpha", "dropout"):  # the second only while sft and rewards train
        plain = LoraConfig()
        assert getattr(config, field) != getattr(plain, field)
    gaps = path_gaps(roles, prompts, recipe.lora, recipe.run.seed)
    assert max(gap.max().item() for gap in gaps.values()) < 1e-5
    ids = torch.tensor([prompts[0]["input_ids"]])
    assert torch.equal(roles.policy(input_ids=ids).logits, roles.backbone(input_ids=ids).logits)  # it starts as the reference
    with moved(roles.policy):
        assert not torch.allclose(roles.policy(input_ids=ids).logits, roles.backbone(input_ids=ids).logits)
        assert torch.equal(roles.reference(input_ids=ids).logits, roles.backbone(input_ids=ids).logits)
        roles.policy.save_pretrained(tmp_path, save_embedding_layers=False)
        read_back_policy(tmp_path, roles, prompts)
        with judged_policy(tmp_path, roles, recipe.model) as judged:
            torch.testing.assert_close(judged(input_ids=ids).logits, roles.policy(input_ids=ids).logits)
    trained = [name for name, p in roles.policy.named_parameters() if p.requires_grad]
    roles.policy(input_ids=ids).logits.square().sum().backward()
    assert all(p.grad is not None for name, p in roles.policy.named_parameters() if name in trained)
    assert all(p.grad is None for p in roles.backbone.parameters())


@pytest.mark.parametrize("field", LORA_REFUSED)
def test_a_field_that_is_refused_says_why(field, tiny):
    with pytest.raises(RecipeError, match=f"`lora.{field}` is not taken: .{{10}}"):
        load_recipe(tiny, {f"lora.{field}": True})


# --- adapters made elsewhere -------------------------------------------------------------------------------------

ELSEWHERE = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "rsLoRA with patterns": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "whole modules": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "output embedding": {"target_modules": ["lm_head", "q_proj"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "PiSSA": {"target_modules": "all-linear", "init_lora_weights": "pissa"},
    "a bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "a parameter": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 6, 7]}},
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_policy_made_elsewhere_is_judged_as_plain_peft_has_it(kind, tiny, tmp_path):
    """Sampled and scored as transformers and PEFT give it, and nobody else's weights change."""
    recipe, roles, prompts = ready(tiny, {})
    load = lambda: AutoModelForCausalLM.from_pretrained(tiny / "checkpoints" / "backbone")  # noqa: E731
    torch.manual_seed(1)
    made = get_peft_model(load(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **ELSEWHERE[kind]))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(), tmp_path).eval()
    before = {name: tensor.clone() for name, tensor in roles.backbone.state_dict().items()}
    ids = torch.tensor([prompts[3]["input_ids"]])
    queries = ids.repeat(64, 1)
    with judged_policy(tmp_path, roles, recipe.model) as judged, torch.no_grad():
        torch.manual_seed(0)
        sampled = roles.sampler(judged, queries, torch.ones_like(queries))
        scored = response_forward(judged, sampled.sequences, sampled.attention, ids.shape[1], 1.0)
        mask = sampled.attention[:, ids.shape[1] :]
        logits = plain(input_ids=sampled.sequences).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, sampled.sequences[:, ids.shape[1] :, None]).squeeze(-1)
        torch.testing.assert_close(sampled.logprobs[mask], expected[mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scored.logprobs[mask], expected[mask], atol=1e-5, rtol=1e-5)
    base = roles.backbone(input_ids=ids).logits
    assert (plain(input_ids=ids).logits - base).abs().max() > 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in roles.backbone.state_dict().items())


def test_embeddings_that_were_saved_with_an_adapter_are_its_own(tiny, tmp_path):
    """PEFT's `save_embedding_layers`, as where the embedding was resized: loaded in place they would change every role."""
    _, roles, prompts = ready(tiny, {})
    made = AutoModelForCausalLM.from_pretrained(tiny / "checkpoints" / "backbone")
    with torch.no_grad():
        made.get_input_embeddings().weight += 0.5
    made = get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made.save_pretrained(tmp_path / "policy", save_embedding_layers=True)
    ids = torch.tensor([prompts[3]["input_ids"]])
    before = roles.backbone(input_ids=ids).logits
    judged = load_policy_adapter(roles.backbone, tmp_path / "policy")
    torch.testing.assert_close(judged(input_ids=ids).logits, made.eval()(input_ids=ids).logits)
    assert (judged(input_ids=ids).logits - before).abs().max() > 0.1
    assert torch.equal(roles.backbone(input_ids=ids).logits, before)

    shutil.copytree(tiny / "checkpoints" / "reward", tmp_path / "reward")
    file = tmp_path / "reward" / "adapter_model.safetensors"
    embedding = {"base_model.model.model.embed_tokens.weight": torch.ones_like(made.get_input_embeddings().weight)}
    save_file(load_file(file) | embedding, file)
    with pytest.raises(RecipeError, match="it holds weights of the backbone's own"):
        build_roles(load_recipe(tiny, {"reward.adapter": str(tmp_path / "reward")}), roles.tokenizer)


def test_what_is_no_lora_is_refused(tiny, tmp_path):
    from peft import IA3Config

    _, roles, _ = ready(tiny, {})
    model = AutoModelForCausalLM.from_pretrained(tiny / "checkpoints" / "backbone")
    get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="an adapter of the type IA3; policies here are LoRA adapters"):
        load_policy_adapter(roles.backbone, tmp_path)
    activated = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    model = AutoModelForCausalLM.from_pretrained(tiny / "checkpoints" / "backbone")
    get_peft_model(model, activated).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="an activated LoRA, which adapts a part of each text"):
        load_policy_adapter(roles.backbone, tmp_path)


# --- dropout -----------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A layer with dropout as a function, which `disable_dropout_in_model` does not see."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


def test_training_mode_never_reaches_the_backbone_but_the_adapters_dropout(tiny):
    recipe = load_recipe(tiny)
    roles = build_roles(recipe, load_tokenizer(recipe))
    for model in (roles.policy, shared_copy(roles.policy)):
        names = {module: name for name, module in model.named_modules()}
        model.train()
        adapters = {
            part for layer in model.modules() if isinstance(layer, LoraLayer) for part in (layer, *layer.lora_dropout.modules())
        }
        trained = {module for module in model.get_base_model().modules() if module.training}
        assert adapters <= trained
        assert all("lora_" in names[module] for module in trained - adapters)
        assert model.training
        assert not Reference(model)._policy[0].get_base_model().training
    layer = roles.policy.get_base_model().model.layers[0].mlp
    layer.act_fn = nn.Sequential(layer.act_fn, Noisy().eval())
    ids = torch.arange(5, 15).unsqueeze(0)
    roles.policy.train()
    assert torch.equal(roles.policy(input_ids=ids).logits, roles.policy(input_ids=ids).logits)
    roles.policy.gradient_checkpointing_enable({"use_reentrant": False})
    roles.policy.enable_input_require_grads()
    roles.policy.train()
    assert roles.policy.get_base_model().model.layers[0].training  # where transformers looks for it
    once, twice = (roles.policy(input_ids=ids).logits for _ in range(2))
    assert torch.equal(once, twice)
    once.sum().backward()  # runs the layers again


def test_a_policy_that_is_sampled_otherwise_than_it_speaks_is_refused(tiny, monkeypatch):
    from rlhf_recipes.checks import models

    _, roles, prompts = ready(tiny, {})
    models.examine_judged("mine", roles.policy, roles, prompts)
    with moved(roles.policy):
        models.examine_judged("mine", roles.policy, roles, prompts)
        sampled = LeanSampler.__call__
        monkeypatch.setattr(LeanSampler, "__call__", lambda self, policy, *rest: sampled(self, roles.reference, *rest))
        with pytest.raises(RecipeError, match=r"mine: log-probabilities as it is sampled are .* nats a token from"):
            models.examine_judged("mine", roles.policy, roles, prompts)
