"""Which of TRL's keys a stage takes: what belongs to a shared section, and what would be accepted and ignored, with the reason.

tests/test_keys.py tries every key that is left. Nothing heavy is imported here.
"""

import ast
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from rlhf_recipes.recipe.errors import SectionError
from rlhf_recipes.recipe.trl_fields import Field

# A fact that several stages share has one owner; TRL's name for it is refused inside a stage section.
OWNER_OF = {
    "seed": "run.seed",
    "data_seed": "run.seed",
    "output_dir": "run.output",
    "run_name": "run.name",
    "report_to": "run.tracker",
    "project": "run.project",
    "kl_coef": "objective.beta",
    "beta": "objective.beta",
    "response_length": "data.max_completion_tokens",
    "temperature": "sampling.temperature",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
    "pad_token": "model.pad_token",
    "eos_token": "model.eos_token",
    "chat_template_path": "model.chat_template",
    "sft_model_path": "model.path",
    "reward_model_path": "reward.model",
    "missing_eos_penalty": "reward.missing_eos_penalty",
}
# Keys of secrets. A recipe holds none: it is written into the run's folder and sent to wandb, the command line too.
SECRET = re.compile(r"^token$|(^|_)(api_key|password|secret|(auth|hub|hf|access)_token)$", re.IGNORECASE)
NO_SECRETS = (
    "a secret belongs neither into a recipe nor on a command line: both are written into the run's folder and sent to wandb; "
    "give it in the environment variable HF_TOKEN (for wandb: WANDB_API_KEY)"
)
_AT_EOS = "a completion ends at the tokenizer's eos in every stage"
_SINGLE_STEP = "A2C takes one step on each rollout, at which nothing is clipped yet; scripts/ppo.py takes several"
_ONE_REFERENCE = "the reference is the policy with its adapters off, in every stage"
_LOSS_ALONE = "of held-out rows the loss alone is measured"
_AT_ITS_END = "the stage judges held-out data at its end, and has none for TRL while it trains"
_OWN_BAR = "a run shows one progress bar of its own, and a line every 15 seconds where there is no terminal"
_ONE_WRITER = "one process writes the run's folder, for all of them"
_CONNECTED = "the processes are connected before TRL reads its keys; accelerate's launch file and torchrun say how"
_TRACKERS = "`run.tracker` says who watches"
_UPLOADS = "a run stays on this machine; scripts/merge.py uploads a model, see `merge.push`"
_EXAMPLES = "it is for the example scripts of transformers; here each stage is a script"
_NO_DROPOUT = "the backbone's dropout is off, in every stage but sft; an adapter's is `lora.dropout`"
# In every stage.
EVERYWHERE = {
    "resume_from_checkpoint": "--resume resumes a run",
    "save_only_model": "a checkpoint holds what a run needs to be resumed; its adapter alone can be copied out of it",
    "ignore_data_skip": "a resumed run sees the data it would have seen",
    "restore_callback_states_from_checkpoint": "--resume restores them",
    "auto_find_batch_size": "a run whose batch size may change cannot be repeated or resumed",
    "enable_jit_checkpoint": "every run ends with a checkpoint when a signal asks it to",
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "parallelism_config"),
        "the launch file chooses it, as accelerate_configs/fsdp2.yaml and zero3.yaml do",
    ),
    **dict.fromkeys(("ddp_timeout", "local_rank"), _CONNECTED),
    "accelerator_config": "how batches are dealt out and what order they come in is what a repeated or resumed run relies on",
    **dict.fromkeys(("save_on_each_node", "log_on_each_node"), _ONE_WRITER),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _TRACKERS),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"), _UPLOADS
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _EXAMPLES),
    "disable_tqdm": _OWN_BAR,
    "skip_memory_metrics": "metrics.jsonl holds what a repeated run repeats, byte for byte",
    "debug": "a step that is not finite is left out, and the last batch of too many is written down",
    "length_column_name": "the length of a row is the number of its tokens",
    "use_cache": "no training pass reads a cache, and the samplers keep their own",
    "label_names": "the stage hands over tokens of its own, under TRL's names",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "it would round the weights that the stage saves; see `model.dtype`"),
    "optim_target_modules": "GaLore and APOLLO are for whole weights; what is trained here is low-rank already",
    **dict.fromkeys(
        ("activation_checkpointing", "activation_checkpointing_kwargs"), "recipes use its other name, gradient_checkpointing"
    ),
}  # fmt: skip
_UNREAD_EVALUATION = (
    "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
    "include_for_metrics", "batch_eval_metrics",
)  # fmt: skip
_NO_EVALUATION = dict.fromkeys(
    ("eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "load_best_model_at_end",
     "metric_for_best_model", "greater_is_better", *_UNREAD_EVALUATION),
    _AT_ITS_END,
)  # fmt: skip
_OF_PAIRS = {
    **_NO_EVALUATION,
    "average_tokens_across_devices": "the loss is a mean over pairs, and every process has as many",
    "label_smoothing_factor": "the loss is about pairs, not about labels",
    "dataset_num_proc": "pairs are tokenised before TRL sees them",
    "disable_dropout": _NO_DROPOUT,
}
_BATCH = "it is per_device_train_batch_size x gradient_accumulation_steps, x the number of processes"
_MINI_BATCH = "it is the batch over num_mini_batches"
_NOT_READ = "PPO's loop does not read it"
# What people know from TRL and transformers; any other field of theirs is an unknown key.
_NOT_ONLINE = {
    "stop_token": _AT_EOS,
    "stop_token_id": _AT_EOS,
    "num_sample_generations": "the run ends with samples on held-out prompts; see `evaluate.samples`",
    "gradient_checkpointing": "PPO's loop does not use it",
    "world_size": "the launcher says how many processes there are",
    "num_total_batches": "it is total_episodes over the batch",
    "max_steps": f"{_NOT_READ}; total_episodes says how long it runs",
    **dict.fromkeys(("batch_size", "local_batch_size", "micro_batch_size"), _BATCH),
    **dict.fromkeys(("mini_batch_size", "local_mini_batch_size"), _MINI_BATCH),
    **dict.fromkeys(("logging_steps", "logging_strategy", "logging_first_step"), "every update is logged"),
    **dict.fromkeys(
        ("eval_delay", "per_device_eval_batch_size", "greater_is_better"),
        "held-out prompts are judged every `eval_steps`, `evaluate.batch_size` at a time, and more is better",
    ),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_drop_last", "torch_compile", "use_liger_kernel",
         "ds3_gather_for_generation", "label_smoothing_factor", "neftune_noise_alpha"),
        _NOT_READ,
    ),
}  # fmt: skip
REFUSED = {
    "sft": {
        "dataset_text_field": "`load_demonstrations` gives the column `text`",
        "dataset_kwargs": "`load_demonstrations` gives the data as they are to be trained on",
        **dict.fromkeys(_UNREAD_EVALUATION, _LOSS_ALONE),
    },
    "reward_training": _OF_PAIRS
    | {
        "use_liger_kernel": "there is no loss over the vocabulary that it could fuse",
        "liger_kernel_config": "there is no loss over the vocabulary that it could fuse",
    },
    "ppo": _NOT_ONLINE,
    "a2c": _NOT_ONLINE
    | dict.fromkeys(("num_ppo_epochs", "num_mini_batches", "cliprange", "cliprange_value", "target_kl"), _SINGLE_STEP),
    "dpo": _OF_PAIRS
    | {
        **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _ONE_REFERENCE),
        "label_smoothing_factor": "the loss is about pairs; see `dpo.label_smoothing`",
        "remove_unused_columns": "pairs hold nothing but what the loss reads",
        "padding_free": "TRL 1.12 has switched it off, and pads",
        **dict.fromkeys(
            ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
            "compiled code has not been tried on modules that are policy and reference in turn",
        ),
        "neftune_noise_alpha": "the noise would be the policy's alone, which then is not the reference when it starts",
        **dict.fromkeys(
            ("use_liger_kernel", "liger_kernel_config"), "its fused loss runs a reference model of its own, beside ours"
        ),
    },
}

