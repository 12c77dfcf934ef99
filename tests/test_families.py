"""transformers' model families, tiny and random: one number along every path, and every stage.

`python -m tests.test_families` makes docs/families.md anew from what it finds.
"""

import contextlib
import importlib
import io
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from rlhf_recipes.checks.models import path_gaps
from rlhf_recipes.data.datasets import tokenize_prompts
from rlhf_recipes.data.tokenizer import load_tokenizer, train_tokenizer
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.roles import build_roles
from rlhf_recipes.tasks import load_dataset, load_task
from tests.conftest import TASK
from tests.families import FAMILIES, write_family

DOCS = Path(__file__).resolve().parent.parent / "docs" / "families.md"
STAGES = ("sft", "reward", "ppo", "dpo", "evaluate", "merge")
CLOSE = 1e-5  # nats
# One of each kind of trunk, head, position, cache and mixture; pytest -m slow takes all of them through the stages.
FAST = (
    "GPT-2", "OPT with a projection", "Bloom", "MPT", "Falcon, alibi", "Phi-3", "Mistral with a sliding window", "Mixtral",
    "Qwen3.5", "DeepSeek-V3", "gpt-oss", "LFM2", "Gemma 2", "Gemma 3 of 4B and more", "Cohere", "Granite MoE",
    "ModernBERT decoder", "BioGPT", "Mamba", "Falcon-H1",
)  # fmt: skip
REFUSED = {"RecurrentGemma": "hands over no cache to sample with"}
RECIPE = """
model: {path: checkpoints/backbone}
lora: {r: 4, alpha: 8}
reward: {adapter: out/family/reward/run/adapter}
objective: {beta: 0.05}
data: {max_prompt_tokens: 24, max_completion_tokens: 6}
run: {tracker: none, output: out, name: run}
evaluate: {prompts: 4, batch_size: 4, samples: 1, completions: 1, reference_completions: 2,
           policies: [ppo=out/family/ppo/run, dpo=out/family/dpo/run]}
sft: {max_steps: 1, per_device_train_batch_size: 4, logging_steps: 1, max_length: 32}
reward_training: {max_steps: 1, per_device_train_batch_size: 4, logging_steps: 1}
ppo: {per_device_train_batch_size: 8, total_episodes: 8, num_ppo_epochs: 1, learning_rate: 1.0e-3}
dpo: {per_device_train_batch_size: 4, max_steps: 1, save_strategy: no, logging_steps: 1, learning_rate: 1.0e-3}
preferences: {source: task}
merge: {adapter: out/family/ppo/run}
"""


def write_recipe(title: str, folder: Path) -> Path:
    place = folder / "family"
    place.mkdir()
    (place / "recipe.yaml").write_text(RECIPE)
    (place / "task.py").write_text(TASK)
    tokenizer = train_tokenizer(["the film was great", "the plot was dull"] * 4, vocab_size=290)
    write_family(title, place / "checkpoints" / "backbone", tokenizer)
    return place


def largest_gap(place: Path) -> float:
    """Between any two paths to one log-probability, in nats, the policy moved on purpose; the value is an adapter's."""
    recipe = load_recipe(place, {"reward.adapter": None, "reward.function": "wordy"})
    tokenizer = load_tokenizer(recipe)
    prompts = tokenize_prompts(load_dataset(load_task(recipe), "load_prompts", "train"), tokenizer, 24, limit=10)
    roles = build_roles(recipe, tokenizer, value="adapter")
    return max(gaps.max().item() for gaps in path_gaps(roles, prompts, recipe.lora, recipe.run.seed).values())


def run_stages(place: Path) -> dict[str, str]:
    """stage -> "" where it ended well, else its one line; what comes after needs it and is left out."""
    said = {}
    for stage in STAGES:
        screen = io.StringIO()
        try:
            with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
                importlib.import_module(f"scripts.{stage}").main(["--recipe", str(place)])
            said[stage] = ""
        except SystemExit as stop:
            errors = [line for line in screen.getvalue().splitlines() if line.startswith("error: ")]
            said[stage] = errors[0] if stop.code == 2 else f"exit code {stop.code}: {errors}"
    return said


@pytest.mark.parametrize("title", FAMILIES)
def test_one_number_along_every_path(title, tmp_path):
    place = write_recipe(title, tmp_path)
    if title in REFUSED:
        with pytest.raises(RecipeError, match=REFUSED[title]):
            largest_gap(place)
    else:
        assert largest_gap(place) < CLOSE


@pytest.mark.parametrize("title", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in FAMILIES])
def test_every_stage(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = write_recipe(title, tmp_path)
    said = run_stages(place)
    if title in REFUSED:
        assert REFUSED[title] in said["sft"]
        assert REFUSED[title] in said["ppo"]
        assert not (tmp_path / "out" / "family" / "ppo").exists()
        return
    assert set(said.values()) == {""}, said
    run = tmp_path / "out" / "family"
    first = json.loads((run / "dpo" / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)  # a new policy is the reference
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-6)
    merged = json.loads((run / "merge" / "run" / "summary.json").read_text())
    assert merged["difference"] < 1e-4


def test_the_table_in_the_docs_has_every_family():
    rows = [line.split("|") for line in DOCS.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[1].strip() for row in rows[1:]] == list(FAMILIES)


def write_table() -> None:
    """docs/families.md, from what is found now."""
    lines = [
        "# Model families", "",
        "Tiny random models of transformers' causal language models, with their configs' own dropout, made and run by",
        "`python -m tests.test_families` (float32, a CPU). The gap is the largest difference, in nats, between any two paths",
        "to one log-probability of a policy whose adapter was moved on purpose: as its tokens are sampled, as the training",
        "pass computes them, and as plain transformers and PEFT give them for one row without padding; and of the reference",
        "against the plain backbone. The stages are sft, reward, ppo, dpo, evaluate and merge, each on what those before it",
        "made.", "",
        "| family | `model_type` | gap | stages |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    home = Path.cwd()
    for title, (model_type, _) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            place = write_recipe(title, Path(folder))
            try:
                gap = f"{largest_gap(place):.1e}"
                said = [f"{stage}: {words}" for stage, words in run_stages(place).items() if words]
                stages = "; ".join(said) or "all"
            except RecipeError as error:
                gap, stages = "", f"refused: {error}"
        lines.append(f"| {title} | `{model_type}` | {gap} | {stages} |")
        print(lines[-1], file=sys.stderr)
    assert Path.cwd() == home
    DOCS.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_table()
