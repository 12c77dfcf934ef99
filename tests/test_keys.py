"""Every key that a stage accepts changes what it says, or is refused with the reason: there is no third kind.

`KEYS` has, of every key that is not refused (rlhf_recipes/recipe/keys.py), a value other than its default and what must then be
different. A field that a new TRL brings is in no table, and fails here until it is tried, or refused.
"""

import dataclasses
import importlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from rlhf_recipes.recipe import keys
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import keys_of_sections, load_recipe
from rlhf_recipes.recipe.names import ABSENT, MEANT, meant
from rlhf_recipes.recipe.sections import SECTIONS
from rlhf_recipes.recipe.stages import TRAINED
from tests.test_scripts import run

# --- how a key is observed ---------------------------------------------------------------------------------------


class AtTrainingError(Exception):
    """Carries the trainer out of a script, before or after its training."""


@dataclass
class Seen:
    """A stage as far as its training: the trainer, what the run has written, and what was counted on the way."""

    trainer: Any
    folder: Path
    layer_passes: int


@dataclass(frozen=True)
class Key:
    """`value` beside the keys `beside` makes `look` see another thing than `beside` alone.

    `along` are keys that have an effect with it alone.
    """

    value: Any
    look: Any  # Seen -> what is compared
    beside: dict[str, Any] = field(default_factory=dict)
    trained: bool = True
    along: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """`value` is refused before anything is written, in a line with these words: on this machine, or with this data."""

    value: Any
    words: str


@dataclass(frozen=True)
class Elsewhere:
    """`value` is accepted, and has its effect where this machine cannot show it."""

    value: Any
    where: str


def metrics(seen):
    return (seen.folder / "metrics.jsonl").read_text()


def files(seen):
    return sorted(path.name for path in seen.folder.iterdir())


def weights(seen):
    return [p.sum().item() for p in seen.trainer.model.parameters() if p.requires_grad]


def best(seen):
    return seen.trainer.state.best_metric, seen.trainer.state.best_global_step


def in_metrics(value, /, **beside):
    return Key(value, metrics, beside)


def in_files(value, /, **beside):
    return Key(value, files, beside)


def trained(value, look, /, **beside):
    return Key(value, look, beside)


def built(value, look, /, **beside):
    """Seen on the trainer as it is built."""
    return Key(value, look, beside, trained=False)


def loader(attribute):
    """An attribute of the DataLoader that hands out the batches."""
    return lambda seen: getattr(seen.trainer.get_train_dataloader(), attribute)


def argument(name):
    """Of the trainer's own config, where nothing more can be seen on one process without a GPU."""
    return lambda seen: getattr(seen.trainer.args, name)


def width(seen):
    batch = next(iter(seen.trainer.get_train_dataloader()))
    return batch["input_ids"].shape[1]


def rows(seen):
    return len(seen.trainer.train_dataset)


def reentrant(seen):
    """How a layer of the model recomputes its activations."""
    functions = [vars(module).get("_gradient_checkpointing_func") for module in seen.trainer.model.modules()]
    return {str(function) for function in functions if function is not None}


def verbosity(seen):
    from transformers.utils import logging

    return logging.get_verbosity()


