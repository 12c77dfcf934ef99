"""A long run: a thousand updates with evaluations and checkpoints, in memory that does not grow."""

import psutil
import pytest

from rlhf_recipes.runs.trainer import Keeper
from tests.test_resume import run

UPDATES, WARM_UP = 1200, 200


@pytest.mark.slow
def test_a_thousand_updates_in_flat_memory(tiny, tmp_path, monkeypatch):
    me, seen, keep = psutil.Process(), {}, Keeper.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % WARM_UP == 0:
            seen[state.global_step] = (me.memory_info().rss / 2**20, me.num_fds(), me.num_threads())
        return keep(self, args, state, control, **kwargs)

    monkeypatch.setattr(Keeper, "on_step_end", on_step_end)
    words = [f"--ppo.total_episodes={8 * UPDATES}", "--ppo.save_steps=25", "--ppo.eval_strategy=steps", "--ppo.eval_steps=25"]
    run("ppo", tiny, tmp_path, "long", *words)
    for step, (memory, files, threads) in seen.items():
        print(f"update {step}: {memory:.0f} MiB, {files} files, {threads} threads")
    assert len(seen) == UPDATES // WARM_UP
    (memory, files, threads), last = seen[WARM_UP], seen[UPDATES]
    assert last[0] < 1.05 * memory
    assert last[1:] == (files, threads)
