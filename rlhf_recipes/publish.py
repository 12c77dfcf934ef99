"""A trained policy as a model of its own: adapter and backbone merged, checked, with a card, on the Hub if asked."""

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data.tokenizer import end_token_ids
from rlhf_recipes.evaluation.tables import fenced, fraction_bound, markdown_table, markdown_text, optimum_text
from rlhf_recipes.metrics import SMALL_EFFECTIVE_SIZE, label_of
from rlhf_recipes.models.adapters import load_policy_adapter
from rlhf_recipes.models.backbone import load_backbone
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.sections import Recipe, resolved
from rlhf_recipes.rollouts.forward import model_inputs
from rlhf_recipes.runs.fingerprint import (
    OWN,
    RESOLVED,
    SUMMARY,
    another_backbone,
    describe_reward,
    differences,
    fingerprint,
    of_pairs,
    parts_of,
    recorded_fingerprint,
)
from rlhf_recipes.runs.folder import MODEL, Run
from rlhf_recipes.runs.resume import newest_run, trials_of

# The largest difference between log-probabilities before and after, in nats, by the dtype in which the model is saved: rounding
# of its weights, a few units in the last place of logits of order ten.
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}


def adapter_to_merge(given: str | None, runs: Path, folder: Path, ours: dict[str, Any]) -> Path:
    """`merge.adapter`: a run of a policy stage, a checkpoint of one, or any folder of an adapter; by default the PPO run that
    finished last, trials of sweeps aside.

    Args:
        runs: the folder of the task's runs.
        folder: the recipe's, beside which others are looked for.
        ours: the fingerprint of the backbone to merge into.

    Raises:
        RecipeError: there is none, or it was trained on another backbone.
    """
    if given is None:
        newest = newest_run(runs / "ppo")
        if newest is None:
            trials = trials_of(runs / "ppo")
            there = f"; there are {len(trials)} trials of sweeps, such as {trials[0]}" if trials else ""
            raise RecipeError(
                f"`merge.adapter`: no finished run of PPO in {runs / 'ppo'}; run scripts/ppo.py first, or name another with "
                f"--merge.adapter FOLDER{there}"
            )
        adapter = newest
    else:
        adapter = Path(resolved(given, folder))
    if not (adapter / "adapter_config.json").is_file():
        hint = "it has no adapter_config.json" if adapter.is_dir() else "no such folder"
        raise RecipeError(f"`merge.adapter` {given or adapter}: {hint}")
    if other := another_backbone(recorded_fingerprint(adapter.resolve()), ours):
        raise RecipeError(f"`merge.adapter` {given or adapter}: an adapter trained on {other}")
    return adapter.resolve()


@torch.no_grad()
def log_probabilities(model: PreTrainedModel | PeftModel, queries: Tensor, attention: Tensor) -> Tensor:
    """log pi(. | x) after each of `queries`, float64 [prompts, vocabulary].

    Args:
        queries: padded on the left, [prompts, tokens].
        attention: which of them are tokens, [prompts, tokens].
    """
    inputs = model_inputs(queries.to(model.device), attention.to(model.device))
    return model(**inputs).logits[:, -1].cpu().double().log_softmax(-1)