WORKER = {"dataloader_num_workers": 1}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1}
TRAINER = {  # of transformers' Trainer, in sft, reward and dpo
    "per_device_train_batch_size": in_metrics(2),
    "num_train_epochs": in_metrics(1, max_steps=-1, per_device_train_batch_size=24),
    "max_steps": in_metrics(1),
    "learning_rate": in_metrics(0.003),
    "lr_scheduler_type": in_metrics("constant"),
    "lr_scheduler_kwargs": in_metrics({"num_cycles": 2}, lr_scheduler_type="cosine_with_restarts"),
    "warmup_steps": in_metrics(1),
    "optim": in_metrics("sgd"),
    "optim_args": in_metrics("momentum=0.9", optim="sgd", learning_rate=1.0),
    "weight_decay": in_metrics(0.9),
    "adam_beta1": in_metrics(0.5),
    "adam_beta2": in_metrics(0.5),
    "adam_epsilon": in_metrics(0.1),
    "gradient_accumulation_steps": in_metrics(2),
    "max_grad_norm": in_metrics(1e-4, optim="sgd", learning_rate=1.0),
    "tf32": built(False, argument("tf32")),  # a GPU's
    "gradient_checkpointing": trained(True, lambda seen: seen.layer_passes),
    "gradient_checkpointing_kwargs": trained({"use_reentrant": True}, reentrant, gradient_checkpointing=True),
    "torch_compile": built(True, argument("torch_compile")),  # compiling takes minutes: tried by hand, on a CPU
    "torch_compile_backend": built("eager", argument("torch_compile_backend")),
    "torch_compile_mode": built("default", argument("torch_compile_mode")),
    "neftune_noise_alpha": in_metrics(5),
    "torch_empty_cache_steps": built(1, argument("torch_empty_cache_steps")),  # a GPU's
    "logging_strategy": in_metrics("no"),
    "logging_steps": in_metrics(2),
    "logging_first_step": in_metrics(True, logging_steps=2),
    "logging_nan_inf_filter": in_metrics(False, learning_rate=1e25, max_grad_norm=0, lr_scheduler_type="constant"),
    "include_num_input_tokens_seen": in_metrics("all"),
    "log_level": built("info", verbosity),
    "log_level_replica": built("info", argument("log_level_replica")),  # of processes beside the first
    "eval_strategy": in_metrics("steps"),
    "eval_steps": in_metrics(2, **EVALUATED),
    "eval_delay": in_metrics(2, **EVALUATED),
    "eval_on_start": in_metrics(True),
    "per_device_eval_batch_size": built(3, lambda seen: seen.trainer.get_eval_dataloader().total_batch_size),
    "load_best_model_at_end": trained(True, weights, **EVALUATED, **SAVED, learning_rate=50.0),
    "metric_for_best_model": trained("mean_token_accuracy", best, **EVALUATED, **SAVED, load_best_model_at_end=True),
    "greater_is_better": trained(
        True, best, **EVALUATED, **SAVED, load_best_model_at_end=True, metric_for_best_model="loss"
    ),
    "save_strategy": in_files("no"),
    "save_steps": in_files(1),
    "save_total_limit": in_files(1, **SAVED),
    "full_determinism": built(True, lambda seen: torch.are_deterministic_algorithms_enabled()),
    "dataloader_drop_last": in_metrics(True, per_device_train_batch_size=20, num_train_epochs=1, max_steps=-1),
    "dataloader_num_workers": built(1, loader("num_workers")),
    "dataloader_pin_memory": Elsewhere(False, "with a GPU: transformers switches it off without one"),
    "dataloader_persistent_workers": built(True, loader("persistent_workers"), **WORKER),
    "dataloader_prefetch_factor": built(3, loader("prefetch_factor"), **WORKER),
    "dataloader_multiprocessing_context": built("spawn", loader("multiprocessing_context"), **WORKER),
    "dataloader_in_order": built(False, loader("in_order"), **WORKER),
    "remove_unused_columns": built(False, lambda seen: set(seen.trainer.get_train_dataloader().dataset.column_names)),
    "train_sampling_strategy": in_metrics("group_by_length"),
    **{  # of several processes
        name: built(value, argument(name))
        for name, value in {
            "average_tokens_across_devices": False, "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 5,
            "ddp_broadcast_buffers": True, "ddp_static_graph": True,
        }.items()
    },
    **{name: Refused(value, "has no effect here") for name, value in {"use_cpu": True, "ddp_backend": "gloo"}.items()},
    "activation_offloading": Refused(True, "this machine has none"),
    "use_liger_kernel": Refused(True, "needs the package liger-kernel"),
    "liger_kernel_config": Refused({"rope": True}, "needs `sft.use_liger_kernel`"),
}  # fmt: skip
SFT = TRAINER | {
    "label_smoothing_factor": in_metrics(0.3),
    "dataset_num_proc": built(1, argument("dataset_num_proc")),  # of TRL's `map`: the same rows, sooner
    "max_length": in_metrics(6),
    "truncation_mode": in_metrics("keep_end", max_length=6),
    "pad_to_multiple_of": built(64, width),
    "shuffle_dataset": in_metrics(True),
    "packing": in_metrics(True),
    "packing_strategy": in_metrics("wrapped", packing=True),
    "padding_free": built(True, width, max_length=None),
    "eval_packing": built(False, lambda seen: len(seen.trainer.eval_dataset), packing=True),
    "loss_type": in_metrics("dft"),
    "from_scratch": in_metrics(True),
    "router_aux_loss_coef": Refused(0.5, "is no mixture of experts"),  # see the test of one
    "completion_only_loss": Refused(True, "needs columns `prompt` and `completion`"),  # see the test with them
    "assistant_only_loss": Refused(True, "the dataset is not conversational"),
}
REWARD = TRAINER | {
    "train_sampling_strategy": in_metrics("group_by_length"),
    "eval_strategy": Refused("steps", "judges held-out data at its end"),
    "max_length": built(10, rows),
    "pad_to_multiple_of": built(64, width),
    "center_rewards_coefficient": in_metrics(0.5),
}
DPO = TRAINER | {
    "train_sampling_strategy": in_metrics("group_by_length"),
    "eval_strategy": Refused("steps", "judges held-out data at its end"),
    "save_strategy": in_files("steps"),
    "save_steps": in_files(1, save_strategy="steps"),
    "router_aux_loss_coef": Refused(0.5, "is no mixture of experts"),
    "max_length": in_metrics(5),
    "truncation_mode": in_metrics("keep_end", max_length=5),
    "pad_to_multiple_of": built(64, width),
    "precompute_ref_log_probs": built(False, lambda seen: seen.trainer.train_dataset.column_names),
    "precompute_ref_batch_size": built(3, argument("precompute_ref_batch_size")),  # the same numbers, in other batches
    "loss_type": in_metrics(["hinge"]),
    "loss_weights": in_metrics([0.5]),
    "ld_alpha": in_metrics(0.5),
    "f_divergence_type": in_metrics("js_divergence"),
    "f_alpha_divergence_coef": in_metrics(0.3, f_divergence_type="alpha_divergence"),
    "label_smoothing": in_metrics(0.2),
    "use_weighting": in_metrics(True),
    "discopop_tau": in_metrics(0.2, loss_type=["discopop"]),
    "rounds": trained(2, lambda seen: seen.trainer.args.rounds),  # tests/test_dpo.py runs them
}
ONLINE = {  # of our own loop
    **{name: TRAINER[name] for name in (
        "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    )},
    "optim_args": in_metrics("momentum=0.9", optim="sgd"),
    "per_device_train_batch_size": in_metrics(4),
    "gradient_accumulation_steps": in_metrics(2),
    "num_mini_batches": in_metrics(2),
    "num_ppo_epochs": in_metrics(1),
    "total_episodes": in_metrics(8),
    "num_train_epochs": in_metrics(1.0, total_episodes=None, per_device_train_batch_size=24),
    "local_rollout_forward_batch_size": in_metrics(4),  # samples in smaller batches, so others
    "max_grad_norm": in_metrics(1e-3),
    "kl_estimator": in_metrics("k3"),
    "whiten_rewards": in_metrics(True),
    "cliprange": in_metrics(1e-5),
    "cliprange_value": in_metrics(1e-5),
    "vf_coef": in_metrics(1.0),
    "gamma": in_metrics(0.5),
    "lam": in_metrics(0.3),
    "value": in_metrics("adapter"),
    "kl": in_metrics("full"),
    "reward_baseline": in_metrics(True),
    "kl_target": in_metrics(1.0),
    "kl_horizon": in_metrics(8, kl_target=1.0),
    "target_kl": in_metrics(1e-9, num_ppo_epochs=3),
    "reference": Key("sync", metrics, along={"reference_sync_steps": 1}),
    "reference_sync_steps": in_metrics(1, reference="sync"),
    "whiten_advantages": in_metrics(False),
    "eval_strategy": Key("steps", metrics, along={"eval_steps": 1}),
    "eval_steps": in_metrics(1, eval_strategy="steps", eval_steps=2),
    "eval_on_start": in_metrics(True),
    "metric_for_best_model": trained("reward", best, eval_strategy="steps", eval_steps=1),
    "load_best_model_at_end": trained(
        True, weights, eval_strategy="steps", eval_steps=1, metric_for_best_model="objective", learning_rate=0.3
    ),
    "save_strategy": in_files("no"),
    "save_steps": in_files(1),
    "save_total_limit": in_files(1, save_steps=1),
}  # fmt: skip
KEYS = {"sft": SFT, "reward_training": REWARD, "ppo": ONLINE, "a2c": ONLINE, "dpo": DPO}
COMMON = {
    "sft": {"from_scratch": False, "learning_rate": 0.01, "max_steps": 3},
    "reward_training": {"learning_rate": 0.01, "max_steps": 3},
    "dpo": {"learning_rate": 0.01, "max_steps": 3},
    "ppo": {"learning_rate": 0.01, "total_episodes": 24},
    "a2c": {"learning_rate": 0.01, "total_episodes": 24},
}


# --- the test ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with pairs, one of each shorter than the other."""
    folder = tmp_path_factory.mktemp("keys")
    run("preferences", tiny, folder)
    file = folder / "outputs/tiny/preferences/it/pairs.jsonl"
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(pair | {"rejected_ids": pair["rejected_ids"][:3]}) + "\n" for pair in pairs))
    return folder


