"""Sweeps: file, search space, worker, results."""