def merge(run: Run, tokenizer: PreTrainedTokenizerBase, adapter: Path, queries: Tensor, attention: Tensor) -> dict[str, float]:
    """Merges, saves under `model/`, loads what was saved, and compares.

    Args:
        queries, attention: prompts on which log-probabilities are compared, as `log_probabilities` takes them.

    Returns:
        {"difference", "tolerance", "kl"}: the largest difference of log-probabilities between adapter and what was saved, over
        the vocabulary and the prompts, what is allowed, and the mean KL between the two, in nats.

    Raises:
        RecipeError: the difference is beyond what rounding explains; nothing is left under `model/` for others to use.
    """
    recipe = run.recipe
    policy = load_policy_adapter(load_backbone(recipe.model, recipe.path(recipe.model.path)), adapter)
    before = log_probabilities(policy, queries, attention)
    merged: Any = policy.merge_and_unload()
    ends = end_token_ids(tokenizer, recipe.path(recipe.model.path))
    merged.generation_config = GenerationConfig(
        do_sample=True, temperature=recipe.sampling.temperature, top_k=0, top_p=1.0,  # the policy as it was trained and judged
        max_new_tokens=recipe.data.max_completion_tokens,
        eos_token_id=ends[0] if len(ends) == 1 else ends, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, stop_strings=recipe.sampling.stop,
    )  # fmt: skip
    run.save_backbone(merged, tokenizer)
    dtype, trusted = getattr(torch, recipe.model.save_dtype), recipe.model.trust_remote_code
    saved = AutoModelForCausalLM.from_pretrained(
        run.folder / MODEL, dtype=dtype, use_safetensors=True, trust_remote_code=trusted
    )
    after = log_probabilities(saved.float().eval(), queries, attention)
    difference = (after - before)[before > before.amax(-1, keepdim=True) - 10].abs().max().item()
    allowed = TOLERANCE[recipe.model.save_dtype]
    if not difference <= allowed:
        (run.folder / MODEL).rename(run.folder / f"{MODEL}-differs")
        raise RecipeError(
            f"the merged model's log-probabilities are up to {difference:.3g} nats from the adapter's, and rounding to "
            f"`model.save_dtype` {recipe.model.save_dtype} explains {allowed:g}; save in float32, or look at the adapter"
        )
    return {"difference": difference, "tolerance": allowed, "kl": (before.exp() * (before - after)).sum(-1).mean().item()}


# --- the card ----------------------------------------------------------------------------------------------------