@pytest.fixture(autouse=True)
def process_as_it_was():
    """What a key sets for the whole process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.use_deterministic_algorithms(False)


KNOWN: dict[str, Any] = {}  # what was seen with the keys of a stage as JSON


def observe(section, values, place, recipe, key):
    """What `key.look` sees of a stage with `values`, dotted keys; a stage is run once for the same values."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    from rlhf_recipes.runs.trainer import Resumable

    said = json.dumps([section, key.trained, values, str(recipe)], sort_keys=True)
    if said in KNOWN:
        return key.look(KNOWN[said])
    stage, name, passes = TRAINED[section].name, f"run-{len(list(place.iterdir()))}", []
    train, forward = Resumable.train, LlamaMLP.forward

    def stopping(trainer, *args, **kwargs):
        if key.trained:
            train(trainer, *args, **kwargs)
        raise AtTrainingError(Seen(trainer, place / name / recipe.name / stage / "it", len(passes)))

    def counted(layer, *args):
        if torch.is_grad_enabled():
            passes.append(layer)
        return forward(layer, *args)

    words = [
        "--evaluate.prompts=2",
        "--evaluate.samples=1",
        "--watch.prompts=4",
        "--run.name=it",
        f"--run.output={place / name}",
    ]
    words += [f"--preferences.path={place}/outputs/tiny/preferences/it"] if stage == "dpo" else []
    words += [f"--{k}={json.dumps(v)}" for k, v in values.items()]  # of two of a key the last one holds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resumable, "train", stopping)
        patch.setattr(LlamaMLP, "forward", counted)
        try:
            importlib.import_module(f"scripts.{stage}").main(["--recipe", str(recipe), *words])
        except AtTrainingError as stopped:
            seen = stopped.args[0]
    KNOWN[said] = seen
    return key.look(seen)


