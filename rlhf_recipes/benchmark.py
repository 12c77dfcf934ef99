"""The same PPO or DPO work done by this repository and by stock TRL: processes in turn, their medians, a table.

benchmark_worker.py is what runs in each process.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.environment import waiting
from rlhf_recipes.recipe import DEFAULT_RECIPE
from rlhf_recipes.runtime import progress_bar

WIDE = {
    "model_type": "llama", "vocab_size": 151_936, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip


class BenchmarkError(Exception):
    """A measurement's process failed; the message has its last words."""


@dataclass(frozen=True)
class Work:
    """One measurement: who does what on which model."""

    side: str  # "ours" or "stock"
    stage: str  # "ppo" or "dpo"
    model: str  # a folder or a Hub id
    dtype: str  # of the backbone
    batch: int  # episodes, or pairs, an update
    response: int  # tokens
    updates: int  # timed ones; one more warms up
    epochs: int = 4
    threads: int = 0  # 0: all cores
    onednn: bool = True  # matmul.py's products, on machines where they apply


def measure(work: Work) -> dict[str, Any]:
    """Runs `work` in a process of its own.

    Returns:
        seconds (of an update), samples_per_second, peak_memory_mb (above the imports'), phases (seconds of an update), and
        of our PPO floor_seconds.

    Raises:
        BenchmarkError: the process failed.
    """
    command = [sys.executable, "-m", "rlhf_recipes.benchmark_worker", json.dumps(asdict(work))]
    own = waiting() if work.side == "ours" else {}  # as a script of ours sets it before torch is imported
    done = subprocess.run(  # noqa: S603 - a module of ours
        command, capture_output=True, text=True, env=os.environ | own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchmarkError(f"{work} ended with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(works: dict[str, Work], runs: int, title: str) -> dict:
    """Medians over alternating processes of each side, and what ours is in units of stock's."""
    order = [side for _ in range(runs) for side in works]
    measured: dict[str, list[dict]] = {side: [] for side in works}
    for side in progress_bar(order, desc=title):
        measured[side].append(measure(works[side]))
    result: dict = {side: _medians(measurements) for side, measurements in measured.items()}
    numbers = ("samples_per_second", "peak_memory_mb")
    result["ratio"] = {name: result["ours"][name] / result["stock"][name] for name in numbers}
    floors = [m["floor_seconds"] for m in measured["ours"] if "floor_seconds" in m]
    result["floor_ratio"] = result["ours"]["seconds"] / statistics.median(floors) if floors else None
    return result


def _medians(measurements: list[dict]) -> dict:
    names = ("seconds", "samples_per_second", "peak_memory_mb")
    phases = {name: statistics.median(m["phases"][name] for m in measurements) for name in measurements[0]["phases"]}
    return {name: statistics.median(m[name] for m in measurements) for name in names} | {"phases": phases}


def table(results: dict) -> str:
    lines = ["| work | side | samples/s | peak memory, MB | s an update: where |", "| --- | --- | --- | --- | --- |"]
    for name, result in results.items():
        for side in [key for key in result if key not in ("ratio", "floor_ratio")]:
            m = result[side]
            where = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in m["phases"].items() if seconds >= 0.01)
            numbers = f"{m['samples_per_second']:.1f} | {m['peak_memory_mb']:,.0f} | {m['seconds']:.2f}: {where}"
            lines.append(f"| {name} | {side} | {numbers} |")
        speed, memory = result["ratio"]["samples_per_second"], result["ratio"]["peak_memory_mb"]
        floor = "" if result["floor_ratio"] is None else f"{result['floor_ratio']:.1f} times the floor"
        lines.append(f"| {name} | **ours : stock** | **{speed:.1f}x** | **{memory:.2f}x** | {floor} |")
    return "\n".join(lines)


def build_wide(folder: Path) -> None:
    """A model of random weights with a real vocabulary, and imdb's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_RECIPE / "checkpoints" / "backbone", trust_remote_code=False)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIDE, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
