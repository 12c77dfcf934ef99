"""Tiny random models of transformers' causal language models, one entry a family, with their own default dropout."""

from pathlib import Path
from typing import Any

_LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR_ATTENTION = {
    "linear_conv_kernel_dim": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_TEXT = _LLAMA | {"head_dim": 8, "vocab_size": 300}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

# title -> (model_type, config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", _GPT2),
    "GPT-Neo": ("gpt_neo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                            "window_size": 8, "max_position_embeddings": 128}),
    "GPT-J": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "CodeGen": ("codegen", _GPT2 | {"rotary_dim": 4, "n_ctx": 128}),
    "GPT-NeoX": ("gpt_neox", _LLAMA),
    "BigCode": ("gpt_bigcode", _GPT2),
    "OPT": ("opt", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "word_embed_proj_dim": 32, "max_position_embeddings": 128}),
    "OPT with a projection": ("opt", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                                      "word_embed_proj_dim": 16, "do_layer_norm_before": False,
                                      "max_position_embeddings": 128}),
    "XGLM": ("xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128}),
    "Bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "Falcon, rotary": ("falcon", _LLAMA | {"alibi": False, "new_decoder_architecture": False}),
    "Falcon, alibi": ("falcon", _LLAMA | {"alibi": True, "multi_query": False, "new_decoder_architecture": False}),
    "Phi": ("phi", _LLAMA),
    "Phi-3": ("phi3", _LLAMA),
    "StableLM": ("stablelm", _LLAMA),
    "OLMo 2": ("olmo2", _LLAMA),
    "OLMo 3": ("olmo3", _LLAMA | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "Llama": ("llama", _LLAMA),
    "SmolLM3": ("smollm3", _LLAMA),
    "Mistral with a sliding window": ("mistral", _LLAMA | {"sliding_window": 8}),
    "Ministral": ("ministral", _LLAMA | {"head_dim": 8, "sliding_window": 8}),
    "Mixtral": ("mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": ("qwen2", _LLAMA),
    "Qwen2-MoE": ("qwen2_moe", _LLAMA | _MOE | {"shared_expert_intermediate_size": 16}),
    "Qwen3": ("qwen3", _LLAMA | {"head_dim": 8}),
    "Qwen3-MoE": ("qwen3_moe", _LLAMA | _MOE | {"head_dim": 8}),
    "Qwen3.5": ("qwen3_5_text", _LLAMA | _LINEAR_ATTENTION | {"head_dim": 8}),
    "Qwen3-Next": ("qwen3_next", _LLAMA | _MOE | _LINEAR_ATTENTION | {"head_dim": 8, "shared_expert_intermediate_size": 16}),
    "DeepSeek-V3": ("deepseek_v3", _LLAMA | {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8}),
    "OLMoE": ("olmoe", _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": ("gpt_oss", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}),
    "GLM-4": ("glm4", _LLAMA | {"head_dim": 8}),
    "Exaone 4": ("exaone4", _LLAMA | {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2}),
    "Starcoder2": ("starcoder2", _LLAMA),
    "LFM2": ("lfm2", _LLAMA | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}),
    "Gemma": ("gemma", _LLAMA | {"head_dim": 8}),
    "Gemma 2": ("gemma2", _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
                                    "final_logit_softcapping": 5.0}),
    "Gemma 3, text": ("gemma3_text", _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "Gemma 3 of 4B and more": ("gemma3", {"text_config": _TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 8},
                                          "vision_config": _VISION}),
    "Cohere": ("cohere", _LLAMA | {"logit_scale": 0.25}),
    "Cohere 2": ("cohere2", _LLAMA | {"logit_scale": 0.25, "sliding_window": 8}),
    "Granite": ("granite", _LLAMA | {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "Granite MoE": ("granitemoe", _LLAMA | {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ModernBERT decoder": ("modernbert-decoder", _LLAMA | {"local_attention": 16}),
    "BioGPT": ("biogpt", _LLAMA),
    "Seed-OSS": ("seed_oss", _LLAMA | {"head_dim": 8}),
    "Nemotron": ("nemotron", _LLAMA),
    "HunYuan": ("hunyuan_v1_dense", _LLAMA | {"head_dim": 8}),
    "ERNIE 4.5": ("ernie4_5", _LLAMA | {"head_dim": 8}),
    "Helium": ("helium", _LLAMA | {"head_dim": 8}),
    "Arcee": ("arcee", _LLAMA),
    "Apertus": ("apertus", _LLAMA),
    "Mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "Mamba 2": ("mamba2", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8,
                           "n_groups": 2, "chunk_size": 8}),
    "Falcon-H1": ("falcon_h1", _LLAMA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                                         "mamba_n_groups": 1, "mamba_chunk_size": 8, "lm_head_multiplier": 0.5}),
    "RecurrentGemma": ("recurrent_gemma", {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 32,
        "num_key_value_heads": 2, "attention_window_size": 16, "logits_soft_cap": 5.0}),
}  # fmt: skip


def write_family(title: str, folder: Path, tokenizer: Any, std: float = 0.15) -> Path:
    """A backbone of the family in `folder`, its matrices drawn wide enough for its distributions to be far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, values = FAMILIES[title]
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    rows = len(tokenizer) + 7  # as real models have them, a few more than tokens; some families' tokenizers add one
    nested = {"text_config": values["text_config"] | special} if "text_config" in values else {"vocab_size": rows}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values | nested | special))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