def own_evaluation(runs: Path, adapter: Path, policy: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest evaluation that judged `adapter` by what it was trained for, and a line for each newer one that did not.

    Args:
        runs: the folder of the task's runs.
        policy: the adapter's fingerprint; of an adapter from elsewhere None, and any evaluation is taken.
    """
    files = (runs / "evaluate").glob("*/evaluation.json")
    passed: list[str] = []
    for file in sorted({file.resolve() for file in files}, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            evaluation = json.loads(file.read_text(encoding="utf-8"))
            names = [name for name, folder in evaluation["folders"].items() if Path(folder).resolve() == adapter]
        except (ValueError, LookupError, AttributeError, TypeError):
            passed.append(f"not on the card: {file}, as it is not what scripts/evaluate.py writes")
            continue
        if not names:
            continue
        judged_by = evaluation.get("judged_by") or recorded_fingerprint(file.parent)
        # pairs are no reward whose numbers another reward's could be taken for
        parts = [part for part in OWN if part != "reward" or not of_pairs(policy)]
        other = differences(policy, judged_by, parts, here="there")
        if not other:
            return evaluation | {"name": names[0], "judged_by": judged_by or {}}, passed
        passed.append(f"not on the card: {file.parent}, as this policy was trained for {'; '.join(other.values())}")
    return None, passed


def evaluation_table(evaluation: dict[str, Any] | None, summary: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table: what scripts/evaluate.py found, with intervals, else the numbers at the end of the
    policy's own run; [] without either."""
    if evaluation is not None:
        sides = {"reference": evaluation["policies"]["reference"], "this policy": evaluation["policies"][evaluation["name"]]}
        columns = _columns(sides["this policy"])
        optimum = evaluation["optimum"]
        bound = optimum.get("bound", optimum["effective_sample_size"] < SMALL_EFFECTIVE_SIZE)

        def cell(metrics: dict[str, dict[str, float]], key: str) -> str:
            if key not in metrics:
                return ""
            if bound and key == "fraction_of_optimum":
                return fraction_bound(metrics[key]["mean"])
            return "{mean:.3f} ({low:.3f} to {high:.3f})".format(**metrics[key])

        rows = [[side, *(cell(metrics, key) for key in columns)] for side, metrics in sides.items()]
        head = [f"{evaluation['prompts']} held-out prompts, 95% intervals", *map(label_of, columns)]
        sentence = optimum_text(optimum["objective"], optimum["effective_sample_size"], optimum["proposal"], bound)
        return [*markdown_table(head, rows), "", markdown_text(sentence)]
    if "policy" in summary:
        columns = _columns(summary["policy"])
        sides = {"reference": summary["reference"], "this policy": summary["policy"]}
        rows = [[side, *(f"{m[key]:.3f}" if key in m else "" for key in columns)] for side, m in sides.items()]
        return markdown_table([f"{summary['prompts']} held-out prompts", *map(label_of, columns)], rows)
    return []


def _columns(measured: dict[str, Any]) -> list[str]:
    terms = [name for name in measured if name.startswith("reward_")]  # of a sum
    return [name for name in ("reward", *terms, "gold", "kl", "objective", "fraction_of_optimum") if name in measured]


def objective_text(policy: dict[str, Any] | None) -> str:
    """What a policy maximises, and at which beta; empty where nobody knows."""
    parts = parts_of(policy)
    if "reward" not in parts:
        return ""
    reward = markdown_text(describe_reward(parts["reward"]))
    if of_pairs(policy):
        return f" on {reward}, at beta {parts['beta']:g},"
    return f" to maximise E[r] - {parts['beta']:g} KL from its backbone, with the reward r = {reward},"


def card(recipe: Recipe, adapter: Path, checked: dict[str, float]) -> str:
    """The model card: where it comes from, how good it is, and everything needed to make it again."""
    summary = json.loads((adapter / SUMMARY).read_text(encoding="utf-8")) if (adapter / SUMMARY).is_file() else {}
    values = summary.get("stage", "?"), summary.get("seed", recipe.run.seed)
    stage, seed = (markdown_text(str(value)) for value in values)  # a stranger's, perhaps
    resolved = adapter / RESOLVED
    source = resolved.read_text(encoding="utf-8") if resolved.is_file() else recipe.to_yaml()
    source = re.sub(r"^folder:.*\n", "", source, flags=re.MULTILINE)  # where it lay on this machine is nobody's business
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["trl", stage, "rlhf", "rlhf-recipes"]}
    if "/" in recipe.model.path and not Path(recipe.path(recipe.model.path)).is_dir():
        front["base_model"] = recipe.model.path
    versions = ", ".join(f"{package} {version(package)}" for package in ("trl", "transformers", "peft", "torch"))
    policy = recorded_fingerprint(adapter)
    evaluation, _ = own_evaluation(recipe.runs, adapter, policy)
    table = evaluation_table(evaluation, summary) or ["This policy has not been evaluated: `scripts/evaluate.py` does it."]
    judged_by = parts_of(evaluation["judged_by"] if evaluation else _end_of_run(resolved))
    if "reward" in judged_by and (policy is None or of_pairs(policy)) and (evaluation or "policy" in summary):
        reward = markdown_text(describe_reward(judged_by["reward"]))
        table += ["", f"Judged by the reward {reward}, J at beta {judged_by['beta']:g}."]
    return "\n".join([
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
        f"# {recipe.task}: {stage}", "",
        f"A policy trained by {stage.upper()}{objective_text(policy)} by the recipe `{recipe.task}` of RLHF Recipes, then "
        f"merged: no adapter is needed. Seed {seed}, commit {commit()}, {versions}.", "",
        "## Evaluation", "", *table, "",
        "## Merging", "",
        f"Saved in {recipe.model.save_dtype}. Log-probabilities of the next token are within {checked['difference']:.2g} nats "
        f"of those of backbone and adapter (tokens within e^-10 of the likeliest), a KL of {checked['kl']:.2g} nats.", "",
        "## Recipe", "", fenced(source.strip(), "yaml"), "",
    ])  # fmt: skip


def _end_of_run(resolved: Path) -> dict[str, Any] | None:
    """What a run judges its policy by at its end, which on given pairs is not what it maximised; None where nobody knows."""
    try:
        return fingerprint(load_recipe(resolved), "evaluate")
    except RecipeError:
        return None


def commit() -> str:
    """The commit of this repository, `+` where the tree has changes; "unknown" outside of one."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)  # noqa: S603, S607
        return done.stdout.strip()

    try:
        return (git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")) or "unknown"
    except OSError:  # no git
        return "unknown"


# --- the Hub -----------------------------------------------------------------------------------------------------


def upload(folder: Path, repository: str, private: bool) -> str:
    """Creates the repository if needed and uploads `folder`; returns its address.

    Raises:
        RecipeError: no network, no login, or no right; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A policy of RLHF Recipes")
    except Exception as error:  # the Hub client, requests and httpx have no class of errors in common
        raise RecipeError(
            f"`merge.push` {repository}: {type(error).__name__}: {error}; the model is in {folder}; `hf auth login`, then "
            f"`hf upload {repository} {folder}` uploads it"
        ) from error
    return str(address)