def check_refused(stage, dotted, key, tiny, place, capsys):
    words = [f"--{dotted}={json.dumps(key.value)}", "--run.output", str(place / "none")]
    words += {"dpo": ["--preferences.source=task"], "sft": ["--sft.from_scratch=false"]}.get(stage, [])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"scripts.{TRAINED[stage].name}").main(["--recipe", str(tiny), *words])
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert key.words in line
    assert dotted.split(".")[1] in line
    assert not (place / "none").exists()


def check(stage, name, tiny, place, capsys):
    key, dotted = KEYS[stage][name], f"{stage}.{name}"
    if isinstance(key, Refused):
        return check_refused(stage, dotted, key, tiny, place, capsys)
    before = {f"{stage}.{k}": v for k, v in (COMMON[stage] | getattr(key, "beside", {})).items()}
    if isinstance(key, Elsewhere):
        return observe(stage, before | {dotted: key.value}, place, tiny, built(key.value, argument(name)))
    assert before.get(dotted) != key.value
    after = before | {f"{stage}.{k}": v for k, v in key.along.items()} | {dotted: key.value}
    assert observe(stage, before, place, tiny, key) != observe(stage, after, place, tiny, key)
    return None


EVERY = [(stage, name) for stage in TRAINED for name in keys_of_sections()[stage]]
OF_ITS_OWN = [
    (stage, name)
    for stage, name in EVERY
    if stage == "sft" or (stage != "a2c" and KEYS[stage].get(name) is not TRAINER.get(name))
]


@pytest.mark.parametrize("stage", TRAINED)
def test_it_is_known_of_every_key_that_is_accepted_what_it_does(stage):
    unknown = keys_of_sections()[stage] - KEYS[stage].keys()
    assert not unknown, (
        f"{sorted(unknown)}: accepted in `{stage}`, and nobody knows what they do here: try them and put them into KEYS with "
        f"what they change, or refuse them in rlhf_recipes/recipe/keys.py with the reason"
    )


@pytest.mark.parametrize(("stage", "name"), OF_ITS_OWN)
def test_every_key_that_is_accepted_has_its_effect(stage, name, tiny, place, capsys):
    check(stage, name, tiny, place, capsys)


@pytest.mark.parametrize("beside", ["reward", "full"])
def test_the_kl_in_the_loss_is_neither_of_the_others(beside, tiny, place):
    before = {f"ppo.{k}": v for k, v in COMMON["ppo"].items()}
    key = in_metrics("loss")
    other = observe("ppo", before | ({} if beside == "reward" else {"ppo.kl": beside}), place, tiny, key)
    assert observe("ppo", before | {"ppo.kl": "loss"}, place, tiny, key) != other


@pytest.mark.slow  # the same code of transformers' Trainer as in sft, and of our PPO
@pytest.mark.parametrize(("stage", "name"), sorted(set(EVERY) - set(OF_ITS_OWN)))
def test_every_key_has_its_effect_in_the_other_stages_too(stage, name, tiny, place, capsys):
    check(stage, name, tiny, place, capsys)


HIDDEN_24 = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
MIXTURE = HIDDEN_24 | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}
WITH_DATA = [  # keys of sft that only some data, or some backbones, have
    ("completion_only_loss", False, '{"prompt": "the ", "completion": "film was great"}', {}),
    (
        "assistant_only_loss",
        True,
        '{"messages": [{"role": "user", "content": "the?"}, {"role": "assistant", "content": "film"}]}',
        {},
    ),
    ("router_aux_loss_coef", 0.5, '{"text": "the film was great"}', {"sft.from_scratch": True, "model.architecture": MIXTURE}),
]


@pytest.mark.parametrize(("name", "value", "row", "beside"), WITH_DATA, ids=[case[0] for case in WITH_DATA])
def test_keys_that_need_their_data_or_backbone(name, value, row, beside, tiny, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny, folder)
    with (folder / "task.py").open("a") as file:
        file.write(f"\ndef load_demonstrations(split):\n    return Dataset.from_list([{row}] * 8)\n")
    (folder / "template.jinja").write_text(TEMPLATE)
    before = {f"sft.{k}": v for k, v in COMMON["sft"].items()} | {"model.chat_template": "template.jinja"} | beside
    key = Key(value, metrics)
    assert observe("sft", before, tmp_path, folder, key) != observe(
        "sft", before | {f"sft.{name}": value}, tmp_path, folder, key
    )


