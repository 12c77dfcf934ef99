"""RLHF Recipes: maximise E[r(x, y)] - beta * KL(pi || pi_ref) with TRL trainers and LoRA policies."""

__version__ = "0.1.0"
