"""What tests/test_processes.py runs under FSDP 2 and ZeRO: accelerate launch ... tests/sharded_worker.py RECIPE FOLDER

On CPUs accelerate calls a group of processes MULTI_CPU and passes over the FSDP plugin: it would silently run DDP. Called
MULTI_GPU, the group shards. DeepSpeed wants gloo named, and `use_cpu` off.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from rlhf_recipes.algorithms import dpo as dpo_trainer
from rlhf_recipes.recipe.stages import STAGES
from rlhf_recipes.runs import sharding as engines

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

init = PartialState.__init__


def sharding_init(self, *args, **kwargs):
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def shards_of(trainer):
    """How many of the model's parameters are not whole in this process."""
    return sum(isinstance(p, DTensor) or p.numel() < getattr(p, "ds_numel", 0) for p in trainer.model_wrapped.parameters())


def interrupted(recipe, folder):
    """dpo, which a signal interrupts and which is then resumed; the exit code of the first."""
    import pytest

    from tests.test_resume import run, stop_at, terminated

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2, terminated)
        with pytest.raises(SystemExit) as stop:
            run("dpo", recipe, folder, "interrupted")
    run("dpo", recipe, folder, "unread", "--resume", f"{folder}/tiny/dpo/interrupted")
    return stop.value.code


def main(recipe, folder):
    """sft, reward and dpo by their scripts; prints what held the weights, and how many parameters were in parts."""
    seen = {}

    def watched(trainer, build):
        seen[stage] = [type(trainer.model_wrapped).__name__, shards_of(trainer)]
        return whole_model(trainer, build)

    whole_model = engines.whole_model
    with mock.patch.object(engines, "whole_model", watched), mock.patch.object(dpo_trainer, "whole_model", watched):
        for stage in ("sft", "reward", "dpo"):
            arguments = ["--recipe", recipe, "--run.output", folder, "--run.name", "run", "--sft.from_scratch=false"]
            if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
                section = STAGES[stage].section
                arguments += [f"--{section}.use_cpu=false", f"--{section}.ddp_backend=gloo"]
            importlib.import_module(f"scripts.{stage}").main(arguments)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            seen["interrupted"] = interrupted(recipe, folder)
    (Path(folder) / f"rank{PartialState().process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState.__init__ = sharding_init
    main(*sys.argv[1:])