# --- the shared sections -----------------------------------------------------------------------------------------

FEW = {
    "evaluate.completions": 2, "evaluate.reference_completions": 2, "evaluate.prompts": 2,
    "evaluate.policies": ["reference", "best-of-2", "same=checkpoints/backbone"],
}  # fmt: skip
FOREIGN = {"reward.model": "foreign", "reward.label": "good"}
TERMS = [{"function": "gold_reward"}, {"adapter": "checkpoints/reward", "read_eos": False}]


# key -> the stage that reads it, and as above; Elsewhere: which file of tests has it
SHARED = {
    "model.path": ("ppo", Refused("./nowhere", "no such folder")),
    "model.trust_remote_code": ("ppo", Elsewhere(True, "test_security.py")),
    "model.dtype": ("ppo", in_metrics("bfloat16")),
    "model.quantization": ("ppo", Refused("4bit", "computes in bfloat16")),
    "model.attention": ("ppo", built("eager", lambda seen: seen.trainer.roles.policy.config._attn_implementation)),
    "model.pad_token": ("ppo", built("<s>", lambda seen: seen.trainer.processing_class.pad_token)),
    "model.eos_token": ("ppo", Elsewhere("<s>", "test_tokens.py")),
    "model.chat_template": ("ppo", Elsewhere("x.jinja", "test_chitchat.py")),
    "model.save_dtype": ("sft", Elsewhere("bfloat16", "test_merge.py")),
    "model.architecture": ("sft", built(HIDDEN_24, weights, **{"sft.from_scratch": True})),
    "lora.r": ("ppo", built(2, weights)),
    "lora.alpha": ("ppo", in_metrics(32)),
    "lora.dropout": ("reward_training", in_metrics(0.5)),
    "lora.target_modules": ("ppo", in_metrics(["q_proj"])),
    **{
        f"lora.{key}": ("ppo", Elsewhere(value, "test_lora_fields.py"))
        for key, value in {
            "exclude_modules": ["v_proj"],
            "target_parameters": ["mlp.down_proj.weight"],
            "layers_to_transform": 1,
            "layers_pattern": "layers",
            "rank_pattern": {"q_proj": 1},
            "alpha_pattern": {"q_proj": 1.0},
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": [5],
            "use_rslora": True,
            "use_dora": True,
            "lora_bias": True,
            "init_lora_weights": "gaussian",
        }.items()
    },
    "reward.adapter": ("ppo", Refused("./nowhere", "no such folder")),
    "reward.model": ("ppo", Key("foreign", metrics, along={"reward.label": "good"})),
    "reward.function": ("ppo", in_metrics("gold_reward")),
    "reward.name": ("ppo", in_metrics("other", **{"reward.terms": None, "reward.adapter": "checkpoints/reward"})),
    "reward.weight": ("ppo", in_metrics(2.0)),
    "reward.read_eos": ("reward_training", built(True, lambda seen: seen.trainer.train_dataset[0]["chosen_ids"])),
    "reward.label": ("ppo", in_metrics("bad", **FOREIGN)),
    "reward.probability": ("ppo", in_metrics(True, **FOREIGN)),
    "reward.pair": ("ppo", in_metrics(True, **FOREIGN)),
    "reward.trust_remote_code": ("ppo", Elsewhere(True, "test_security.py")),
    "reward.max_length": ("ppo", in_metrics(4, **FOREIGN)),
    "reward.on_error": ("ppo", Elsewhere("skip", "test_rewards.py")),
    "reward.terms": ("ppo", in_metrics(TERMS)),
    "reward.normalize": ("ppo", Elsewhere(True, "test_rewards.py")),
    "reward.normalize_prompts": ("ppo", Elsewhere(4, "test_rewards.py")),
    "reward.clip": ("ppo", in_metrics(0.01)),
    "reward.length_penalty": ("ppo", in_metrics(0.1)),
    "reward.missing_eos_penalty": ("ppo", in_metrics(1.0)),
    "objective.beta": ("ppo", in_metrics(0.5)),
    "data.max_prompt_tokens": ("ppo", in_metrics(4)),
    "data.max_completion_tokens": ("ppo", in_metrics(3)),
    "sampling.temperature": ("ppo", in_metrics(0.5)),
    "sampling.stop": ("ppo", Elsewhere(["x"], "test_roles.py")),
    "run.seed": ("ppo", in_metrics(1)),
    "run.tracker": ("ppo", Elsewhere("wandb", "test_scripts.py")),
    "run.project": ("ppo", Elsewhere("x", "test_sweep.py")),
    "run.group": ("ppo", Elsewhere("x", "test_sweep.py")),
    "run.name": ("ppo", Elsewhere("x", "test_scripts.py")),
    "run.trial": ("ppo", Elsewhere(True, "test_yardstick.py")),
    "run.resume": ("ppo", Elsewhere("latest", "test_resume.py")),
    "run.max_skipped_steps": ("ppo", Elsewhere(1, "test_resume.py")),
    "run.output": ("ppo", Elsewhere("x", "test_scripts.py")),
    "preferences.source": ("dpo", Elsewhere("task", "test_dpo.py")),
    "preferences.label": ("preferences", "argmax"),
    "preferences.pairs_per_prompt": ("preferences", 2),
    "preferences.prompts": ("preferences", 5),
    "preferences.batch_size": ("preferences", 4),
    "preferences.path": ("dpo", Elsewhere("x", "test_dpo.py")),
    "evaluate.prompts": ("evaluate", 3),
    "evaluate.batch_size": ("evaluate", 3),
    "evaluate.samples": ("evaluate", Elsewhere(1, "test_scripts.py")),
    "evaluate.completions": ("evaluate", 3),
    "evaluate.reference_completions": ("evaluate", 3),
    "evaluate.policies": ("evaluate", ["reference"]),
    "watch.prompts": ("ppo", in_metrics(2, **{"ppo.eval_strategy": "steps", "ppo.eval_steps": 1, "evaluate.prompts": 8})),
    "watch.on_over_optimisation": ("ppo", Elsewhere("stop", "test_leash.py")),
    "report.evaluation": ("report", Elsewhere("x", "test_report.py")),
    "merge.adapter": ("merge", Elsewhere("x", "test_merge.py")),
    "merge.push": ("merge", Elsewhere("x", "test_merge.py")),
    "merge.private": ("merge", Elsewhere(False, "test_merge.py")),
}


