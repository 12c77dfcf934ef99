"""Checks before a run, from small files alone: no weights are loaded and nothing is written."""

import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jinja2
import psutil

from rlhf_recipes.fingerprint import JUDGED, rewards_of_others
from rlhf_recipes.pairs import pairs_file
from rlhf_recipes.recipe import LATEST, Recipe, RecipeError, nearest, section_of
from rlhf_recipes.sizes import sizes_of, text_part

_CHUNK_TOKENS = 512
_JINJA = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 - compiles, and renders nothing
# TRL finds out about others at the first step only
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = frozenset(
    ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
)  # read `label_smoothing`; sigmoid: dpo_trainer.py
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
BEST_BY = ("objective", "reward", "gold")  # of evaluation.Completions.means
SFT_LOSSES = ("nll", "dft", "chunked_nll")
# What TRL and torch find out when the run has begun, or never.
_COUNTS = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_mini_batches",
    "num_ppo_epochs", "total_episodes", "local_rollout_forward_batch_size", "rounds", "kl_horizon", "reference_sync_steps",
    "save_total_limit",
    "max_length", "dataset_num_proc", "pad_to_multiple_of",
}  # fmt: skip
_NOT_NEGATIVE = {
    "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "vf_coef", "cliprange",
    "cliprange_value", "dataloader_num_workers", "neftune_noise_alpha", "logging_steps", "eval_steps", "save_steps",
}  # fmt: skip
_SHARES = {"gamma", "lam", "adam_beta1", "adam_beta2", "label_smoothing", "ld_alpha", "label_smoothing_factor"}
_LEAST_VOCABULARY = 259  # of data.train_tokenizer
ENGINES_FOR = ("sft", "reward", "dpo")  # the stages that FSDP 2 and DeepSpeed can shard
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BYTES_OF_4BIT = (
    4 + 0.127
) / 8  # with the blocks' scales, doubly quantised: Dettmers et al. 2023 (arXiv 2305.14314), section 3


def check(recipe: Recipe, stage: str) -> None:
    """Raises RecipeError for the first thing that would stop `stage` later, and says what to change."""
    _check_engine(recipe, stage)
    _check_quantization(recipe, stage)
    if not (recipe.folder / "task.py").is_file():
        raise RecipeError(f"{recipe.folder / 'task.py'}: no such file; a recipe's task.py gives its data")
    _check_run_folder(recipe, stage)
    if recipe.evaluate.exact and recipe.objective.beta == 0 and stage == "evaluate":
        raise RecipeError("`evaluate.exact` divides by `objective.beta`, which is 0")
    if stage == "report":  # loads no weights
        return
    if recipe.lora.init_lora_weights is False:
        raise RecipeError(
            "`lora.init_lora_weights` false: B starts at random, and a new policy is not the reference; leave it out"
        )
    section = recipe.stages.get(section_of(stage), {})
    _check_numbers(section_of(stage), section)
    _check_machine(section_of(stage), section)
    if stage == "sft" and section.get("loss_type", "nll") not in SFT_LOSSES:
        raise RecipeError(
            f"`sft.loss_type`: {section['loss_type']!r} is none of {', '.join(SFT_LOSSES)}"
            f"{nearest(section['loss_type'], SFT_LOSSES)}"
        )
    if stage == "sft" and section.get("packing") and section.get("max_length", 1024) is None:
        raise RecipeError("`sft.packing` fills sequences of `sft.max_length` tokens, which is null; give a length")
    if stage == "sft" and section.get("from_scratch"):
        _check_architecture(recipe)
        return
    _check_folder(recipe, "model.path", recipe.model.path, "config.json", "*.safetensors")
    if stage not in ("sft", "reward", "merge"):
        for i, term in enumerate(recipe.reward.all_terms()):
            where = "reward" if recipe.reward.terms is None else f"reward.terms[{i}]"
            if term.adapter:
                _check_folder(recipe, f"{where}.adapter", term.adapter, "adapter_config.json", "adapter_model.safetensors")
            if term.model:
                _check_folder(recipe, f"{where}.model", term.model, "config.json", "*.safetensors")
        _check_lengths(recipe)
    if stage in ("reward", "dpo") and section.get("eval_strategy", "no") != "no":
        raise RecipeError(
            f"`{section_of(stage)}.eval_strategy` {section['eval_strategy']}: {stage} judges held-out data at its end, and "
            f"has none for TRL while it trains; leave it out"
        )
    if stage in ("ppo", "a2c"):
        _check_online(recipe, stage, section)
    if stage == "dpo":
        _check_dpo(recipe)
    _check_pad(recipe)
    _check_disk(recipe, stage)