# PEFT's other fields.
_CHANGES_BACKBONE = "it changes the backbone's own weights, which every role shares"
_UNPROVEN = "a variant of LoRA that the shared roles have not been checked with"
_BY_STAGE = "each stage sets it"
LORA_REFUSED = {
    "bias": _CHANGES_BACKBONE,
    "layer_replication": _CHANGES_BACKBONE,
    **dict.fromkeys(("loftq_config", "corda_config", "eva_config", "lora_ga_config"), _CHANGES_BACKBONE),
    **dict.fromkeys(("use_qalora", "qalora_group_size", "use_bdlora", "velora_config", "monteclora_config"), _UNPROVEN),
    **dict.fromkeys(("arrow_config", "kasa_config", "ensure_weight_tying", "runtime_config"), _UNPROVEN),
    "alora_invocation_tokens": "it adapts a part of each text, which weights with a merged adapter cannot",
    "megatron_config": "it is for Megatron's layers",
    "megatron_core": "it is for Megatron's layers",
    "fan_in_fan_out": "PEFT sees by itself how a layer stores its weights",
    **dict.fromkeys(("task_type", "inference_mode", "base_model_name_or_path", "revision"), _BY_STAGE),
    **dict.fromkeys(("peft_type", "peft_version", "auto_mapping"), _BY_STAGE),
}


