"""What tests/test_processes.py runs in every process of `accelerate launch`: one JSON file a rank is its answer.

accelerate launch ... tests/processes_worker.py RECIPE FOLDER STEPS...
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState

from rlhf_recipes.process import configure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.test_ppo_trainer import Scripted, build_trainer, drawn, logs_of

PROMPT, RESPONSES = [1, 70, 80], [[5 + i, 9, 30 + 7 * i, 11, 12, 13][: 1 + i % 6] + [0] * (5 - i % 6) for i in range(8)]


def trained(trainer):
    return {n: p for m in (trainer.roles.policy, trainer.roles.value) for n, p in m.named_parameters() if p.requires_grad}


def fixed_gradient(recipe_folder, folder):
    """The gradient of one step on RESPONSES, each process holding its share; policy away from the reference."""
    state = PartialState()
    mine = torch.arange(state.process_index, 8, state.num_processes)
    settings = {"ppo__per_device_train_batch_size": len(mine), "ppo__num_ppo_epochs": 1, "ppo__kl": "full"}
    trainer = build_trainer(recipe_folder, folder, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trained(trainer).items():
            if "lora_B" in name or "score" in name:
                parameter.normal_(std=0.1, generator=generator)
    queries, sampled = torch.tensor([PROMPT] * len(mine)), drawn(PROMPT, [RESPONSES[i] for i in mine])
    with mock.patch.object(trainer.roles, "sampler", Scripted(sampled)):
        rollout = trainer.rollout(queries, torch.ones_like(queries), {"prompt": ["a prompt"] * len(mine)})
    seen = {}

    def keep(*args, **kwargs):
        seen.update({name: p.grad.clone() for name, p in trained(trainer).items()})

    trainer.optimizer.zero_grad = keep
    trainer.update(rollout, trainer.ppo.advantages(rollout, trainer.ppo.rewards(rollout)))
    return {name: gradient.tolist() for name, gradient in seen.items()}


def every_update(recipe_folder, folder):
    """Per update: a hash of the trained weights, the sampled tokens, and this process's own means."""
    settings = {"ppo__per_device_train_batch_size": 4, "ppo__num_mini_batches": 2, "ppo__total_episodes": 24}
    trainer = build_trainer(recipe_folder, folder, **settings)
    updates, update = [], trainer.update

    def watched(rollout, advantages):
        stats = update(rollout, advantages)
        weights = b"".join(p.detach().numpy().tobytes() for p in trained(trainer).values())
        updates.append({
            "weights": hashlib.sha256(weights).hexdigest(),
            "tokens": rollout.query_responses.tolist(),
            "objective/scores": rollout.scores.total.mean().item(),
            "objective/kl": rollout.kl.sum(1).mean().item(),
            "loss/policy_avg": stats["loss/policy_avg"].mean().item(),
        })  # fmt: skip
        return stats

    trainer.update = watched
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return {"updates": updates, "logs": logs_of(trainer)}


def scripts(recipe_folder, folder):
    """Every stage by its script, in one process group."""
    from scripts import a2c, dpo, evaluate, ppo, preferences, reward, sft

    stages = {"sft": sft, "reward": reward, "preferences": preferences, "ppo": ppo, "a2c": a2c, "dpo": dpo}
    common = ["--recipe", str(recipe_folder), "--run.output", str(folder), "--run.name", "run"]
    for name, script in stages.items():
        rounds = ["--dpo.rounds", "2", "--preferences.label", "expected"] if name == "dpo" else []
        held_out = ["--ppo.eval_strategy", "steps", "--ppo.eval_steps", "1", "--ppo.metric_for_best_model", "objective",
                    "--ppo.load_best_model_at_end", "true"] if name == "ppo" else []  # fmt: skip
        script.main([*common, *rounds, *held_out])
    evaluate.main(common)


def rewards(recipe_folder, folder):
    """Two updates on every kind of reward; and one that fails in the last process alone. The exit code of each."""
    from scripts import ppo

    foreign = {"model": os.environ["FOREIGN_REWARD"], "label": "good", "name": "foreign"}
    kinds = {
        "adapter": [{"adapter": "checkpoints/reward"}],
        "function": [{"function": "gold_reward"}],
        "async": [{"function": "wordy"}],
        "model": [foreign],
        "sum": [{"adapter": "checkpoints/reward"}, {"function": "wordy", "weight": 0.5}, foreign],
        "failing": [{"function": "fails_in_the_last_process"}],
        "skipping": [{"function": "fails_in_the_last_process", "on_error": "skip"}],
    }
    shaping = ["--reward.normalize", "true", "--reward.clip", "3", "--reward.length_penalty", "0.01"]
    answers = {}
    for kind, terms in kinds.items():
        words = ["--recipe", recipe_folder, "--run.output", folder / "rewards", "--run.name", kind, "--reward.read_eos", "true"]
        words += ["--reward.adapter", "null", "--reward.terms", json.dumps(terms), *(shaping if kind == "sum" else [])]
        try:
            summary = ppo.main(list(map(str, words)))
            answers[kind] = summary["policy"]["reward"]
        except SystemExit as stop:
            answers[kind] = f"exit {stop.code}"
    return answers


def going_on(recipe_folder, folder):
    """PPO and DPO twice, and once with a signal to the last process alone, after which they are resumed; what differs."""
    import pytest

    from tests.test_resume import COMPARED, STAGES, run, stop_at, terminated

    state, differ = PartialState(), {}
    for stage in ("ppo", "dpo"):
        words, _ = STAGES[stage]
        for name in ("first", "second"):
            run(stage, recipe_folder, folder, name, *words)
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 3, terminated if state.is_last_process else lambda: None)
            try:
                run(stage, recipe_folder, folder, "interrupted", *words)
            except SystemExit as stop:
                differ[f"{stage} code"] = stop.code
        state.wait_for_everyone()
        run(stage, recipe_folder, folder, "unread", "--resume", str(folder / "tiny" / stage / "interrupted"))
        state.wait_for_everyone()
        first, *others = (folder / "tiny" / stage / name for name in ("first", "second", "interrupted"))
        names = [name for name in COMPARED if (first / name).is_file()]
        differ[stage] = [f"{o.name}/{n}" for o in others for n in names if (o / n).read_bytes() != (first / n).read_bytes()]
        differ[f"{stage} files"] = names
    return differ


if __name__ == "__main__":
    recipe_folder, folder, steps = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    configure(seed=0)
    answers = {step: globals()[step](recipe_folder, folder) for step in steps}
    (folder / f"rank{PartialState().process_index}.json").write_text(json.dumps(answers))
