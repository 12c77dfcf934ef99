"""This repository's PPO and DPO against stock TRL on the same work.

    python scripts/benchmark.py [--shapes imdb wide] [--runs 3] [--model PATH] [--json FILE]

Alternates processes of both sides and prints medians: samples a second, peak memory above the imports', where the time goes,
and the floor: the matrix products of an update at this machine's measured rate. `imdb` is the shipped backbone, 64 prompts
and 32 tokens an update; `wide` is 8 layers of random weights with a vocabulary of 151,936, 16 x 32 tokens; four PPO epochs.
The third side is stock TRL with this repository's matrix products (rlhf_recipes/matmul.py), where they apply.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rlhf_recipes import environment
from rlhf_recipes.benchmark import BenchmarkError, Work, build_wide, compare, table
from rlhf_recipes.recipe import DEFAULT_RECIPE

# suffix -> (stage, our dtype, stock's dtype)
KINDS = {"": ("ppo", "float32", "float32"), "-bfloat16": ("ppo", "bfloat16", "float32"), "-dpo": ("dpo", "float32", "float32")}


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
