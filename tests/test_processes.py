"""Several processes on CPUs, connected by gloo: the same gradients, the same adapters, every stage, two machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "processes_worker.py"
STEPS = ("fixed_gradient", "every_update", "scripts", "rewards", "going_on")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(config, *arguments, prefix=(), env=None, wait=True):
    command = [*prefix, *LAUNCH, "--config_file", ROOT / "accelerate_configs" / config, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
    process = subprocess.Popen(
        list(map(str, command)), env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return finish(process) if wait else process


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def answers(tiny, foreign, tmp_path_factory):
    """The folders of one process and of two, which have answered every question, the two jobs side by side."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    jobs = [
        launch(config, WORKER, tiny, folder, *STEPS, env={"FOREIGN_REWARD": str(foreign)}, wait=False)
        for config, folder in zip(("cpu.yaml", "multi_cpu.yaml"), folders, strict=True)
    ]
    for job in jobs:
        finish(job)
    return folders


@pytest.fixture(scope="module")
def one(answers):
    folder = answers[0]
    return json.loads((folder / "rank0.json").read_text()), folder


@pytest.fixture(scope="module")
def two(answers):
    """The answers of both processes to every question, and their folder."""
    folder = answers[1]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)], folder


def test_two_processes_give_the_gradient_of_one_with_the_whole_batch(one, two):
    """Rows of different lengths, whitened advantages, the full KL: everything that is averaged over tokens."""
    whole, (first, second) = one[0]["fixed_gradient"], [answers["fixed_gradient"] for answers in two[0]]
    assert whole.keys() == first.keys() == second.keys()
    assert sum(torch.tensor(g).norm() > 1e-4 for g in whole.values()) > 20
    for name, gradient in whole.items():
        assert first[name] == second[name], name
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(gradient), atol=1e-6, rtol=1e-4)


def test_ranks_draw_different_samples_and_keep_identical_adapters(two):
    first, second = (answers["every_update"]["updates"] for answers in two[0])
    assert len(first) == len(second) == 3
    for mine, theirs in zip(first, second, strict=True):
        assert mine["weights"] == theirs["weights"]
        assert mine["tokens"] != theirs["tokens"]
    assert len({update["weights"] for update in first}) == 3


def test_logged_metrics_are_the_mean_over_the_ranks(two):
    first, second = (answers["every_update"] for answers in two[0])
    for step, log in enumerate(first["logs"]):
        for name in ("objective/scores", "objective/kl", "loss/policy_avg"):
            mean = (first["updates"][step][name] + second["updates"][step][name]) / 2
            assert log[name] == pytest.approx(mean, rel=1e-5, abs=1e-7), name


def test_every_stage_runs_and_saves_once_what_one_process_saves(one, two):
    for stage in ("sft", "reward", "preferences", "ppo", "a2c", "dpo", "evaluate"):
        files = [sorted(str(p.relative_to(f / "tiny" / stage)) for p in (f / "tiny" / stage).rglob("*") if p.is_file())
                 for f in (one[1], two[1])]  # fmt: skip
        mine, theirs = ([f for f in names if "checkpoint-" not in f and "best-" not in f] for names in files)
        assert mine == theirs, stage
    for stage in ("ppo", "a2c", "dpo"):
        mine, theirs = (load_file(f / "tiny" / stage / "run" / "adapter_model.safetensors") for f in (one[1], two[1]))
        assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
        assert all(t.isfinite().all() for t in theirs.values())
        lines = (two[1] / "tiny" / stage / "run" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines if "objective/kl" in line or "rewards/margins" in line]
        assert len(steps) == len(set(steps)), stage
    pairs = [(f / "tiny" / "preferences" / "run" / "pairs.jsonl").read_text() for f in (one[1], two[1])]
    assert pairs[0] == pairs[1]


def test_every_kind_of_reward_trains_in_one_and_two_processes(one, two):
    for answers, folder in ((one[0], one[1]), (two[0][0], two[1])):
        ends = answers["rewards"]
        assert ends.pop("failing") == "exit 2"
        assert all(isinstance(reward, float) for reward in ends.values()), ends
        for kind, names in (("adapter", ["reward"]), ("async", ["wordy"]), ("sum", ["reward", "wordy", "foreign"])):
            lines = (folder / "rewards" / "tiny" / "ppo" / kind / "metrics.jsonl").read_text().splitlines()
            for line in (line for line in map(json.loads, lines) if "objective/kl" in line):
                assert [n for n in line if n.startswith("rewards/") and n.endswith("/mean")] == [
                    f"rewards/{n}/mean" for n in names
                ]
    assert two[0][1]["rewards"]["failing"] == "exit 2"  # the process whose reward failed, and the other one