@pytest.fixture(scope="module")
def judged(tiny, foreign, tmp_path_factory):
    """The tiny recipe with a reward model of another kind beside it."""
    folder = tmp_path_factory.mktemp("judged") / "tiny"
    shutil.copytree(tiny, folder)
    shutil.copytree(foreign, folder / "foreign")
    tokenizer = Tokenizer.from_file(str(folder / "foreign" / "tokenizer.json"))
    ends = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A </s> $B", special_tokens=ends)
    tokenizer.save(str(folder / "foreign" / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("dotted", [f"{section}.{name}" for section in SECTIONS for name in keys_of_sections()[section]])
def test_every_shared_key_has_its_effect(dotted, judged, place, tmp_path, capsys):
    assert dotted in SHARED, f"`{dotted}` is in no table: put it into tests/test_keys.py with what it changes"
    section, key = SHARED[dotted]
    if isinstance(key, Elsewhere):
        text = (Path(__file__).parent / key.where).read_text()
        assert dotted.split(".")[1] in text or dotted in text
    elif isinstance(key, Refused):
        check_refused(section, dotted, key, judged, place, capsys)
    elif isinstance(key, Key):
        before = {f"{section}.{k}": v for k, v in COMMON[section].items()} | key.beside
        after = before | key.along | {dotted: key.value}
        assert observe(section, before, place, judged, key) != observe(section, after, place, judged, key)
    else:
        said = []
        for number, values in enumerate(({}, {dotted: key})):
            given = (FEW if section == "evaluate" else {}) | values
            run(section, judged, tmp_path / str(number), *(f"--{k}={json.dumps(v)}" for k, v in given.items()))
            output = tmp_path / str(number) / "outputs/tiny" / section / "it"
            said.append((output / ("pairs.jsonl" if section == "preferences" else "evaluation.json")).read_text())
        assert said[0] != said[1]


ANY = {"bool": "true", "int": "1", "float": "0.5"}


@pytest.mark.parametrize("stage", TRAINED)
def refusal_of(stage, name, value="x"):
    with pytest.raises(RecipeError) as refusal:
        load_recipe(Path("recipes/imdb"), {f"{stage}.{name}": yaml.safe_load(value)})
    assert name in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("stage", TRAINED)
def test_every_other_key_is_refused_with_the_reason(stage):
    for name, known in TRAINED[stage].fields.items():
        if name in keys_of_sections()[stage]:
            continue
        message = refusal_of(stage, name, ANY.get(getattr(known.type, "__name__", ""), "x"))
        if name in keys.OWNER_OF:
            assert f"belongs to `{keys.OWNER_OF[name]}`" in message
        else:
            assert TRAINED[stage].refused_keys[name] in message


@pytest.mark.parametrize("stage", ["ppo", "a2c"])
def test_what_else_trl_and_transformers_have_is_refused(stage):
    from rlhf_recipes.algorithms.ppo_config import trl_ppo

    theirs = {f.name for f in dataclasses.fields(trl_ppo.PPOConfig)} - set(keys_of_sections()[stage])
    assert TRAINED[stage].refused_keys.keys() <= theirs | {"target_kl"}  # PPO's own
    for name in theirs:
        message = refusal_of(stage, name)
        reason = keys.NO_SECRETS if keys.SECRET.search(name) else TRAINED[stage].refused_keys.get(name)
        if name in keys.OWNER_OF:
            assert f"belongs to `{keys.OWNER_OF[name]}`" in message
        else:
            assert reason in message if reason else f"unknown key `{stage}.{name}`" in message


@pytest.mark.parametrize("stage", ["ppo", "a2c"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("full_kl", "that is `ppo.kl: full`"), ("kl_loss", "that is `ppo.kl: loss`"), ("loop", "compares with TRL's own")],
)
def test_keys_of_older_runs_are_answered_with_todays(stage, name, words):
    assert words in refusal_of(stage, name, "true")


@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [
        # a switch that the recipe turns off takes its keys along; the command line's own are meant
        ({"eval_strategy": "no", "eval_steps": 3}, {}, None),
        ({"eval_steps": 3}, {}, "`sft.eval_steps` needs `sft.eval_strategy` steps"),
        ({"eval_strategy": "no"}, {"sft.eval_steps": 3}, "--sft.eval_steps: `sft.eval_steps` needs"),
        ({"eval_strategy": "steps", "eval_steps": 3}, {"sft.eval_strategy": "no"}, None),
        ({"num_train_epochs": 2}, {"sft.max_steps": 3}, None),
        ({"max_steps": 3}, {"sft.num_train_epochs": 2}, "`sft.num_train_epochs` needs `sft.max_steps` -1"),
        ({"max_steps": 3}, {"sft.num_train_epochs": 2, "sft.max_steps": -1}, None),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, {}, None),
        ({"lr_scheduler_type": "constant"}, {"sft.warmup_steps": 3}, "needs `sft.lr_scheduler_type` constant_with_warmup"),
        ({"optim_args": "momentum=0.9"}, {}, "`sft.optim_args` needs `sft.optim` one with settings"),
        ({"packing_strategy": "wrapped"}, {}, "`sft.packing_strategy` needs `sft.packing` true"),
        ({"packing_strategy": "bfd"}, {}, None),  # TRL's default promises nothing
        ({"dataloader_prefetch_factor": 2}, {}, "needs `sft.dataloader_num_workers` above 0"),
        ({}, {"ppo.kl": "full", "ppo.kl_estimator": "k3"}, "`ppo.kl_estimator` needs `ppo.kl` reward or loss"),
    ],
)
def test_a_key_without_effect_beside_the_others(file, overrides, message, tmp_path):
    recipe = {"model": {"path": "x"}, "reward": {"adapter": "y"}, "sft": file}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if message is None:
        assert load_recipe(tmp_path, overrides)
        return
    with pytest.raises(RecipeError) as refusal:
        load_recipe(tmp_path, overrides)
    assert message in str(refusal.value)