def _check_engine(recipe: Recipe, stage: str) -> None:
    """FSDP and DeepSpeed."""
    for engine in ("FSDP", "DeepSpeed"):
        if not _launched_with(engine):
            continue
        if stage not in ENGINES_FOR:
            raise RecipeError(
                f"launched with {engine}, which takes the backbone's weights apart; {stage} samples from adapters on one "
                f"frozen copy of them that every role shares, and their own optimizer state is too small to be worth "
                f"sharding. Launch with accelerate_configs/multi_gpu.yaml (DDP); {', '.join(ENGINES_FOR)} can be sharded"
            )
        if engine == "DeepSpeed" and recipe.run.resume is not None:
            raise RecipeError(
                "--resume: under DeepSpeed no checkpoints are written, since its own are pickled; FSDP 2 has them "
                "(accelerate_configs/fsdp2.yaml)"
            )
        if engine == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
            raise RecipeError("launched with FSDP 1, which is not supported; launch with accelerate_configs/fsdp2.yaml")
        if stage == "dpo" and recipe.stages["dpo"].get("rounds", 1) > 1:
            raise RecipeError(
                f"`dpo.rounds` above 1 samples from the policy between trainings, which {engine} has then taken apart; give "
                f"--dpo.rounds=1, or launch with accelerate_configs/multi_gpu.yaml (DDP)"
            )


