"""What a run maximised, and over what: written into its run.json, and compared wherever its numbers are used.

    {"hash", "parts": {"reward", "beta", "sampling", "backbone", "data"}}

A weight is known by its content and not by where it lies, a function by its source. Nothing heavy is imported here, and no
task is: its source is read.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf_recipes.data.pair_files import FILE, pairs_file
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import load_recipe
from rlhf_recipes.recipe.sections import (
    REWARD_KINDS,
    ModelSection,
    PreferencesSection,
    Recipe,
    RewardSection,
    RewardTerm,
    resolved,
)
from rlhf_recipes.recipe.stages import STAGES

RESOLVED = "recipe.resolved.yaml"
RUN = "run.json"  # what a run is beside its recipe: stage, wandb's id, what it maximised
ADAPTER = "adapter_made.json"  # beside a reward adapter, and copied with it: the recipe that it was trained by
# Numbers of a policy are its own where these are what it was trained for.
OWN = ("reward", "beta", "sampling", "backbone")
SUMMARY = "summary.json"
PAIRS = "pairs"  # the kind of term that a policy of given pairs maximises
_READ_WHOLE = 64 * 2**20  # bytes; of larger files the ends and _SAMPLES places between them
_SAMPLES, _SAMPLE = 64, 2**16
_NO_MATTER = ("trust_remote_code", "on_error")  # keys that change no score


def fingerprint(recipe: Recipe, name: str) -> dict[str, Any]:
    """Of a run of the stage `name`: readable parts, and a short hash of what they say apart from paths.

    DPO on given pairs maximises what these were labelled by: the reward that scripts/preferences.py recorded beside them, or
    the preferences of whoever made them.
    """
    stage, folder, task = STAGES[name], recipe.folder, recipe.folder / "task.py"
    from_scratch = recipe.stages.get(stage.section, {}).get("from_scratch", False)
    parts: dict[str, Any] = {"backbone": _backbone(recipe.model, folder, from_scratch)}
    if not stage.supervised:
        reward = _pairs(recipe.preferences, folder) if stage.sampled_pairs else None
        parts |= {"reward": reward or _reward(recipe.reward, folder), "beta": recipe.objective.beta}
    elif stage.pairs:
        parts["pairs"] = {"path": "load_preferences", "content": _own_pairs(task)}
    completion = recipe.data.max_completion_tokens
    parts["sampling"] = recipe.sampling.model_dump() | {"max_completion_tokens": completion}
    parts["data"] = {"max_prompt_tokens": recipe.data.max_prompt_tokens, "task": _file_hash(task)}
    return {"hash": _hash({name: _identity(part) for name, part in parts.items()}), "parts": parts}


# --- its parts ---------------------------------------------------------------------------------------------------


def _backbone(model: ModelSection, folder: Path, from_scratch: bool) -> dict[str, Any]:
    if from_scratch:
        return {"architecture": model.architecture}
    return {"path": model.path, "content": weights_hash(Path(resolved(model.path, folder)))}


def _reward(section: RewardSection, folder: Path) -> dict[str, Any]:
    return {
        "terms": [_term(term, folder) for term in section.all_terms()],
        "normalize": section.normalize_prompts if section.normalize else False,
        **{key: getattr(section, key) for key in ("clip", "length_penalty", "missing_eos_penalty")},
    }


def _term(term: RewardTerm, folder: Path) -> dict[str, Any]:
    kind = term.kind
    path = str(term.function_name if kind == "function" else getattr(term, kind))
    if kind == "function":
        content: str | None = source_hash(folder / "task.py", path)
    else:
        content = weights_hash(Path(resolved(path, folder)))
    keys = ("read_eos",) if kind == "adapter" else REWARD_KINDS[kind]
    settings = {key: getattr(term, key) for key in keys if key not in _NO_MATTER}
    return {"kind": kind, "path": path, "content": content, "weight": term.weight, **settings}


def _pairs(preferences: PreferencesSection, folder: Path) -> dict[str, Any] | None:
    """What given pairs were labelled by; None where the run samples its own and labels them by the recipe's reward."""
    given = preferences.path
    if given is None:
        if preferences.source == "sampled":
            return None
        content = source_hash(folder / "task.py", "load_preferences")
        return {"terms": [{"kind": PAIRS, "path": "load_preferences", "content": content}]}
    file = pairs_file(given, folder)
    recorded = parts_of(recorded_fingerprint(file.parent)).get("reward") if file.name == FILE else None
    if recorded:
        return recorded
    return {"terms": [{"kind": PAIRS, "path": given, "content": _file_hash(file)}]}