# --- names people know -------------------------------------------------------------------------------------------


def test_every_name_leads_to_a_key_that_is_there():
    for name, targets in MEANT.items():
        for target in targets:
            section, _, key = target.partition(".")
            sections = TRAINED if section == "*" else [section]
            assert any(key in keys_of_sections()[s] for s in sections), (name, target)
        assert name not in ABSENT
    for reason in ABSENT.values():
        for section, key in (word.split(".") for word in reason.split("`") if word.count(".") == 1 and " " not in word):
            assert section == "task" or section == "requirements" or key in keys_of_sections()[section], reason


SAID = [
    ("ppo", {"ppo.max_new_tokens": 1}, "that is `data.max_completion_tokens`"),
    ("ppo", {"data.response_length": 1}, "that is `data.max_completion_tokens`"),
    ("dpo", {"dpo.max_prompt_length": 1}, "that is `data.max_prompt_tokens`"),
    ("ppo", {"objective.init_kl_coef": 1}, "that is `objective.beta`"),
    ("ppo", {"ppo.kl_penalty": "abs"}, "that is `objective.beta` or `ppo.kl_estimator`"),
    ("ppo", {"ppo.num_generations": 8}, "that is `preferences.pairs_per_prompt` or `evaluate.completions`"),
    ("ppo", {"sampling.top_p": 0.9}, "completions are drawn from all of pi(y|x)"),
    ("ppo", {"lora.lora_alpha": 8}, "that is `lora.alpha`"),
    ("ppo", {"ppo.lr": 1}, "that is `ppo.learning_rate`"),
    ("ppo", {"ppo.ppo_epochs": 1}, "that is `ppo.num_ppo_epochs`"),
    ("ppo", {"ppo.mini_batch_size": 8}, "the batch over num_mini_batches"),
    ("ppo", {"ppo.clip_range": 0.1}, "that is `ppo.cliprange`"),
    ("ppo", {"ppo.gae_lambda": 0.9}, "that is `ppo.lam` or `a2c.lam`"),
    ("ppo", {"model.load_in_4bit": True}, "that is `model.quantization`"),
    ("ppo", {"model.torch_dtype": "x"}, "that is `model.dtype`"),
    ("ppo", {"model.learning_rate": 1}, "`ppo.learning_rate`"),
    ("ppo", {"run.wandb_project": "x"}, "that is `run.project`"),
    ("ppo", {"reward.reward_model": "x"}, "that is `reward.model`"),
    ("ppo", {"evaluate.temperature": 1}, "that is `sampling.temperature`"),
    ("ppo", {"generation.max_new_tokens": 1}, "that is `data.max_completion_tokens`"),
    ("ppo", {"lora.rnk": 1}, "did you mean `r`?"),
    ("ppo", {"ppo.packing": True}, "unknown key `ppo.packing`; it is a key of `sft`, not of `ppo`"),
    ("ppo", "--model_name_or_path", "--model_name_or_path: unknown option; that is `model.path`"),
    ("reward", "--learning_rate", "--learning_rate: unknown option; that is `reward_training.learning_rate`"),
    ("ppo", "--batch-size", "--batch-size: unknown option; that is `ppo.per_device_train_batch_size`"),
    ("evaluate", "--num_epochs", "`sft.num_train_epochs` or `reward_training.num_train_epochs`"),
    ("ppo", "--dataset_name", "--dataset_name: unknown option; the data come from the recipe's task.py"),
    ("ppo", "--r", "--r: unknown option; that is `lora.r`"),
    ("ppo", "--nothing_like_it", "unknown option; an override is --section.key=value"),
]