def _check_quantization(recipe: Recipe, stage: str) -> None:
    """4-bit layers, and what cannot be done with them."""
    quantization, dtype = recipe.model.quantization, recipe.model.dtype
    if quantization is None or stage == "report":
        return
    where = f"`model.quantization` {quantization}"
    if stage in ("sft", "merge"):
        raise RecipeError(
            f"{where}: {stage} merges an adapter into the backbone's weights, which 4 bits would round; give "
            f"--model.quantization=null"
        )
    if dtype != "bfloat16":
        raise RecipeError(f"{where} computes in bfloat16, and `model.dtype` is {dtype}; give --model.dtype=bfloat16")
    if _launched_with("FSDP") or _launched_with("DeepSpeed"):
        raise RecipeError(
            f"{where}: 4-bit weights are not taken apart by FSDP or DeepSpeed here; launch with "
            f"accelerate_configs/multi_gpu.yaml (DDP)"
        )
    if not _installed("bitsandbytes"):
        raise RecipeError(f"{where} needs the package bitsandbytes: pip install bitsandbytes")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check_run_folder(recipe: Recipe, stage: str) -> None:
    """The folder of the run can be made, and only there."""
    name, output = recipe.run.name, recipe.run.output
    if name == LATEST:
        raise RecipeError("`run.name` latest: the link to the newest run has this name; choose another")
    if name and ("/" in name or "\\" in name or name.startswith(".") or not name.isprintable() or len(os.fsencode(name)) > 200):
        raise RecipeError(
            f"`run.name` {name}: expected the name of one folder: at most 200 bytes, no slashes, not a leading dot; where it "
            f"is made says `run.output`"
        )
    folder = Path(output).absolute() / recipe.task / stage
    if name and recipe.run.resume is None and os.path.lexists(folder / name):
        raise RecipeError(f"{folder / name}: this run exists; choose another `--run.name`, nothing is overwritten")
    try:
        folder.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a part of the path is a file, may not be entered, or is too long
        raise RecipeError(f"`run.output` {output}: no folder can be made there ({error.strerror})") from None
    if (folder / LATEST).is_dir() and not (folder / LATEST).is_symlink():  # as some copies make of a link
        raise RecipeError(f"{folder / LATEST}: this folder has the name of the link to the newest run; rename or remove it")
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise RecipeError(f"`run.output` {output}: {folder} is no folder; choose another place with --run.output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecipeError(f"`run.output` {output}: {folder} may not be written to; choose another place with --run.output")


def _check_numbers(name: str, section: dict[str, Any]) -> None:
    """Numbers that no value of TRL's types rules out."""
    for keys, fits, expected in (
        (_COUNTS, lambda n: n >= 1, "at least 1"),
        (_NOT_NEGATIVE, lambda n: n >= 0, "at least 0"),
        (_SHARES, lambda n: 0 <= n <= 1, "a number between 0 and 1"),
        ({"num_train_epochs", "discopop_tau"}, lambda n: n > 0, "more than 0"),
    ):
        for key in sorted(keys & section.keys()):
            if section[key] is not None and not fits(section[key]):
                raise RecipeError(f"`{name}.{key}`: expected {expected}, got {section[key]}")


def _check_machine(name: str, section: dict[str, Any]) -> None:
    """Keys that this machine, or the way it was launched, leaves without effect."""
    for key in ("use_cpu", "ddp_backend"):
        if key in section and not _launched_with("DeepSpeed"):  # which TRL still starts
            raise RecipeError(
                f"`{name}.{key}` has no effect here: a GPU is used where there is one (CUDA_VISIBLE_DEVICES= hides it), and "
                f"the processes are connected before TRL reads its keys; leave it out"
            )
    if section.get("use_liger_kernel") and not _installed("liger_kernel"):
        raise RecipeError(f"`{name}.use_liger_kernel` needs the package liger-kernel: pip install liger-kernel")
    held_out = name == "sft" and section.get("eval_strategy", "no") != "no"
    if section.get("lr_scheduler_type") == "reduce_lr_on_plateau" and not held_out:
        raise RecipeError(
            f"`{name}.lr_scheduler_type` reduce_lr_on_plateau follows a held-out loss while it trains, which only sft with "
            f"`sft.eval_strategy` steps or epoch has"
        )


def _launched_with(engine: str) -> bool:
    """`accelerate launch` says so in the environment."""
    return os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"


def _check_architecture(recipe: Recipe) -> None:
    architecture = recipe.model.architecture or {}
    missing = {"model_type", "vocab_size"} - set(architecture)
    if missing:
        raise RecipeError(f"`sft.from_scratch` needs `model.architecture` with {', '.join(sorted(missing))}")
    if not isinstance(architecture["vocab_size"], int) or architecture["vocab_size"] < _LEAST_VOCABULARY:
        raise RecipeError(
            f"`model.architecture` has the vocab_size {architecture['vocab_size']!r}: expected a whole number of at least "
            f"{_LEAST_VOCABULARY}, for every byte and the tokens pad, bos and eos"
        )


def _check_folder(recipe: Recipe, key: str, value: str, file: str, weights: str | None = None) -> None:
    """A path whose first part is a folder beside the recipe, or that starts with . or /, is meant as a folder.

    Args:
        file: what must be in it; of a .json file also its content is looked at.
        weights: the pattern of its safetensors files, which must be there and whole.
    """
    resolved = Path(recipe.path(value))
    first = value.split("/")[0]
    local = value.startswith((".", "/", "~")) or value.count("/") > 1 or os.path.exists(recipe.folder / first)
    if not os.path.exists(resolved):
        if local or os.path.exists(first):
            raise RecipeError(f"`{key}` {value}: no such folder, neither beside the recipe ({recipe.folder}) nor here")
        return  # a Hub id
    if not resolved.is_dir():
        raise RecipeError(f"`{key}` {value}: {resolved} is a file, expected a folder with {file}")
    if not (resolved / file).is_file():
        raise RecipeError(f"`{key}` {value}: the folder {resolved} has no {file}")
    if file.endswith(".json"):
        _read_json(resolved / file, key)
    if weights is None:
        return
    files = sorted(resolved.glob(weights))
    if not files:
        raise RecipeError(
            f"`{key}` {value}: the folder {resolved} has no {weights}; weights are read from safetensors alone, as a pickle "
            f"(.bin, .pt) can run any code"
        )
    for found in files:
        if not os.access(found, os.R_OK):  # safetensors saves them for their owner alone
            raise RecipeError(f"`{key}` {value}: {found} may not be read by you; its owner can `chmod a+r` it")
        if _safetensors_header(found) is None:
            raise RecipeError(f"`{key}` {value}: {found} is cut short, or no safetensors file; copy or make it again")


def _read_json(file: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a UnicodeDecodeError
        raise RecipeError(f"`{key}`: {file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"`{key}`: {file} holds a {type(content).__name__}, expected an object")
    return content


def _safetensors_header(file: Path) -> dict[str, dict[str, Any]] | None:
    """Each tensor's dtype, shape and place; None where the file is not whole, or none of safetensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > size:
            return None
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            whole = all(isinstance(n, int) for entry in header.values() for n in entry["shape"]) and 8 + length + end == size
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
    return header if whole else None


def _local_json(recipe: Recipe, name: str) -> dict[str, Any]:
    file = Path(recipe.path(recipe.model.path)) / name
    return _read_json(file, "model.path") if os.path.isfile(file) else {}


def _check_lengths(recipe: Recipe) -> None:
    room = sizes_of(_local_json(recipe, "config.json")).positions
    prompt, completion = recipe.data.max_prompt_tokens, recipe.data.max_completion_tokens
    if room is not None and prompt + completion > room:
        raise RecipeError(
            f"`data.max_prompt_tokens` {prompt} + `data.max_completion_tokens` {completion} exceed the {room} tokens "
            f"that {recipe.model.path} reads; lower one of them"
        )


def _check_dpo(recipe: Recipe) -> None:
    if recipe.objective.beta == 0:
        raise RecipeError(
            "`objective.beta` 0: DPO cannot do without the leash: its loss is a function of beta * log(pi / pi_ref), which "
            "is then zero for every policy. scripts/ppo.py and scripts/a2c.py can"
        )
    if recipe.sampling.temperature != 1:
        raise RecipeError(
            f"`sampling.temperature` {recipe.sampling.temperature}: DPO's loss reads log pi at temperature 1, so its pairs "
            f"must be sampled there"
        )
    dpo = recipe.stages["dpo"]
    for loss in dpo.get("loss_type", []):
        if loss not in DPO_LOSSES:
            raise RecipeError(f"`dpo.loss_type`: {loss!r} is none of TRL's losses{nearest(loss, DPO_LOSSES)}")
    pairs = recipe.preferences
    to_be_made = pairs.source == "sampled" and pairs.path is None
    if to_be_made and pairs.label == "expected" and dpo.get("loss_type", ["sigmoid"]) != ["sigmoid"]:
        raise RecipeError("`preferences.label` expected is a smoothing of the labels that only `dpo.loss_type` [sigmoid] has")
    _check_label_smoothing(dpo.get("label_smoothing", 0), dpo.get("loss_type", ["sigmoid"]))
    divergence = dpo.get("f_divergence_type", "reverse_kl")
    if divergence not in F_DIVERGENCES:
        raise RecipeError(f"`dpo.f_divergence_type`: {divergence!r} is none of TRL's{nearest(divergence, F_DIVERGENCES)}")
    if recipe.preferences.source == "task" and dpo.get("rounds", 1) > 1:
        raise RecipeError("`dpo.rounds` samples new pairs, but `preferences.source` is `task`; use one of the two")
    if recipe.preferences.path is not None:
        pairs_file(recipe)


def _check_label_smoothing(smoothing: float, losses: list[str]) -> None:
    """What it means is the losses' to say."""
    if "exo_pair" in losses and not smoothing:
        raise RecipeError("`dpo.loss_type` exo_pair needs a `dpo.label_smoothing` above 0; its paper recommends 1e-3")
    if not smoothing:
        return
    if smoothing >= 0.5:
        raise RecipeError(f"`dpo.label_smoothing` {smoothing}: a label that is wrong half of the time says nothing; below 0.5")
    if not SMOOTHED.intersection(losses):
        raise RecipeError(
            f"`dpo.label_smoothing` has no effect on {', '.join(losses)}: only {', '.join(sorted(SMOOTHED))} read it; "
            f"leave it out"
        )
    others = sorted(SMOOTHED.intersection(losses) - {"sigmoid"})
    if "sigmoid" in losses and others:
        raise RecipeError(
            f"`dpo.label_smoothing` is another thing to sigmoid (labels that are wrong with this probability) than to "
            f"{', '.join(others)}; leave one of them out of `dpo.loss_type`"
        )


def _check_online(recipe: Recipe, stage: str, section: dict[str, Any]) -> None:
    per_device = section.get("per_device_train_batch_size", 8)
    local = per_device * section.get("gradient_accumulation_steps", 1)
    minibatches = section.get("num_mini_batches", 1)
    if local % minibatches:
        raise RecipeError(
            f"`{stage}.num_mini_batches` {minibatches} does not divide the {local} episodes of a process "
            f"(per_device_train_batch_size x gradient_accumulation_steps)"
        )
    _check_held_out(recipe, stage, section)
    if section.get("reward_baseline") and not any(term.adapter for term in recipe.reward.all_terms()):
        raise RecipeError(
            f"`{stage}.reward_baseline` reads unfinished text, which a reward adapter can; `reward` has none: give "
            f"--{stage}.reward_baseline=false"
        )
    if section.get("save_strategy") not in (None, "no", "steps"):
        raise RecipeError(
            f"`{stage}.save_strategy` {section['save_strategy']}: PPO counts updates, not epochs; use steps or no. The best is "
            f"kept by `{stage}.metric_for_best_model`"
        )
    if section.get("save_steps", 1) < 1 or section.get("save_steps", 1) % 1:
        raise RecipeError(f"`{stage}.save_steps`: expected a whole number of updates, got {section['save_steps']}")
    if section.get("loop") == "trl":
        _check_trl_loop(recipe, stage, section)
    _check_leash(recipe, stage, section, local)
    if section.get("whiten_rewards"):
        if local // minibatches < 8:
            raise RecipeError(f"`{stage}.whiten_rewards` needs minibatches of at least 8 episodes, not {local // minibatches}")
        for key in ("full_kl", "kl_loss", "reward_baseline"):
            if section.get(key):
                raise RecipeError(
                    f"`{stage}.{key}` is in units of the reward, which `{stage}.whiten_rewards` changes; drop one"
                )


def _check_leash(recipe: Recipe, stage: str, section: dict[str, Any], episodes: int) -> None:
    """How the KL is charged, and to whom."""
    beta, target = recipe.objective.beta, section.get("kl_target")
    if section.get("full_kl") and section.get("kl_loss"):
        raise RecipeError(f"`{stage}.full_kl` and `{stage}.kl_loss` are two ways to put the KL into the loss; give one of them")
    for key in ("kl_target", "target_kl"):
        if section.get(key) is not None and section[key] <= 0:
            raise RecipeError(f"`{stage}.{key}`: expected more than 0 nats, got {section[key]}")
    if target is not None and beta == 0:
        raise RecipeError(f"`{stage}.kl_target` multiplies `objective.beta`, which is 0; start from a small one such as 0.01")
    if target is not None and section.get("kl_horizon", 10000) < episodes:
        raise RecipeError(
            f"`{stage}.kl_horizon` {section.get('kl_horizon', 10000)}: beta would jump; expected at least the {episodes} "
            f"episodes of one update"
        )
    if section.get("reference") == "none" and (beta != 0 or section.get("full_kl") or section.get("kl_loss")):
        raise RecipeError(
            f"`{stage}.reference` none: without a reference there is no KL to charge; say so with --objective.beta=0 and "
            f"without full_kl and kl_loss, or keep the reference"
        )


def _check_held_out(recipe: Recipe, stage: str, section: dict[str, Any]) -> None:
    """Evaluation during training, and what is kept by it."""
    if section.get("eval_strategy") not in (None, "no", "steps"):
        raise RecipeError(
            f"`{stage}.eval_strategy` {section['eval_strategy']}: PPO counts updates, not epochs; use steps or no"
        )
    evaluates = section.get("eval_strategy") == "steps"
    action = recipe.watch.on_over_optimisation
    if action != "warn" and not evaluates:
        raise RecipeError(f"`watch.on_over_optimisation` {action} needs `{stage}.eval_strategy` steps and `{stage}.eval_steps`")
    if action == "rollback" and section.get("metric_for_best_model", "gold") != "gold":
        raise RecipeError(
            f"`watch.on_over_optimisation` rollback ends with the best policy by gold, and `{stage}.metric_for_best_model` "
            f"says {section['metric_for_best_model']}; leave that out"
        )
    if evaluates and (section.get("eval_steps") is None or section["eval_steps"] < 1 or section["eval_steps"] % 1):
        raise RecipeError(f"`{stage}.eval_steps`: expected a whole number of updates, got {section.get('eval_steps')}")
    best = section.get("metric_for_best_model")
    if best is not None and best not in BEST_BY:
        raise RecipeError(f"`{stage}.metric_for_best_model`: {best!r} is none of {', '.join(BEST_BY)}{nearest(best, BEST_BY)}")
    for key in ("metric_for_best_model", "load_best_model_at_end"):
        if section.get(key) and not evaluates:
            raise RecipeError(f"`{stage}.{key}` needs `{stage}.eval_strategy` steps and `{stage}.eval_steps`")
    if section.get("load_best_model_at_end") and best is None:
        raise RecipeError(f"`{stage}.load_best_model_at_end` needs `{stage}.metric_for_best_model`, such as objective")


def _check_trl_loop(recipe: Recipe, stage: str, section: dict[str, Any]) -> None:
    """TRL's own loop would accept and ignore what it does not know."""
    reward, (term, *others) = recipe.reward, recipe.reward.all_terms()
    if recipe.run.resume is not None:
        raise RecipeError(f"--resume: TRL's own loop (`{stage}.loop` trl) writes no checkpoints")
    if others or not term.adapter or term.weight != 1 or reward.normalize or reward.clip or reward.length_penalty:
        raise RecipeError(
            f"`{stage}.loop` trl: TRL's own loop knows one reward model and `reward.missing_eos_penalty` alone; give one "
            f"`reward.adapter`, without weight, normalize, clip and length_penalty"
        )
    off = {
        "full_kl": False, "reward_baseline": False, "max_grad_norm": 0, "whiten_advantages": True, "eval_strategy": "no",
        "eval_on_start": False, "kl_loss": False, "kl_target": None, "target_kl": None, "reference": "frozen",
    }  # fmt: skip
    unknown = [key for key, value in off.items() if section.get(key, value) != value]
    if unknown:
        switches = " ".join(f"--{stage}.{key}={str(off[key]).lower()}" for key in unknown)
        raise RecipeError(f"`{stage}.loop` trl: TRL's own loop does not know {', '.join(unknown)}; switch off: {switches}")
    if section.get("value") == "trunk":
        raise RecipeError(f"`{stage}.loop` trl runs the value function as a model of its own: `{stage}.value` must be adapter")


def _check_pad(recipe: Recipe) -> None:
    config = _local_json(recipe, "tokenizer_config.json")
    if config and "added_tokens_decoder" not in config:  # as older ones are read
        config |= _local_json(recipe, "special_tokens_map.json")
    template = recipe.model.chat_template
    if template is not None and not (recipe.folder / template).is_file():
        raise RecipeError(f"`model.chat_template` {template}: no such file beside the recipe ({recipe.folder})")
    if template is not None and (slip := _slip_of(recipe.folder / template)):
        raise RecipeError(f"`model.chat_template` {template}: {slip}")
    own = {
        name: token["content"] if isinstance(token, dict) and "content" in token else token for name, token in config.items()
    }
    pad, eos = (getattr(recipe.model, name) or own.get(name) for name in ("pad_token", "eos_token"))
    if config and (pad is None or pad == eos):
        raise RecipeError(
            f"the tokenizer of `model.path` {recipe.model.path} has the pad token {pad!r} and the eos token {eos!r}; "
            f"pad must exist and differ from eos: PPO finds a response's end by its first pad. Name another token of its "
            f"vocabulary with `model.pad_token`"
        )


def _slip_of(template: Path) -> str | None:
    """What is wrong with a chat template that cannot even be read; what it does with messages only a run can tell."""
    try:
        text = template.read_text(encoding="utf-8-sig")
        _JINJA.from_string(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text))  # transformers' own tag
    except UnicodeDecodeError as error:
        return f"is not UTF-8 ({error.reason})"
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def warnings(recipe: Recipe, stage: str, longest: int | None = None) -> list[str]:
    """Whose code is executed, whose reward it is, and what may go wrong by rough estimates; `longest` as in
    `memory_estimate`."""
    found = [f"{key}: code of {path} is executed on this machine" for key, path in _trusted(recipe, stage)]
    found += rewards_of_others(recipe) if stage in JUDGED else []
    own = Path(recipe.path(recipe.model.path)) / "chat_template.jinja"
    if stage != "report" and recipe.model.chat_template is None and os.path.isfile(own) and (slip := _slip_of(own)):
        found.append(f"{own}: {slip}; chat messages will be refused")
    if _launched_with("DeepSpeed"):
        found.append("under DeepSpeed no checkpoints are written, since its own are pickled; FSDP 2 has them")
    if stage != "report" and _lengths_known(recipe, stage, longest):
        found += memory_warning(recipe, stage, longest)
    return found


def memory_warning(recipe: Recipe, stage: str, longest: int | None = None) -> list[str]:
    """A line where the machine has less free memory than the stage needs by `memory_estimate`."""
    estimate = memory_estimate(recipe, stage, longest, cpu=not _has_gpu())
    needed, free = sum((estimate or {}).values()), psutil.virtual_memory().available
    if needed <= free:
        return []
    return [
        f"{stage} needs about {needed / 2**30:.1f} GiB and this machine has {free / 2**30:.1f} GiB free; if no GPU "
        f"holds it, lower the batch size, `data.max_completion_tokens` or `lora.r`, or use `model.dtype` bfloat16"
    ]


def _trusted(recipe: Recipe, stage: str) -> list[tuple[str, str]]:
    """Every model that the stage loads with its own code: (the key that allows it, the model)."""
    if stage == "report" or (stage == "sft" and recipe.stages["sft"].get("from_scratch")):
        return []
    own = [recipe.model.path]
    if stage == "evaluate":  # full models are loaded as the backbone is
        paths = [word.rpartition("=")[2] for word in recipe.evaluate.policies or ()]
        own += [path for path in paths if (Path(recipe.path(path)) / "config.json").is_file()]
    rewards = recipe.reward.all_terms() if stage not in ("sft", "reward", "merge") else []
    return [
        *(("model.trust_remote_code", path) for path in own if recipe.model.trust_remote_code),
        *(("reward.trust_remote_code", term.model) for term in rewards if term.model and term.trust_remote_code),
    ]


def _check_disk(recipe: Recipe, stage: str) -> None:
    """Room for what a run writes: about three copies of what it trains, with the optimizer's state for a whole backbone."""
    _, shapes = _backbone(recipe)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    from_scratch = stage == "sft" and recipe.stages["sft"].get("from_scratch")
    writes_model = stage in ("sft", "merge")
    needed = 16 * parameters if from_scratch else _BYTES[recipe.model.save_dtype] * parameters if writes_model else 0
    needed += 3 * 12 * _lora_parameters(recipe, shapes)
    folder = Path(recipe.run.output).resolve()
    if (folder / LATEST).is_dir() and not (folder / LATEST).is_symlink():  # as some copies make of a link
        raise RecipeError(f"{folder / LATEST}: this folder has the name of the link to the newest run; rename or remove it")
    while not folder.exists():
        folder = folder.parent
    free = psutil.disk_usage(str(folder)).free
    if needed > free:
        raise RecipeError(
            f"`run.output` {recipe.run.output}: {stage} writes about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are "
            f"free in {folder}; make room, or choose another place with --run.output"
        )


def _lora_parameters(recipe: Recipe, shapes: dict[str, list[int]]) -> int:
    return recipe.lora.r * sum(map(sum, _matrices(shapes)))


def _matrices(shapes: dict[str, list[int]]) -> list[list[int]]:
    """Of the linear layers that get adapters; 4 bits are for these too."""
    return [shape for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name and "head" not in name]


# --- what --dry-run prints ---------------------------------------------------------------------------------------


def describe(recipe: Recipe, stage: str) -> str:
    """The resolved recipe."""
    lines = [f"# {stage} of {recipe.task}", recipe.to_yaml()]
    if stage == "merge" and recipe.merge.push:
        kind = "private" if recipe.merge.private else "public"
        lines.append(f"# would upload model, tokenizer, generation config and card to {recipe.merge.push}, {kind} if it is new")
    return "\n".join(lines)


def describe_memory(recipe: Recipe, stage: str, longest: int | None = None) -> str:
    """The memory estimate.

    Args:
        longest: tokens of the longest row that a supervised stage trains on, where that is known.
    """
    lines = [f"# memory of {stage}, estimated"]
    if stage == "report":
        return "\n".join([*lines, "  little: a report loads no weights"])
    estimate = memory_estimate(recipe, stage, longest, cpu=not _has_gpu())
    if estimate is None:
        return "\n".join([*lines, f"unknown: {recipe.model.path} is not on this machine"])
    lines += [f"  {part:<34}{size / 2**20:>10,.0f} MiB" for part, size in estimate.items()]
    title = "sum" if _lengths_known(recipe, stage, longest) else "sum, at most"
    lines.append(f"  {title:<34}{sum(estimate.values()) / 2**20:>10,.0f} MiB")
    lines.append(f"  {'free memory of this machine':<34}{psutil.virtual_memory().available / 2**20:>10,.0f} MiB")
    if not _lengths_known(recipe, stage, longest):
        tokens = _row_tokens(recipe, stage, None)
        lines.append(f"  for rows of {tokens} tokens, the most that `{section_of(stage)}.max_length` lets be")
    return "\n".join(lines)


def _has_gpu() -> bool:
    """Whether the system names one of NVIDIA's; torch would take seconds to ask."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _lengths_known(recipe: Recipe, stage: str, longest: int | None) -> bool:
    """Of the rows that are trained on; packed rows are full."""
    return stage not in ("sft", "reward") or longest is not None or bool(recipe.stages[section_of(stage)].get("packing"))


def _row_tokens(recipe: Recipe, stage: str, longest: int | None) -> int:
    """Of the longest row in a batch."""
    if stage not in ("sft", "reward"):
        return recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens
    section = recipe.stages[section_of(stage)]
    most = section.get("max_length", 1024)
    if section.get("packing") or longest is None:  # packed rows are full
        return most or longest or 1024
    return min(longest, most or longest)


def memory_estimate(recipe: Recipe, stage: str, longest: int | None = None, cpu: bool = False) -> dict[str, float] | None:
    """Bytes by part; None where the backbone is not on this machine.

    Weights are exact (from the safetensors header). A trained parameter costs 16 bytes: weight, gradient and AdamW's two
    moments in float32. What a layer keeps of a token for its backward pass is about 9 hidden vectors and 4 of the feed-forward
    layer's (2 where it has no gate), with eager attention also a weight for each head and token; counted with
    torch.autograd.graph.saved_tensors_hooks on Llama. With gradient checkpointing it is one vector a layer, and all of that of
    the layer at work; without training that alone. Logits are three float32 copies a token. Pairs count twice.

    Args:
        longest: tokens of the longest row that a supervised stage trains on; by default all that its `max_length` lets be.
        cpu: the process keeps about as much again as a backward pass needs, since pieces of memory of all sizes are freed and
            asked for in between (measured with glibc on recipes/imdb); a GPU's allocator rounds sizes.
    """
    config, shapes = _backbone(recipe)
    if not shapes:
        return None
    weight_bytes = _BYTES[recipe.model.dtype]
    parameters = sum(math.prod(shape) for shape in shapes.values())
    backbone: float = parameters * weight_bytes
    if recipe.model.quantization is not None:
        backbone -= (weight_bytes - _BYTES_OF_4BIT) * sum(map(math.prod, _matrices(shapes)))
    lora = _lora_parameters(recipe, shapes)
    section = recipe.stages.get(section_of(stage), {})
    trains = section_of(stage) in recipe.stages
    from_scratch = stage == "sft" and section.get("from_scratch")
    batch = section.get("per_device_train_batch_size", 8) if trains else recipe.evaluate.batch_size
    if stage in ("ppo", "a2c"):
        episodes = batch * section.get("gradient_accumulation_steps", 1)
        batch = min(batch, math.ceil(episodes / section.get("num_mini_batches", 1)))
    batch = 10 if stage == "merge" else batch  # prompts that are compared
    rows, tokens = 2 * batch if stage in ("reward", "dpo") else batch, _row_tokens(recipe, stage, longest)
    size = sizes_of(config)
    a_layer = 9 * size.hidden + (4 if any("gate" in name for name in shapes) else 2) * size.inner
    a_layer += size.heads * tokens if recipe.model.attention == "eager" else 0
    recomputed = stage in ("sft", "reward", "dpo") and section.get("gradient_checkpointing", True)
    kept = (a_layer + size.layers * size.hidden if recomputed else size.layers * a_layer) if trains else a_layer
    whole = stage == "dpo" or (stage == "sft" and section.get("loss_type") in ("nll", "dft"))  # others: one step's or chunk's
    logits = rows * tokens if whole else max(batch, _CHUNK_TOKENS)
    estimate = {
        "imports (torch, transformers, trl)": 650 * 2**20,
        "backbone, once for all roles": 16 * parameters if from_scratch else backbone,
        "trained adapters with optimizer": 0 if from_scratch else (16 if trains else 4) * lora,
        "activations": weight_bytes * rows * tokens * kept * (2 if cpu and trains else 1),
        "logits": 3 * 4 * logits * (1 if stage == "reward" else size.vocabulary),
    }
    if stage not in ("sft", "reward", "merge"):
        foreign = [term.model for term in recipe.reward.all_terms() if term.model]
        if foreign:
            weights = sum(math.prod(shape) for path in foreign for shape in _shapes(recipe, path).values())
            estimate["reward models of their own"] = weight_bytes * weights
        at_once = recipe.preferences.batch_size if stage in ("preferences", "dpo") else recipe.evaluate.batch_size
        if stage in ("ppo", "a2c"):
            at_once = section.get("local_rollout_forward_batch_size", 64)
        width = size.head_width * size.key_heads
        estimate["keys and values while sampling"] = 2 * weight_bytes * at_once * tokens * size.layers * width
    return estimate


def backbone_vocabulary(recipe: Recipe) -> int | None:
    """Rows of the backbone's embedding, where its config is on this machine and says so: Gemma 3's of 4B and more does not."""
    size = text_part(_local_json(recipe, "config.json")).get("vocab_size")
    return size if isinstance(size, int) else None


def _backbone(recipe: Recipe) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The config and the shapes of all weights; ({}, {}) where they are not on this machine, or broken: `check` says so."""
    shapes = _shapes(recipe, recipe.model.path)
    try:
        return _local_json(recipe, "config.json"), shapes
    except RecipeError:
        return {}, {}


def _shapes(recipe: Recipe, path: str) -> dict[str, list[int]]:
    """Of all weights of a model on this machine, by name."""
    folder = Path(recipe.path(path))
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")) if os.path.isdir(folder) else ():
        shapes |= {name: entry["shape"] for name, entry in (_safetensors_header(file) or {}).items()}
    return shapes
