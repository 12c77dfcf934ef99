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

from rlhf_recipes.data import end_token_ids
from rlhf_recipes.recipe import LATEST, Recipe, RecipeError, followed
from rlhf_recipes.resume import RESOLVED, SUMMARY
from rlhf_recipes.roles import load_adapter_policy
from rlhf_recipes.runs import MODEL, Run
from rlhf_recipes.sampling import model_inputs
from rlhf_recipes.tables import fenced, markdown_table, markdown_text

# The largest difference between log-probabilities before and after, in nats, by the dtype in which the model is saved: rounding
# of its weights, a few units in the last place of logits of order ten.
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}


def adapter_to_merge(recipe: Recipe) -> Path:
    """`merge.adapter`: a run of a policy stage, a checkpoint of one, or any folder of an adapter; default the latest PPO run.

    Raises:
        RecipeError: there is none.
    """
    given = recipe.merge.adapter
    folder = Path(recipe.path(given)) if given else followed(Path(recipe.run.output) / recipe.task / "ppo" / LATEST)
    if not (folder / "adapter_config.json").is_file():
        hint = "it has no adapter_config.json" if folder.is_dir() else "no such folder"
        default = "" if given else "; run scripts/ppo.py first, or name another with --merge.adapter FOLDER"
        raise RecipeError(f"`merge.adapter` {given or folder}: {hint}{default}")
    return folder.resolve()


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
    policy = load_adapter_policy(recipe, adapter)
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


def evaluation_table(recipe: Recipe, adapter: Path) -> list[str]:
    """The lines of a Markdown table: what scripts/evaluate.py found, with intervals, where it judged this adapter, else the
    numbers at the end of its run; [] without either."""
    file = followed(Path(recipe.run.output) / recipe.task / "evaluate" / LATEST / "evaluation.json")
    shown = {"reward": "reward", "gold": "gold", "kl": "KL, nats", "objective": "J", "fraction_of_optimum": "of the optimum"}
    if file.is_file():
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        names = [name for name, folder in evaluation["folders"].items() if Path(folder).resolve() == adapter]
        if names:
            sides = {"reference": evaluation["policies"]["reference"], "this policy": evaluation["policies"][names[0]]}
            columns = [key for key in shown if key in sides["this policy"]]

            def cell(metrics: dict[str, dict[str, float]], key: str) -> str:
                if key not in metrics:
                    return ""
                return "{mean:.3f} ({low:.3f} to {high:.3f})".format(**metrics[key])

            rows = [[side, *(cell(metrics, key) for key in columns)] for side, metrics in sides.items()]
            head = [f"{evaluation['prompts']} held-out prompts, 95% intervals", *(shown[key] for key in columns)]
            return markdown_table(head, rows)
    summary = adapter / SUMMARY
    if summary.is_file():
        judged = json.loads(summary.read_text(encoding="utf-8"))
        if "policy" in judged:
            columns = [key for key in shown if key in judged["policy"]]
            sides = {"reference": judged["reference"], "this policy": judged["policy"]}
            rows = [[side, *(f"{m[key]:.3f}" if key in m else "" for key in columns)] for side, m in sides.items()]
            return markdown_table([f"{judged['prompts']} held-out prompts", *(shown[key] for key in columns)], rows)
    return []


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
    table = evaluation_table(recipe, adapter) or ["This policy has not been evaluated: `scripts/evaluate.py` does it."]
    return "\n".join([
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
        f"# {recipe.task}: {stage}", "",
        f"A policy trained by {stage.upper()} to maximise E[r] - {recipe.objective.beta:g} KL from its backbone, by the recipe "
        f"`{recipe.task}` of RLHF Recipes, then merged: no adapter is needed. Seed {seed}, commit {commit()}, {versions}.", "",
        "## Evaluation", "", *table, "",
        "## Merging", "",
        f"Saved in {recipe.model.save_dtype}. Log-probabilities of the next token are within {checked['difference']:.2g} nats "
        f"of those of backbone and adapter (tokens within e^-10 of the likeliest), a KL of {checked['kl']:.2g} nats.", "",
        "## Recipe", "", fenced(source.strip(), "yaml"), "",
    ])  # fmt: skip


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
