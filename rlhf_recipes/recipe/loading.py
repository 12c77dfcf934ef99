"""recipe.yaml and dotted overrides -> a typed, validated `Recipe`.

Nothing heavy is imported here: a wrong key is answered in well under a second.
"""

import dataclasses
import functools
import os.path
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.errors import RecipeError, nearest, shortened
from rlhf_recipes.recipe.keys import NO_SECRETS, OWNER_OF, SECRET, without_effect
from rlhf_recipes.recipe.names import meant
from rlhf_recipes.recipe.sections import LORA_REFUSED, REWARD_KINDS, SECTIONS, Recipe, RewardTerm
from rlhf_recipes.recipe.stages import TRAINED
from rlhf_recipes.recipe.values import coerce
from rlhf_recipes.recipe.yaml_text import read_yaml

DEFAULT_RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "imdb"


def _build_section(name: str, values: Any, file: str) -> Any:
    cls = SECTIONS[name]
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in values if name == "lora" and isinstance(values, dict) else ():
        if key in LORA_REFUSED:
            raise RecipeError(f"{file}: `lora.{key}` is not taken: {LORA_REFUSED[key]}; leave it out")
    _check_keys(name, values, hints, file)
    given = {key: coerce(value, hints[key], f"{file}: `{name}.{key}`") for key, value in values.items()}
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.name not in given:
            raise RecipeError(f"{file}: `{name}.{f.name}` is missing ({f.metadata['doc']})")
    return cls(**given)


def _refuse_secrets(section: str, values: Any, file: str) -> None:
    """Names the key of a secret anywhere in `values`, and never the value."""
    pending, seen = [(section, values)], set()
    while pending:
        where, item = pending.pop()
        if id(item) in seen:  # YAML's aliases can make cycles
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            for key in item:
                if isinstance(key, str) and SECRET.search(key):
                    raise RecipeError(f"{file}: `{where}.{key}`: {NO_SECRETS}")
            pending += [(f"{where}.{key}", inner) for key, inner in item.items()]
        elif isinstance(item, list):
            pending += [(f"{where}[{i}]", inner) for i, inner in enumerate(item)]


def _build_stage(name: str, values: Any, file: str, given: Collection[str]) -> dict[str, Any]:
    """`given`: the keys that the command line sets."""
    stage = TRAINED[name]
    for key in values if isinstance(values, dict) else ():
        if key in OWNER_OF:
            raise RecipeError(f"{file}: `{name}.{key}` belongs to `{OWNER_OF[key]}`, which every stage shares; set it there")
        if key in stage.refused_keys:
            raise RecipeError(f"{file}: `{name}.{key}` has no effect here: {stage.refused_keys[key]}; leave it out")
    _check_keys(name, values, stage.fields, file)
    typed = {key: coerce(value, stage.fields[key].type, f"{file}: `{name}.{key}`") for key, value in values.items()}
    problem = without_effect(name, stage.fields, stage.defaults, typed, given)
    if problem is not None:
        raise RecipeError(f"{file}: {problem}")
    return typed


def _check_keys(section: str, values: Any, known: typing.Iterable[str], file: str) -> None:
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: `{section}` must be a mapping of keys to values, got {shortened(values)}")
    for key in values:
        if key not in known:
            raise RecipeError(f"{file}: unknown key `{section}.{_key_name(key)}`{instead_of(_key_name(key), known, section)}")


def instead_of(name: str, known: typing.Iterable[str], section: str | None = None, stage: str | None = None) -> str:
    """The end of a message on an unknown key: what people mean by this name, or the nearest of those there are."""
    advice = meant(name, section, keys_of_sections(), stage)
    return f"; {advice}" if advice else nearest(name, known)


@functools.cache
def keys_of_sections() -> dict[str, tuple[str, ...]]:
    """The keys that each section of a recipe takes."""
    shared = {name: tuple(f.name for f in dataclasses.fields(cls)) for name, cls in SECTIONS.items()}
    return shared | {name: stage.keys for name, stage in TRAINED.items()}


