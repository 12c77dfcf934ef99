"""Completions: sampling them, and one forward pass over them."""
