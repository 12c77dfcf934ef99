"""A model's sizes, read from its config.json by whatever names its family has for them; nothing heavy is imported."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# transformers' `attribute_map`s, and names that it has no common one for; the first that is there counts.
_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "emb_dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "key_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_width": ("head_dim", "attention_head_dim", "kv_channels"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dff", "dim_ff", "d_inner"),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "model_max_length"),
    "vocabulary": ("vocab_size", "n_words", "n_token"),
}
_TEXT_PARTS = ("text_config", "llm_config", "language_config")  # of a config that holds several models


@dataclass(frozen=True)
class Sizes:
    """What is not said is what a small GPT-2 has, but for `positions`: None is no limit."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    key_heads: int = 12  # of keys and values
    head_width: int = 64
    inner: int = 3072  # of the feed-forward layer, over the experts that a token goes through
    positions: int | None = None
    vocabulary: int = 32000


def sizes_of(config: dict[str, Any]) -> Sizes:
    """Of a config.json's content; what is no whole number above 0 is transformers' to refuse."""
    config = text_part(config)
    found = {name: _first(config, names) for name, names in _NAMES.items()}
    known = {name: value for name, value in found.items() if value is not None}
    hidden, heads = known.get("hidden", Sizes.hidden), known.get("heads", Sizes.heads)
    experts = _first(config, ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")) or 1
    inner = (_first(config, ("moe_intermediate_size",)) or known.get("inner", 4 * hidden)) * experts
    defaults = {"key_heads": 1 if config.get("multi_query") is True else heads, "head_width": hidden // heads}
    return Sizes(**defaults | known | {"inner": inner})


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model, which Gemma 3 and others keep inside that of the whole."""
    for name in _TEXT_PARTS:
        if isinstance(config.get(name), dict):
            return config | config[name]
    return config


def _first(config: dict[str, Any], names: Iterable[str]) -> int | None:
    return next((config[name] for name in names if type(config.get(name)) is int and config[name] > 0), None)