def _own_pairs(task: Path) -> str | None:
    """Of the source of `load_preferences`; None where task.py has it from elsewhere, or not at all."""
    try:
        body = ast.parse(task.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return None
    defined = any(isinstance(statement, ast.FunctionDef) and statement.name == "load_preferences" for statement in body)
    return source_hash(task, "load_preferences") if defined else None


def weights_hash(folder: Path) -> str | None:
    """Of a model's or an adapter's safetensors and config; None where it is not on this machine."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "config.json"):
        if (folder / name).is_file():
            digest.update(_settings(folder / name))
    for file in files:
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()[:12]


def _settings(file: Path) -> bytes:
    """A config without what names a place or a library's version."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return file.read_bytes()
    if isinstance(content, dict):
        ignored = ("base_model_name_or_path", "_name_or_path", "transformers_version", "peft_version", "revision")
        content = {key: value for key, value in content.items() if key not in ignored}
    return json.dumps(content, sort_keys=True).encode()


def _pieces(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb") as stream:
        if size <= _READ_WHOLE:
            while piece := stream.read(2**20):
                yield piece
        else:  # other weights differ everywhere
            for i in range(_SAMPLES + 1):
                stream.seek((size - _SAMPLE) * i // _SAMPLES)
                yield stream.read(_SAMPLE)


def source_hash(file: Path, function: str) -> str | None:
    """Of a function of task.py with whatever else of the file it names, comments and layout aside; where the file only imports
    the function, of the whole file."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return None
    defined: dict[str, list[ast.stmt]] = {}
    for statement in body:
        for name in _defines(statement):
            defined.setdefault(name, []).append(statement)
    if not any(isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign) for s in defined.get(function, [])):
        return _file_hash(file)
    pending, seen = [function], set()
    while pending:
        name = pending.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        pending += [node.id for s in defined[name] for node in ast.walk(s) if isinstance(node, ast.Name)]
    return _hash([[name, [ast.unparse(s) for s in defined[name]]] for name in sorted(seen)])


def names_in(file: Path) -> set[str] | None:
    """What a module defines or imports by name, from its source alone; None where that does not say it all."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    starred = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree))
    indirect = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {"globals", "exec", "setattr", "vars"}
    if starred or indirect:
        return None
    defining = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
    return {name for node in ast.walk(tree) if isinstance(node, defining) for name in _defines(node)}


def _defines(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
    return [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _file_hash(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


# --- comparing ---------------------------------------------------------------------------------------------------


def recorded_fingerprint(folder: Path) -> dict[str, Any] | None:
    """What a run's run.json says; None where nobody knows.

    Of a run from before there were fingerprints it is that of its resolved recipe, and of the files that this names as they are
    now, marked `derived`.

    Args:
        folder: a run's folder, or one inside it: a checkpoint, `best-N`, a merged model.
    """
    for run in (folder, folder.parent):
        about = _read(run / RUN)
        name = about.get("stage") or _read(run / SUMMARY).get("stage") or run.parent.name
        stage = STAGES.get(name) if isinstance(name, str) else None
        if "fingerprint" in about:
            return _sound(about.get("policy") if stage is not None and stage.merges else about["fingerprint"])
        if (run / RESOLVED).is_file():
            if stage is None or not stage.samples:
                return None
            try:
                return fingerprint(load_recipe(run / RESOLVED), stage.name) | {"derived": True}
            except (RecipeError, OSError, yaml.YAMLError):  # of other keys than today's, or its files are gone
                return None
    return None


def _sound(recorded: Any) -> dict[str, Any] | None:
    """A fingerprint as it came from a file, perhaps a stranger's: None where it is not of the shape written here, or holds
    what a terminal would obey."""
    parts = parts_of(recorded) if isinstance(recorded, dict) else {}
    kinds = {"reward": dict, "beta": int | float, "sampling": dict, "backbone": dict, "data": dict}
    terms = parts.get("reward", {}).get("terms", []) if isinstance(parts.get("reward", {}), dict) else None
    whole = (
        all(isinstance(part, kinds.get(name, object)) for name, part in parts.items())
        and isinstance(terms, list)
        and all(
            isinstance(t, dict) and isinstance(t.get("weight", 1), int | float) and {"kind", "path"} <= t.keys() for t in terms
        )
        and ("reward" not in parts or {"beta", "backbone"} <= parts.keys())
        and (text := json.dumps(recorded, ensure_ascii=False)).isprintable()
        and re.search(r"\\u00[01]", text) is None  # as JSON writes control characters
    )
    return recorded if parts and whole else None


def _read(file: Path) -> dict[str, Any]:
    """A file's object, or {} where it holds none: other places say what is wrong with it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def parts_of(recorded: dict[str, Any] | None) -> dict[str, Any]:
    parts = (recorded or {}).get("parts")
    return parts if isinstance(parts, dict) else {}


def differences(
    theirs: dict[str, Any] | None, ours: dict[str, Any] | None, parts: Iterable[str] = OWN, here: str = "here"
) -> dict[str, str]:
    """The parts in which two fingerprints differ, each with words that say how; what one of the two does not know is left out.

    Args:
        here: what `ours` is, for the words.
    """
    found = {}
    for name in parts:
        a, b = parts_of(theirs).get(name), parts_of(ours).get(name)
        if a is None or b is None or _same(a, b):
            continue
        if name == "beta":
            found[name] = f"beta {a:g}, and {here} {b:g}"
        elif name == "reward":
            found[name] = "the reward " + _told((describe_reward(a), describe_reward(b)), (a, b), here)
        elif name == "backbone":
            found[name] = "the backbone " + _told((str(a.get("path")), str(b.get("path"))), (a, b), here)
        else:
            keys = [key for key in a if key in b and a[key] != b[key]]
            found[name] = ", ".join(f"{'task.py' if k == 'task' else k} {a[k]}, and {here} {b[k]}" for k in keys)
    return found


def another_backbone(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> str | None:
    """Words where an adapter certainly stands on other weights: a Hub id and a folder may hold the same."""
    contents = [bool(parts_of(each).get("backbone", {}).get("content")) for each in (theirs, ours)]
    return differences(theirs, ours, ["backbone"]).get("backbone") if contents[0] == contents[1] else None


def made_by(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What ADAPTER says of the reward adapter that `recipe` has trained into `folder`."""
    return {"recipe": recipe.task, "adapter": weights_hash(folder), "fingerprint": fingerprint(recipe, "reward")}


def rewards_of_others(recipe: Recipe) -> list[str]:
    """A line for each reward adapter that was trained by another recipe, on another backbone or on other pairs.

    One in another recipe's folder was named on purpose, and its recipe is not called another.
    """
    found = []
    for term in recipe.reward.all_terms():
        folder = Path(recipe.path(term.adapter or ""))
        about = _read(folder / ADAPTER) if term.adapter else {}
        if not about or about.get("adapter") != weights_hash(folder):  # unknown, or of an adapter that was there before
            continue
        ours = fingerprint(recipe, "reward")
        theirs, name, reasons = _sound(about.get("fingerprint")), str(about.get("recipe")), []
        if name != recipe.task and name.isprintable() and folder.is_relative_to(recipe.folder):
            reasons.append(f"for the recipe {name}, and this is {recipe.task}")
        if other := another_backbone(theirs, ours):
            reasons.append(f"on {other}")
        pairs = [parts_of(each).get("pairs", {}).get("content") for each in (theirs, ours)]
        if all(pairs) and pairs[0] != pairs[1]:
            reasons.append("on other pairs than load_preferences of this task.py gives")
        if reasons:
            what = f"the reward adapter {term.adapter} was trained"
            found.append(f"{what} {'; '.join(reasons)}. scripts/reward.py trains a new one")
    return found


def describe_reward(part: dict[str, Any]) -> str:
    """`0.5 x adapter checkpoints/reward + function brevity, clip 3`"""
    weighted = [("" if t.get("weight", 1) == 1 else f"{t['weight']:g} x ") + f"{t['kind']} {t['path']}" for t in part["terms"]]
    return " + ".join(weighted) + "".join(f", {key} {value}" for key, value in part.items() if key != "terms" and value)


def of_pairs(recorded: dict[str, Any] | None) -> bool:
    """Whether a policy was trained on pairs that no reward is known to have labelled."""
    return any(term["kind"] == PAIRS for term in parts_of(recorded).get("reward", {}).get("terms", []))


def without_code(recorded: dict[str, Any] | None) -> dict[str, Any]:
    """A fingerprint that does not know the source of task.py's functions."""
    parts = parts_of(recorded)
    if "reward" not in parts:
        return {"parts": parts}
    terms = [term | {"content": None} if term["kind"] == "function" else term for term in parts["reward"]["terms"]]
    return {"parts": parts | {"reward": parts["reward"] | {"terms": terms}}}


def _told(words: tuple[str, str], parts: tuple[Any, Any], here: str) -> str:
    """Both sides' words; where those are the same, with the contents, which then differ."""
    if words[0] == words[1]:
        listed = [", ".join(str(each.get("content")) for each in part.get("terms", [part])) for part in parts]
        words = f"{words[0]} ({listed[0]})", f"({listed[1]})"
    return f"{words[0]}, and {here} {words[1]}"


def _same(a: Any, b: Any) -> bool:
    """Whether two parts say the same: by contents where both have them, else by paths.

    A key that one of the two does not have is newer than that run.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        unread = "path" if a.get("content") and b.get("content") else "content"
        return all(_same(a[key], b[key]) for key in (a.keys() & b.keys()) - {unread})
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _identity(part: Any) -> Any:
    """A part without the paths of what is known by its content."""
    if isinstance(part, list):
        return [_identity(item) for item in part]
    if isinstance(part, dict):
        return {key: _identity(value) for key, value in part.items() if not (key == "path" and part.get("content"))}
    return part
