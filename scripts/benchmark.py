"""This repository's PPO and DPO against stock TRL on the same work.

    python scripts/benchmark.py [--shapes imdb wide] [--runs 3] [--model PATH] [--json FILE]

Alternates processes of both sides and prints medians: samples a second, peak memory above the imports', where the time goes,
and the floor: the matrix products of an update at this machine's measured rate. `imdb` is the shipped backbone, 64 prompts
and 32 tokens an update; `wide` is 8 layers of random weights with a vocabulary of 151,936, 16 x 32 tokens; four PPO epochs.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rlhf_recipes.benchmark import Work, build_wide, measure
from rlhf_recipes.recipe import DEFAULT_RECIPE
from rlhf_recipes.runtime import progress_bar

# name -> (stage, our dtype, stock's dtype)
KINDS = {"": ("ppo", "float32", "float32"), "-bfloat16": ("ppo", "bfloat16", "float32"), "-dpo": ("dpo", "float32", "float32")}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["imdb", "wide"], default=["imdb", "wide"])
    parser.add_argument("--model", help="a folder or a Hub id of a causal LM to measure instead of the shapes")
    parser.add_argument("--kinds", nargs="+", choices=["ppo", "bfloat16", "dpo"], default=["ppo", "bfloat16", "dpo"])
    parser.add_argument("--batch", type=int, help="episodes an update (default: 64, and 16 for `wide`)")
    parser.add_argument("--runs", type=int, default=3, help="processes of each side")
    parser.add_argument("--updates", type=int, default=3, help="timed updates in each process, after one that warms up")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    if args.json is not None and args.json.exists():
        parser.error(f"{args.json} exists; nothing is overwritten")
    with tempfile.TemporaryDirectory() as folder:
        models = {"imdb": str(DEFAULT_RECIPE / "checkpoints" / "backbone"), "wide": folder}
        if args.model:
            models, args.shapes = {Path(args.model).name: args.model}, [Path(args.model).name]
        elif "wide" in args.shapes:
            build_wide(Path(folder))
        results = {}
        for shape in args.shapes:
            for suffix, (stage, ours, stock) in KINDS.items():
                if (suffix.lstrip("-") or "ppo") in args.kinds:
                    batch = args.batch or (16 if shape == "wide" else 64)
                    common = {"stage": stage, "model": models[shape], "batch": batch, "response": 32,
                              "updates": args.updates, "threads": args.threads}  # fmt: skip
                    works = {
                        "ours": Work("ours", dtype=ours, **common),
                        "stock": Work("stock", dtype=stock, onednn=False, **common),
                        "stock, our products": Work("stock", dtype=stock, **common),
                    }
                    results[shape + suffix] = compare(works, args.runs, shape + suffix)
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def compare(works: dict[str, Work], runs: int, title: str) -> dict:
    """Medians over alternating processes of each side, and what ours is in units of stock's."""
    order = [side for _ in range(runs) for side in works]
    measured: dict[str, list[dict]] = {side: [] for side in works}
    for side in progress_bar(order, desc=title):
        measured[side].append(measure(works[side]))
    result: dict = {side: _medians(measurements) for side, measurements in measured.items()}
    numbers = ("samples_per_second", "peak_memory_mb")
    result["ratio"] = {name: result["ours"][name] / result["stock"][name] for name in numbers}
    floors = [m["floor_seconds"] for m in measured["ours"]]
    result["floor_ratio"] = None if floors[0] is None else result["ours"]["seconds"] / statistics.median(floors)
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


if __name__ == "__main__":
    main()