# --- keys beside others --------------------------------------------------------------------------------------------


def _on(value: Any) -> bool:
    return value not in (None, False, 0, "no")


def _steps(value: Any) -> bool:
    return value == "steps"


# key -> (the key without which it has no effect, what that must be, whether it is).
_NEEDS: dict[str, tuple[str, str, Callable[[Any], bool]]] = {
    "packing_strategy": ("packing", "true", _on),
    "liger_kernel_config": ("use_liger_kernel", "true", _on),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", "true", _on),
    "eval_steps": ("eval_strategy", "steps", _steps),
    "eval_delay": ("eval_strategy", "steps or epoch", _on),
    "metric_for_best_model": ("eval_strategy", "steps", _on),
    "load_best_model_at_end": ("eval_strategy", "steps", _on),
    "greater_is_better": ("metric_for_best_model", "", _on),
    "save_steps": ("save_strategy", "steps", _steps),
    "save_total_limit": ("save_strategy", "steps or epoch", _on),
    "logging_steps": ("logging_strategy", "steps", _steps),
    "logging_first_step": ("logging_strategy", "steps or epoch", _on),
    **dict.fromkeys(
        ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context",
         "dataloader_in_order"),
        ("dataloader_num_workers", "above 0", _on),
    ),
    "truncation_mode": ("max_length", "", _on),
    "precompute_ref_batch_size": ("precompute_ref_log_probs", "true", _on),
    "f_alpha_divergence_coef": ("f_divergence_type", "alpha_divergence", lambda value: value == "alpha_divergence"),
    "discopop_tau": ("loss_type", "[discopop]", lambda value: "discopop" in (value or ())),
    "kl_estimator": ("kl", "reward or loss", lambda value: value != "full"),
    "kl_horizon": ("kl_target", "", _on),
    "reference_sync_steps": ("reference", "sync", lambda value: value == "sync"),
    "warmup_steps": ("lr_scheduler_type", "constant_with_warmup, or another than constant", lambda value: value != "constant"),
    "optim_args": ("optim", "one with settings beside adam_* and weight_decay, such as sgd",
                   lambda value: value not in ("default_optim", "adamw_torch", "adamw_torch_fused", "adafactor")),
    "num_train_epochs": ("max_steps", "-1", lambda value: value is None or value <= 0),
}  # fmt: skip


def _literal(source: str | None) -> Any:
    """A default as a value, or where it is the name of one that name."""
    try:
        return ast.literal_eval(source or "None")
    except ValueError:
        return source


def refuse_without_effect(
    section: str, fields: Mapping[str, Field], defaults: Mapping[str, Any], values: dict[str, Any], given: Collection[str]
) -> None:
    """A switch that the recipe turns off by name takes along what the recipe says of it; but not what the command line says.

    Args:
        defaults: the stage's own, where they are not those of `fields`.
        values: the section's, of the types that TRL's fields have.
        given: the keys among them that the command line sets.

    Raises:
        SectionError: a key of a stage's section has no effect beside the others.
    """
    for key, value in values.items():
        if value is None or repr(value) == fields[key].default:
            continue
        if key == "num_train_epochs" and "total_episodes" in fields:  # which counts in its place
            switch, needed, fits = "total_episodes", "null", lambda episodes: episodes is None
        elif key in _NEEDS and _NEEDS[key][0] in fields:
            switch, needed, fits = _NEEDS[key]
        else:
            continue
        default = defaults[switch] if switch in defaults else _literal(fields[switch].default)
        said_off = switch in values and key not in given
        if not fits(values.get(switch, default)) and not said_off:
            needed = f"`{section}.{switch}` {needed}".rstrip()
            raise SectionError(key, f"`{section}.{key}` needs {needed}, without which it has no effect")