def test_a_reward_that_fails_in_one_process_names_the_completion_and_skipping_counts_it(two):
    folder = two[1] / "rewards" / "tiny" / "ppo"
    [file] = (folder / "failing").glob("failed_reward-*.json")
    assert file.name == "failed_reward-fails_in_the_last_process-1.json"
    [row] = json.loads(file.read_text())
    assert row["what"] == "returned nan"
    assert row["prompt"]
    line = json.loads((folder / "skipping" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["rewards/skipped"] == pytest.approx(1 / 16)  # one of the second process's eight; none of the first's


def test_runs_repeat_and_go_on_bit_for_bit(one, two):
    """Also where a signal reaches one of two processes only."""
    for answers in (one[0], *two[0]):
        found = answers["going_on"]
        for stage, files in (
            ("ppo", {"adapter_model.safetensors", "value.safetensors"}),
            ("dpo", {"adapter_model.safetensors"}),
        ):
            assert found[f"{stage} code"] == 75
            assert found[stage] == []
            assert files | {"metrics.jsonl", "samples.jsonl"} <= set(found[f"{stage} files"])
    first, second = (f / "tiny" / "ppo" / "first" / "metrics.jsonl" for f in (one[1], two[1]))
    assert first.read_bytes() != second.read_bytes()  # two processes draw other samples


@pytest.fixture(scope="module")
def unsharded(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unsharded")
    launch("multi_cpu.yaml", ROOT / "tests" / "sharded_worker.py", tiny, folder)
    return folder


@pytest.mark.parametrize(
    ("config", "wrapper", "sharded"),
    [
        ("fsdp2", "FSDPPeftModel", True),
        # of ZeRO-3, this model's weights are all below the size from which it shards
        pytest.param("zero2", "DeepSpeedEngine", False, marks=pytest.mark.slow),
        pytest.param("zero3", "DeepSpeedEngine", False, marks=pytest.mark.slow),
    ],
)
def test_engines_that_shard_train_what_ddp_trains(tiny, tmp_path, unsharded, config, wrapper, sharded):
    if wrapper == "DeepSpeedEngine":
        pytest.importorskip("deepspeed")
    file = tmp_path / f"{config}.yaml"
    use_cpu = "use_cpu: true\n" if config == "fsdp2" else ""  # DeepSpeed is told by DS_ACCELERATOR
    file.write_text((ROOT / "accelerate_configs" / file.name).read_text() + use_cpu)
    worker = ROOT / "tests" / "sharded_worker.py"
    launch(file, "--num_processes", 2, worker, tiny, tmp_path, env={"DS_ACCELERATOR": "cpu"})
    held = json.loads((tmp_path / "rank0.json").read_text())
    if wrapper != "DeepSpeedEngine":
        assert held.pop("interrupted") == 75
        files = [tmp_path / "tiny" / "dpo" / run / "adapter_model.safetensors" for run in ("run", "interrupted")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert held.keys() == {"sft", "reward", "dpo"}
    assert all(name.startswith(wrapper) and (parts > 20) == sharded for name, parts in held.values()), held
    for weights in ("sft/run/model/model", "reward/run/adapter/adapter_model", "dpo/run/adapter_model"):
        mine, theirs = (load_file(f / "tiny" / f"{weights}.safetensors") for f in (tmp_path, unsharded))
        assert mine.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
def test_stages_that_cannot_be_sharded_say_why(tiny, monkeypatch, capsys, variable, name):
    from scripts import dpo, ppo

    monkeypatch.setenv(variable, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for script, more, message in ((ppo, [], f"launched with {name}"), (dpo, ["--dpo.rounds=2"], "`dpo.rounds` above 1")):
        with pytest.raises(SystemExit) as stop:
            script.main(["--recipe", str(tiny), *more])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_machines(tiny, tmp_path):
    """Two network namespaces with an address each, one training across both."""
    if os.geteuid() or subprocess.run(["ip", "netns", "add", "rlhf_probe"], capture_output=True).returncode:
        pytest.skip("needs the right to make network namespaces")
    subprocess.run(["ip", "netns", "del", "rlhf_probe"], check=True)
    names = ["rlhf_a", "rlhf_b"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    config = tmp_path / "multi_node.yaml"  # an absolute path, which `launch` takes as it is
    config.write_text((ROOT / "accelerate_configs" / "multi_node.yaml").read_text().replace("gpu_ids: all", "use_cpu: true"))
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "rlhf_va", "netns", "rlhf_a", "type", "veth", "peer", "name", "rlhf_vb", "netns", "rlhf_b")
        for name, device, address in zip(names, ("rlhf_va", "rlhf_vb"), ("10.77.0.1", "10.77.0.2"), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        processes = [
            launch(
                config, "--num_processes", 2, "--machine_rank", rank, "--main_process_ip", "10.77.0.1",
                WORKER, tiny, tmp_path, "every_update",
                prefix=["ip", "netns", "exec", name], env={"GLOO_SOCKET_IFNAME": device}, wait=False,
            )
            for rank, (name, device) in enumerate(zip(names, ("rlhf_va", "rlhf_vb"), strict=True))
        ]  # fmt: skip
        for process in processes:
            finish(process)
    finally:
        for name in names:
            ip("netns", "del", name)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text())["every_update"]["updates"] for rank in (0, 1))
    assert [u["weights"] for u in first] == [u["weights"] for u in second]
    assert first[0]["tokens"] != second[0]["tokens"]
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
