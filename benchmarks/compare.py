"""This repository's PPO and DPO against stock TRL on the same work.

    python benchmarks/compare.py [--shapes imdb wide] [--runs 3] [--model PATH] [--json FILE]

Alternates processes of both sides and prints medians: samples a second, peak memory above the imports', where the time goes,
and the floor: the matrix products of an update at this machine's measured rate. `imdb` is the shipped backbone, 64 prompts
and 32 tokens an update; `wide` is 8 layers of random weights with a vocabulary of 151,936, 16 x 32 tokens; four PPO epochs.
The third side is stock TRL with this repository's matrix products (rlhf_recipes/models/matmul.py), where they apply.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes import environment
from rlhf_recipes.process import progress_bar
from rlhf_recipes.recipe.loading import DEFAULT_RECIPE

ROOT = Path(__file__).resolve().parent.parent
# suffix -> (stage, our dtype, stock's dtype)
KINDS = {"": ("ppo", "float32", "float32"), "-bfloat16": ("ppo", "bfloat16", "float32"), "-dpo": ("dpo", "float32", "float32")}
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
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(work))]
    own = environment.waiting() if work.side == "ours" else {}  # as a script of ours sets it before torch is imported
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
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


def main(argv: list[str] | None = None) -> dict | None:
    environment.tolerate_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["imdb", "wide"], default=["imdb", "wide"])
    parser.add_argument("--model", help="a folder or a Hub id of a causal LM to measure instead of the shapes")
    parser.add_argument("--kinds", nargs="+", choices=["ppo", "bfloat16", "dpo"], default=["ppo", "bfloat16", "dpo"])
    parser.add_argument("--batch", type=int, help="episodes an update (default: 64, and 16 for `wide`)")
    parser.add_argument("--runs", type=int, default=3, help="processes of each side")
    parser.add_argument("--updates", type=int, default=3, help="timed updates in each process, after one that warms up")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")
    args = parser.parse_args(argv)
    if args.json is not None and (args.json.exists() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: " + ("exists; nothing is overwritten" if args.json.exists() else "no such folder"))
    with tempfile.TemporaryDirectory() as folder:
        models = {"imdb": str(DEFAULT_RECIPE / "checkpoints" / "backbone"), "wide": folder}
        if args.model:
            models, args.shapes = {Path(args.model).name: args.model}, [Path(args.model).name]
        plan = {}
        for shape in args.shapes:
            for suffix, (stage, ours, stock) in KINDS.items():
                if (suffix.lstrip("-") or "ppo") in args.kinds:
                    common = {"stage": stage, "model": models[shape], "batch": args.batch or (16 if shape == "wide" else 64),
                              "response": 32, "updates": args.updates, "threads": args.threads}  # fmt: skip
                    plan[shape + suffix] = {
                        "ours": Work("ours", dtype=ours, **common),
                        "stock": Work("stock", dtype=stock, onednn=False, **common),
                        "stock_onednn": Work("stock", dtype=stock, **common),
                    }
        if args.dry_run:
            print(json.dumps({name: list(map(str, works.values())) for name, works in plan.items()}, indent=2))
            return None
        if "wide" in args.shapes:
            build_wide(Path(folder))
        try:
            results = {name: compare(works, args.runs, name) for name, works in plan.items()}
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