def _key_name(key: Any) -> str:
    return key if isinstance(key, str) else shortened(key)


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe folder (or its recipe.yaml, or a run's recipe.resolved.yaml) with dotted `overrides` applied.

    Raises:
        RecipeError: naming the file, the key and the nearest valid name.
    """
    file = Path(path)
    if os.path.isdir(file):
        file = file / "recipe.yaml"
    if not os.path.isfile(file):  # false, not an error, for what can be no file's name
        raise RecipeError(f"{file}: no such recipe; {_known_recipes()}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{file}: not a text file in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from None
    content = read_yaml(text, str(file))
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of sections, got {type(content).__name__}")
    folder = Path(coerce(content.pop("folder", str(file.parent)), str, f"{file}: `folder`")).resolve()

    _replace_reward(content, overrides or {})
    origin = {}  # (section, key) -> where it was said, so that an error blames the override and not the file
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            raise RecipeError(f"--{dotted}: an override is --section.key; sections: {', '.join(_section_names())}")
        if content.get(section) is None:
            content[section] = {}
        if isinstance(content[section], dict):
            content[section][key] = value
        origin[section, key] = f"--{dotted}"

    for section in content:
        if section not in _section_names():
            blame = next((o for (s, _), o in origin.items() if s == section), str(file))
            near = nearest(_key_name(section), _section_names())
            first = next(iter(content[section] or ()), None) if isinstance(content[section], dict) else _key_name(section)
            advice = "" if near else instead_of(_key_name(first), (), stage=None)
            raise RecipeError(f"{blame}: unknown section `{_key_name(section)}`{near or advice}")

    def build(section: str, builder: Callable[[str, Any, str], Any]) -> Any:
        values = {} if content.get(section) is None else content[section]
        try:
            _refuse_secrets(section, values, str(file))
            return builder(section, values, str(file))
        except RecipeError as error:  # blame the override, where one set the key
            message = str(error)
            for (s, key), flag in origin.items():
                if s == section and f"`{section}.{key}`" in message:
                    message = message.replace(f"{file}:", f"{flag}:", 1)
            raise RecipeError(message) from None

    sections = {name: build(name, _build_section) for name in SECTIONS}
    try:
        sections["reward"].all_terms()
    except RecipeError as error:
        blame = next((o for (s, _), o in origin.items() if s == "reward"), str(file))
        raise RecipeError(f"{blame}: {error}") from None
    if "reward.normalize_prompts" in (overrides or {}) and not sections["reward"].normalize:
        raise RecipeError("--reward.normalize_prompts: `reward.normalize_prompts` needs `reward.normalize` true")
    given = {name: {key for section, key in origin if section == name} for name in TRAINED}
    stages = {name: build(name, functools.partial(_build_stage, given=given[name])) for name in TRAINED}
    return Recipe(folder=folder, stages=stages, **sections)


def _replace_reward(content: dict[str, Any], overrides: dict[str, Any]) -> None:
    """An override that names another kind of reward than the file's takes its place, with all that the file says of the old.

    What only a reward adapter can (`reward_baseline`) goes with it.
    """
    kinds = (*REWARD_KINDS, "terms")
    named = {kind for kind in kinds if overrides.get(f"reward.{kind}")}
    reward = content.get("reward")
    if not isinstance(reward, dict) or named <= {kind for kind in kinds if reward.get(kind)}:  # also where none is named
        return
    for key in ("terms", *(f.name for f in dataclasses.fields(RewardTerm))):
        reward.pop(key, None)
    terms = overrides.get("reward.terms")
    parts = terms if isinstance(terms, list) else []
    if "adapter" not in named and not any(isinstance(term, dict) and term.get("adapter") for term in parts):
        for section in TRAINED:
            if isinstance(content.get(section), dict) and content[section].get("reward_baseline"):
                content[section]["reward_baseline"] = False


def _section_names() -> list[str]:
    return [*SECTIONS, *TRAINED]


def _known_recipes() -> str:
    names = sorted(str(p.parent) for p in Path("recipes").glob("*/recipe.yaml"))
    return f"recipes here: {', '.join(names)}" if names else "give a folder that holds a recipe.yaml"