@pytest.mark.parametrize(("stage", "said", "message"), SAID, ids=lambda x: str(x) if not isinstance(x, dict) else next(iter(x)))
def test_names_people_know_lead_to_the_key_that_is_meant(stage, said, message, capsys, tmp_path):
    words = [said, "1"] if isinstance(said, str) else [f"--{key}={value}" for key, value in said.items()]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"scripts.{stage}").main([*words, "--run.output", str(tmp_path / "none")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_every_name_is_answered_in_every_section_and_without_one():
    for name in {**MEANT, **ABSENT}:
        for section in (None, *keys_of_sections()):
            if section is None or name not in keys_of_sections()[section]:
                assert meant(name, section, keys_of_sections())


# --- the reward of an override -----------------------------------------------------------------------------------

JUDGED = {"adapter": "checkpoints/reward", "read_eos": False, "name": "mine", "normalize": True}


@pytest.mark.parametrize(
    ("overrides", "terms", "baseline"),
    [
        ({}, [("checkpoints/reward", None, False)], True),
        ({"reward.function": "f"}, [(None, "f", True)], False),
        ({"reward.adapter": None, "reward.function": "f"}, [(None, "f", True)], False),  # the long way
        ({"reward.adapter": "other"}, [("other", None, False)], True),  # the file's keys are about an adapter still
        ({"reward.terms": [{"function": "f"}, {"function": "g"}]}, [(None, "f", True), (None, "g", True)], False),
        (
            {"reward.terms": [{"adapter": "a", "read_eos": False}, {"function": "g"}]},
            [("a", None, False), (None, "g", True)],
            True,
        ),
        ({"reward.function": "f", "ppo.reward_baseline": True}, [(None, "f", True)], True),  # which checks/settings.py refuses
    ],
)
def test_an_override_of_the_reward_takes_the_place_of_the_files(overrides, terms, baseline, tmp_path):
    recipe = {"model": {"path": "x"}, "reward": JUDGED, "ppo": {"reward_baseline": True}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(tmp_path, overrides)
    assert [(t.adapter, t.function, t.read_eos) for t in loaded.reward.all_terms()] == terms
    assert loaded.reward.normalize  # of the sum
    assert loaded.stages["ppo"]["reward_baseline"] is baseline
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    assert load_recipe(tmp_path / "again.yaml", overrides) == loaded  # as --resume reads it


@pytest.mark.parametrize(
    ("reward", "overrides", "message"),
    [
        ({"adapter": "a", "label": "good"}, {}, "`reward.label` has no effect on adapter: it is of a reward `model`"),
        ({"function": "f"}, {"reward.max_length": 8}, "--reward.max_length: `reward.max_length` has no effect on function"),
        ({"terms": [{"adapter": "a", "on_error": "skip"}]}, {}, "`reward.terms[0].on_error` has no effect on adapter"),
        ({"adapter": "a"}, {"reward.normalize_prompts": 8}, "`reward.normalize_prompts` needs `reward.normalize` true"),
    ],
)
def test_keys_of_another_kind_of_reward(reward, overrides, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"path": "x"}, "reward": reward}))
    with pytest.raises(RecipeError) as refusal:
        load_recipe(tmp_path, overrides)
    assert message in str(refusal.value)


def test_an_override_takes_the_place_of_a_files_sum(tmp_path):
    recipe = {"model": {"path": "x"}, "reward": {"terms": [{"function": "f"}, {"adapter": "a"}]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(tmp_path, {"reward.model": "m"})
    assert [(t.model, t.weight) for t in loaded.reward.all_terms()] == [("m", 1.0)]
