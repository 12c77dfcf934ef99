"""Names that people bring from transformers, TRL and other libraries, and the keys of a recipe that are meant by them."""

import re
from collections.abc import Iterable

# name -> keys; `*` is the stage's own section
_COMPLETION, _PROMPT, _BETA = ("data.max_completion_tokens",), ("data.max_prompt_tokens",), ("objective.beta",)
_RATE, _BATCH, _EPOCHS, _PASSES = (
    ("*.learning_rate",), ("*.per_device_train_batch_size",), ("*.num_train_epochs",), ("ppo.num_ppo_epochs",)
)  # fmt: skip
_CLIP, _VALUE_CLIP, _BACKBONE, _OUTPUT = ("ppo.cliprange",), ("ppo.cliprange_value",), ("model.path",), ("run.output",)
_MANY = ("preferences.pairs_per_prompt", "evaluate.completions")
_JUDGED_BY, _FUNCTION, _DTYPE, _BITS = ("reward.model",), ("reward.function",), ("model.dtype",), ("model.quantization",)
_ATTENTION, _STEPS, _EPISODES, _NORM = ("model.attention",), ("*.max_steps",), ("ppo.total_episodes",), ("*.max_grad_norm",)
MEANT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("max_new_tokens", "response_length", "max_tokens", "max_completion_length", "max_response_length", "generate_max_len",
         "max_target_length", "generation_max_length", "max_completion_len", "response_len", "max_output_tokens"),
        _COMPLETION,
    ),
    **dict.fromkeys(
        ("max_prompt_length", "max_query_length", "query_length", "max_input_length", "prompt_max_len", "max_source_length",
         "max_prompt_len", "prompt_length"),
        _PROMPT,
    ),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "seq_length", "block_size", "max_len"), ("*.max_length",)),
    **dict.fromkeys(
        ("kl_coef", "init_kl_coef", "init_kl_coeff", "kl_coeff", "beta", "kl_beta", "kl_loss_coef", "kl_weight", "kl_ctl",
         "dpo_beta", "pref_beta"),
        _BETA,
    ),
    "kl_penalty": ("objective.beta", "ppo.kl_estimator"),
    "kl_penalty_coef": _BETA,
    **dict.fromkeys(("adap_kl_ctrl", "target", "kl_target_value"), ("ppo.kl_target",)),
    "horizon": ("ppo.kl_horizon",),
    **dict.fromkeys(
        ("num_generations", "num_return_sequences", "n_samples_per_prompt", "rloo_k", "num_samples", "best_of"), _MANY
    ),
    "temperature": ("sampling.temperature",),
    **dict.fromkeys(("lora_r", "lora_rank", "rank", "lora_dim"), ("lora.r",)),
    "lora_alpha": ("lora.alpha",),
    "lora_dropout": ("lora.dropout",),
    **dict.fromkeys(("lora_target_modules", "lora_target", "target_modules", "lora_modules"), ("lora.target_modules",)),
    **dict.fromkeys(("lr", "actor_lr", "policy_lr", "actor_learning_rate", "base_lr", "step_size"), _RATE),
    **dict.fromkeys(
        ("batch_size", "train_batch_size", "per_device_batch_size", "per_gpu_train_batch_size", "micro_batch_size",
         "micro_train_batch_size"),
        _BATCH,
    ),
    **dict.fromkeys(("rollout_batch_size", "num_rollouts"), ("ppo.per_device_train_batch_size", "ppo.gradient_accumulation_steps")),
    **dict.fromkeys(("mini_batch_size", "minibatch_size", "ppo_mini_batch_size", "num_minibatches"), ("ppo.num_mini_batches",)),
    **dict.fromkeys(
        ("forward_batch_size", "rollout_forward_batch_size", "micro_rollout_batch_size"),
        ("ppo.local_rollout_forward_batch_size",),
    ),
    **dict.fromkeys(("eval_batch_size", "per_gpu_eval_batch_size"), ("evaluate.batch_size",)),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs", "train_epochs"), _EPOCHS),
    **dict.fromkeys(("ppo_epochs", "noptepochs", "update_epochs", "num_ppo_epoch", "num_iterations"), _PASSES),
    **dict.fromkeys(("steps", "total_steps", "num_steps", "max_train_steps", "num_train_steps"), _STEPS),
    **dict.fromkeys(("total_timesteps", "num_episodes", "episodes", "total_ppo_epochs"), _EPISODES),
    **dict.fromkeys(
        ("clip_range", "clip_coef", "clip_eps", "clip_ratio", "eps_clip", "cliprange_policy", "clip_epsilon", "cliprange_ratio"),
        _CLIP,
    ),
    **dict.fromkeys(
        ("clip_range_value", "clip_range_vf", "cliprange_val", "value_clip", "value_clip_range", "clip_value", "cliprange_vf"),
        _VALUE_CLIP,
    ),
    **dict.fromkeys(("vf_loss_coef", "value_loss_coef", "value_coef", "critic_coef"), ("ppo.vf_coef",)),
    **dict.fromkeys(("gae_lambda", "lambda", "lambd", "lambda_", "gae_lam"), ("ppo.lam", "a2c.lam")),
    **dict.fromkeys(("discount", "discount_factor"), ("ppo.gamma", "a2c.gamma")),
    **dict.fromkeys(("grad_clip", "gradient_clipping", "max_norm", "clip_grad_norm", "grad_norm_clip"), _NORM),
    **dict.fromkeys(("warmup_ratio", "lr_warmup_ratio", "num_warmup_steps", "lr_warmup_steps", "warmup"), ("*.warmup_steps",)),
    **dict.fromkeys(("scheduler", "lr_scheduler", "scheduler_type", "lr_schedule"), ("*.lr_scheduler_type",)),
    **dict.fromkeys(("optimizer", "optimizer_type"), ("*.optim",)),
    **dict.fromkeys(("wd", "l2"), ("*.weight_decay",)),
    **dict.fromkeys(("grad_accum", "gradient_accumulation", "accumulate_grad_batches"), ("*.gradient_accumulation_steps",)),
    "evaluation_strategy": ("*.eval_strategy",),
    **dict.fromkeys(("save_interval", "checkpoint_interval", "save_every", "save_freq"), ("*.save_steps",)),
    "group_by_length": ("*.train_sampling_strategy",),
    **dict.fromkeys(("loss", "dpo_loss"), ("dpo.loss_type",)),
    **dict.fromkeys(("report_to", "log_with", "logger", "use_wandb", "tracker_name"), ("run.tracker",)),
    **dict.fromkeys(("wandb_project", "project_name", "tracker_project_name"), ("run.project",)),
    **dict.fromkeys(("wandb_group", "run_group", "group_name"), ("run.group",)),
    **dict.fromkeys(("run_name", "wandb_run_name", "wandb_name", "exp_name", "experiment_name"), ("run.name",)),
    **dict.fromkeys(("output_dir", "save_path", "save_dir", "output_path", "out_dir", "logging_dir"), _OUTPUT),
    **dict.fromkeys(("seed", "data_seed", "random_seed"), ("run.seed",)),
    **dict.fromkeys(("resume_from_checkpoint", "load_checkpoint", "from_checkpoint"), ("run.resume",)),
    **dict.fromkeys(
        ("model_name_or_path", "model_name", "model_id", "pretrain", "base_model", "pretrained_model_name_or_path",
         "sft_model_path", "actor_model_path", "model_path", "backbone", "tokenizer_name", "tokenizer_name_or_path", "tokenizer"),
        _BACKBONE,
    ),
    **dict.fromkeys(("torch_dtype", "bf16", "fp16", "precision", "mixed_precision", "bnb_4bit_compute_dtype"), _DTYPE),
    **dict.fromkeys(("load_in_4bit", "use_4bit", "quantization_bit", "bits", "quantization_config", "bnb_4bit_quant_type"), _BITS),
    **dict.fromkeys(
        ("attn_implementation", "flash_attn", "use_flash_attention_2", "use_flash_attn", "attn_impl", "attention_implementation"),
        _ATTENTION,
    ),
    **dict.fromkeys(("template", "chat_template_path"), ("model.chat_template",)),
    **dict.fromkeys(
        ("reward_model", "reward_model_path", "rm_path", "reward_pretrain", "reward_model_name_or_path", "rm"), _JUDGED_BY
    ),
    **dict.fromkeys(("reward_fn", "reward_func", "reward_funcs", "reward_function", "reward_functions"), _FUNCTION),
    **dict.fromkeys(("reward_weights", "rewards"), ("reward.terms",)),
    **dict.fromkeys(("reward_adapter", "reward_model_adapter", "rm_adapter"), ("reward.adapter",)),
    **dict.fromkeys(("cliprange_reward", "reward_clip", "reward_clip_range", "clip_reward"), ("reward.clip",)),
    **dict.fromkeys(("non_eos_penalty", "penalty_reward_value", "missing_eos_penalty"), ("reward.missing_eos_penalty",)),
    **dict.fromkeys(("scale_rewards", "use_reward_scaling", "reward_norm", "normalize_reward", "scale_reward"), ("reward.normalize",)),
    **dict.fromkeys(("num_pairs", "pairs"), ("preferences.pairs_per_prompt",)),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "push", "hub_repo", "repo_id"), ("merge.push",)),
    "hub_private_repo": ("merge.private",),
}  # fmt: skip

