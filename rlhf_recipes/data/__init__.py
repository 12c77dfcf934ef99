"""Text to token ids. What recipes' own scripts use can be had from here: `from rlhf_recipes.data import load_tokenizer`."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "load_tokenizer": "tokenizer",
    **dict.fromkeys(("encode_prompt", "encode_completion", "encode_pair"), "tokens"),
    **dict.fromkeys(("tokenize_prompts", "tokenize_pairs", "tokenize_demonstrations"), "datasets"),
}


def __getattr__(name: str) -> Any:
    """Imports the module of a public name as it is asked for (PEP 562): torch and transformers take seconds."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
