"""The tool that kills runs: it sees what differs, and on the tiny recipe nothing does."""

import sys

import pytest

from tests import chaos


def test_what_differs_is_seen(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, run):
        folder.mkdir()
        (folder / "metrics.jsonl").write_bytes(b"the same")
        (folder / "value.safetensors").write_bytes(b"the same")
        (folder / "timing.jsonl").write_text(folder.name)  # never the same
    assert chaos.differences(whole, run) == []
    (run / "value.safetensors").write_bytes(b"the samf")
    (run / "metrics.jsonl").unlink()
    assert chaos.differences(whole, run) == ["value.safetensors", "metrics.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "reward"])
def test_the_tiny_recipe_survives_four_kills(stage, tiny, tmp_path, monkeypatch, capsys):
    words = ["--stage", stage, "--kills", "4", "--recipe", str(tiny), "--output", str(tmp_path / "chaos")]
    monkeypatch.setattr(sys, "argv", ["chaos", *words])
    assert chaos.main() == 0
    assert capsys.readouterr().out.count("| identical |") == 4