_WHOLE = "completions are drawn from all of pi(y|x), as the KL and the losses assume, at `sampling.temperature`"
_DATA = "the data come from the recipe's task.py: load_prompts, load_preferences and load_demonstrations"
_REFERENCE = "the reference is `model.path` itself, which the policy's adapter starts from"
_ADAPTERS = "every stage trains a LoRA adapter, whose keys are in `lora`"
_ONE_RATE = "policy and value function learn at one rate, the stage's `learning_rate`"
ABSENT: dict[str, str] = {
    **dict.fromkeys(
        ("top_k", "top_p", "min_p", "typical_p", "num_beams", "do_sample", "repetition_penalty", "no_repeat_ngram_size"), _WHOLE
    ),
    **dict.fromkeys(
        ("dataset_name", "dataset", "dataset_path", "data_path", "train_file", "dataset_config", "dataset_train_split",
         "dataset_test_split", "train_dataset", "eval_dataset", "prompt_data", "input_key", "dataset_num_workers"),
        _DATA,
    ),
    **dict.fromkeys(("ref_model", "reference_model", "ref_model_path", "ref_model_name_or_path", "reference_free"), _REFERENCE),
    **dict.fromkeys(("use_peft", "finetuning_type", "peft_type", "lora_task_type", "use_lora"), _ADAPTERS),
    **dict.fromkeys(("critic_lr", "value_lr", "critic_learning_rate", "value_learning_rate"), _ONE_RATE),
    **dict.fromkeys(
        ("ent_coef", "entropy_coef", "entropy_coeff", "entropy_bonus"),
        "there is no bonus for entropy: the KL to the reference, priced at `objective.beta`, keeps the policy from collapsing",
    ),
    **dict.fromkeys(
        ("no_cuda", "device", "device_map", "use_gpu"), "a GPU is used where there is one; CUDA_VISIBLE_DEVICES= hides it"
    ),
    "load_in_8bit": "only `model.quantization` 4bit is there",
    "rpo_alpha": "give `dpo.loss_type` [sigmoid, sft] and `dpo.loss_weights` [1, alpha] in its place",
    "use_vllm": "completions are sampled by the policy's own modules, whose log-probabilities the losses read",
}  # fmt: skip


def meant(name: str, section: str | None, sections: dict[str, Iterable[str]], stage: str | None = None) -> str | None:
    """What to write in place of a key that a section does not have; None where only its spelling can tell.

    Args:
        name: the key, or an option without a section.
        section: where it stands.
        sections: every section's keys.
        stage: the section of the stage at hand, which is named alone where it has the key.
    """
    name = re.sub(r"[- ]", "_", name).lower()
    for own in (stage, section):
        if own is not None and own in sections and name in sections[own] and own != section:
            return f"that is `{own}.{name}`"
    if name in ABSENT:
        return ABSENT[name]
    stages = [own for own in sections if "learning_rate" in sections[own]]
    found = []
    for key in MEANT.get(name, ()):
        own, _, meaning = key.partition(".")
        if own != "*":
            found.append(key)
            continue
        having = [s for s in stages if meaning in sections[s]]
        here = next((s for s in (section, stage) if s in having), None)
        found += [f"{s}.{meaning}" for s in ([here] if here else having)]
    if not found:
        found = [f"{own}.{name}" for own, keys in sections.items() if own != section and name in keys]
    return "that is " + " or ".join(f"`{key}`" for key in found) if found else None
