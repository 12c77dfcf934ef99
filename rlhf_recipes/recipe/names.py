"""Names that people bring from transformers, TRL and other libraries, and the keys of a recipe that are meant by them."""

import re
from collections.abc import Iterable, Mapping

# keys: the names that mean one of them; `*` is the stage's own section
_MEANT_BY = {
    "data.max_completion_tokens": (
        "max_new_tokens response_length max_tokens max_completion_length max_response_length generate_max_len "
        "max_target_length generation_max_length max_completion_len response_len max_output_tokens"
    ),
    "data.max_prompt_tokens": (
        "max_prompt_length max_query_length query_length max_input_length prompt_max_len max_source_length max_prompt_len "
        "prompt_length"
    ),
    "*.max_length": "max_seq_length max_seq_len cutoff_len seq_length block_size max_len",
    "objective.beta": (
        "kl_coef init_kl_coef init_kl_coeff kl_coeff beta kl_beta kl_loss_coef kl_weight kl_ctl dpo_beta pref_beta "
        "kl_penalty_coef"
    ),
    "objective.beta ppo.kl_estimator": "kl_penalty",
    "ppo.kl_target": "adap_kl_ctrl target kl_target_value",
    "ppo.kl_horizon": "horizon",
    "preferences.pairs_per_prompt evaluate.completions": (
        "num_generations num_return_sequences n_samples_per_prompt rloo_k num_samples best_of"
    ),
    "sampling.temperature": "temperature",
    "sampling.stop": "stop stop_strings stop_sequences stop_words stop_token stop_token_id",
    "lora.r": "lora_r lora_rank rank lora_dim",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target_modules lora_target target_modules lora_modules",
    "*.learning_rate": "lr actor_lr policy_lr actor_learning_rate base_lr step_size",
    "*.per_device_train_batch_size": (
        "batch_size train_batch_size per_device_batch_size per_gpu_train_batch_size micro_batch_size micro_train_batch_size"
    ),
    "ppo.per_device_train_batch_size ppo.gradient_accumulation_steps": "rollout_batch_size num_rollouts",
    "ppo.num_mini_batches": "mini_batch_size minibatch_size ppo_mini_batch_size num_minibatches",
    "ppo.local_rollout_forward_batch_size": "forward_batch_size rollout_forward_batch_size micro_rollout_batch_size",
    "evaluate.batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "*.num_train_epochs": "epochs num_epochs n_epochs max_epochs train_epochs",
    "ppo.num_ppo_epochs": "ppo_epochs noptepochs update_epochs num_ppo_epoch num_iterations",
    "*.max_steps": "steps total_steps num_steps max_train_steps num_train_steps",
    "ppo.total_episodes": "total_timesteps num_episodes episodes total_ppo_epochs",
    "ppo.cliprange": "clip_range clip_coef clip_eps clip_ratio eps_clip cliprange_policy clip_epsilon cliprange_ratio",
    "ppo.cliprange_value": "clip_range_value clip_range_vf cliprange_val value_clip value_clip_range clip_value cliprange_vf",
    "ppo.vf_coef": "vf_loss_coef value_loss_coef value_coef critic_coef",
    "ppo.lam a2c.lam": "gae_lambda lambda lambd lambda_ gae_lam",
    "ppo.gamma a2c.gamma": "discount discount_factor",
    "*.max_grad_norm": "grad_clip gradient_clipping max_norm clip_grad_norm grad_norm_clip",
    "*.warmup_steps": "warmup_ratio lr_warmup_ratio num_warmup_steps lr_warmup_steps warmup",
    "*.lr_scheduler_type": "scheduler lr_scheduler scheduler_type lr_schedule",
    "*.optim": "optimizer optimizer_type",
    "*.weight_decay": "wd l2",
    "*.gradient_accumulation_steps": "grad_accum gradient_accumulation accumulate_grad_batches",
    "*.eval_strategy": "evaluation_strategy",
    "*.save_steps": "save_interval checkpoint_interval save_every save_freq",
    "*.train_sampling_strategy": "group_by_length",
    "dpo.loss_type": "loss dpo_loss",
    "run.tracker": "report_to log_with logger use_wandb tracker_name",
    "run.project": "wandb_project project_name tracker_project_name",
    "run.group": "wandb_group run_group group_name",
    "run.name": "run_name wandb_run_name wandb_name exp_name experiment_name",
    "run.output": "output_dir save_path save_dir output_path out_dir logging_dir",
    "run.seed": "seed data_seed random_seed",
    "run.resume": "resume_from_checkpoint load_checkpoint from_checkpoint",
    "model.path": (
        "model_name_or_path model_name model_id pretrain base_model pretrained_model_name_or_path sft_model_path "
        "actor_model_path model_path backbone tokenizer_name tokenizer_name_or_path tokenizer"
    ),
    "model.dtype": "torch_dtype bf16 fp16 precision mixed_precision bnb_4bit_compute_dtype",
    "model.quantization": "load_in_4bit use_4bit quantization_bit bits quantization_config bnb_4bit_quant_type",
    "model.attention": (
        "attn_implementation flash_attn use_flash_attention_2 use_flash_attn attn_impl attention_implementation"
    ),
    "model.chat_template": "template chat_template_path",
    "reward.model": "reward_model reward_model_path rm_path reward_pretrain reward_model_name_or_path rm",
    "reward.function": "reward_fn reward_func reward_funcs reward_function reward_functions",
    "reward.terms": "reward_weights rewards",
    "reward.adapter": "reward_adapter reward_model_adapter rm_adapter",
    "reward.clip": "cliprange_reward reward_clip reward_clip_range clip_reward",
    "reward.missing_eos_penalty": "non_eos_penalty penalty_reward_value missing_eos_penalty",
    "reward.normalize": "scale_rewards use_reward_scaling reward_norm normalize_reward scale_reward",
    "preferences.pairs_per_prompt": "num_pairs pairs",
    "merge.push": "push_to_hub hub_model_id push hub_repo repo_id",
    "merge.private": "hub_private_repo",
}
MEANT = {name: tuple(keys.split()) for keys, names in _MEANT_BY.items() for name in names.split()}
# why there is no such key: the names
_ABSENT = {
    "completions are drawn from all of pi(y|x), as the KL and the losses assume, at `sampling.temperature`": (
        "top_k top_p min_p typical_p num_beams do_sample repetition_penalty no_repeat_ngram_size"
    ),
    "the data come from the recipe's task.py: load_prompts, load_preferences and load_demonstrations": (
        "dataset_name dataset dataset_path data_path train_file dataset_config dataset_train_split dataset_test_split "
        "train_dataset eval_dataset prompt_data input_key dataset_num_workers"
    ),
    "the reference is `model.path` itself, which the policy's adapter starts from": (
        "ref_model reference_model ref_model_path ref_model_name_or_path reference_free"
    ),
    "every stage trains a LoRA adapter, whose keys are in `lora`": (
        "use_peft finetuning_type peft_type lora_task_type use_lora"
    ),
    "policy and value function learn at one rate, the stage's `learning_rate`": (
        "critic_lr value_lr critic_learning_rate value_learning_rate"
    ),
    "there is no bonus for entropy; the KL to the reference, priced at `objective.beta`, holds the policy": (
        "ent_coef entropy_coef entropy_coeff entropy_bonus"
    ),
    "a GPU is used where there is one; CUDA_VISIBLE_DEVICES= hides it": "no_cuda device device_map use_gpu",
    "only `model.quantization` 4bit is there": "load_in_8bit",
    "that is `ppo.kl: full` (or `a2c.kl: full`)": "full_kl",
    "that is `ppo.kl: loss` (or `a2c.kl: loss`)": "kl_loss use_kl_loss",
    "python recipes/lab/exact.py enumerates, for laboratories like recipes/lab": "exact",
    "there is one loop, which tests/test_parity.py compares with TRL's own": "loop",
    "give `dpo.loss_type` [sigmoid, sft] and `dpo.loss_weights` [1, alpha] in its place": "rpo_alpha",
    "completions are sampled by the policy's own modules, whose log-probabilities the losses read": "use_vllm",
}
ABSENT = {name: reason for reason, names in _ABSENT.items() for name in names.split()}


def meant(name: str, section: str | None, sections: Mapping[str, Iterable[str]], stage: str | None = None) -> str | None:
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
    others = [f"`{own}`" for own in stages if name in sections[own]]
    if not found and section in stages and others:
        return f"it is a key of {' and '.join(others)}, not of `{section}`"
    if not found:
        found = [f"{own}.{name}" for own, keys in sections.items() if own != section and name in keys]
    return "that is " + " or ".join(f"`{key}`" for key in found) if found else None
