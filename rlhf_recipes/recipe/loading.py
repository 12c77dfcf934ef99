"""recipe.yaml and dotted overrides -> a typed, validated `Recipe`.

Nothing heavy is imported here: a wrong key is answered in well under a second.
"""

import functools
import os.path
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pydantic

from rlhf_recipes.recipe.errors import RecipeError, SectionError, nearest, shortened
from rlhf_recipes.recipe.keys import LORA_REFUSED, NO_SECRETS, OWNER_OF, SECRET, refuse_without_effect
from rlhf_recipes.recipe.names import meant
from rlhf_recipes.recipe.sections import REWARD_KINDS, SECTIONS, Recipe, RewardSection, RewardTerm
from rlhf_recipes.recipe.stages import TRAINED
from rlhf_recipes.recipe.validation import Section
from rlhf_recipes.recipe.yaml_text import not_plain, read_yaml

DEFAULT_RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "imdb"


def _refuse_secrets(section: str, values: Any) -> None:
    """Names the key of a secret anywhere in `values`, and never the value."""
    pending = [(section, None, values)]
    while pending:
        where, top, item = pending.pop()
        if isinstance(item, dict):
            for key, inner in item.items():
                if isinstance(key, str) and SECRET.search(key):
                    raise SectionError(top or key, f"`{where}.{key}`: {NO_SECRETS}")
                pending.append((f"{where}.{key}", top or key, inner))
        elif isinstance(item, list):
            pending += [(f"{where}[{i}]", top, inner) for i, inner in enumerate(item)]


def _build_section(name: str, values: Any) -> Section:
    section = _parse(SECTIONS[name], values, name)
    if isinstance(section, RewardSection):
        for i, term in enumerate(section.terms or ()):
            try:
                _parse(RewardTerm, term, f"reward.terms[{i}]")
            except SectionError as error:
                raise SectionError("terms", str(error)) from None
        section.check()
    return section


@functools.cache
def _stage_model(section: str) -> type[Section]:
    stage = TRAINED[section]
    keys: dict[str, Any] = {key: (stage.fields[key].type, None) for key in stage.keys}
    return pydantic.create_model(section, __base__=Section, **keys)


def _build_stage(name: str, values: Any, given: Collection[str]) -> dict[str, Any]:
    """`given`: the keys that the command line sets."""
    stage, section = TRAINED[name], _parse(_stage_model(name), values, name)
    typed = {key: getattr(section, key) for key in values}
    refuse_without_effect(name, stage.fields, stage.defaults, typed, given)
    return typed


def _parse(model: type[Section], values: Any, where: str) -> Section:
    return model.parse(values, where, functools.partial(_unknown, where, model.model_fields))


def _unknown(section: str, known: Iterable[str], key: str) -> str:
    """What is said of a key that a section does not take."""
    stage = TRAINED.get(section)
    if section == "lora" and key in LORA_REFUSED:
        return f"`lora.{key}` is not taken: {LORA_REFUSED[key]}; leave it out"
    if stage is not None and key in OWNER_OF:
        return f"`{section}.{key}` belongs to `{OWNER_OF[key]}`, which every stage shares; set it there"
    if stage is not None and key in stage.refused_keys:
        return f"`{section}.{key}` has no effect here: {stage.refused_keys[key]}; leave it out"
    return f"unknown key `{section}.{key}`{instead_of(key, known, section.partition('.')[0])}"


def instead_of(name: str, known: Iterable[str], section: str | None = None, stage: str | None = None) -> str:
    """The end of a message on an unknown key: what people mean by this name, or the nearest of those there are."""
    advice = meant(name, section, keys_of_sections(), stage)
    return f"; {advice}" if advice else nearest(name, known)


@functools.cache
def keys_of_sections() -> dict[str, tuple[str, ...]]:
    """The keys that each section of a recipe takes."""
    shared = {name: tuple(cls.model_fields) for name, cls in SECTIONS.items()}
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
    folder = content.pop("folder", str(file.parent))
    if not isinstance(folder, str) or not_plain(folder):
        raise RecipeError(f"{file}: `folder`: expected str, got {shortened(folder)}")

    _replace_reward(content, overrides or {})
    origin: dict[str, dict[str, str]] = {}  # section -> key -> the override that says it, and not the file
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            raise RecipeError(f"--{dotted}: an override is --section.key; sections: {', '.join(_section_names())}")
        if content.get(section) is None:
            content[section] = {}
        if isinstance(content[section], dict):
            content[section][key] = value
        origin.setdefault(section, {})[key] = f"--{dotted}"

    for section in content:
        if section not in _section_names():
            blame = next(iter(origin.get(section, {}).values()), file)
            near = nearest(_key_name(section), _section_names())
            first = next(iter(content[section] or ()), None) if isinstance(content[section], dict) else _key_name(section)
            advice = "" if near else instead_of(_key_name(first), (), stage=None)
            raise RecipeError(f"{blame}: unknown section `{_key_name(section)}`{near or advice}")

    def build(section: str, builder: Callable[..., Any], **more: Any) -> Any:
        values = {} if content.get(section) is None else content[section]
        try:
            _refuse_secrets(section, values)
            return builder(section, values, **more)
        except SectionError as error:
            said = origin.get(section, {})
            blame = next(iter(said.values()), file) if error.key is None else said.get(error.key, file)
            raise RecipeError(f"{blame}: {error}") from None

    sections = {name: build(name, _build_section) for name in SECTIONS}
    if "reward.normalize_prompts" in (overrides or {}) and not sections["reward"].normalize:
        raise RecipeError("--reward.normalize_prompts: `reward.normalize_prompts` needs `reward.normalize` true")
    stages = {name: build(name, _build_stage, given=origin.get(name, {})) for name in TRAINED}
    return Recipe(folder=Path(folder).resolve(), stages=stages, **sections)


def _replace_reward(content: dict[str, Any], overrides: dict[str, Any]) -> None:
    """An override that names another kind of reward than the file's takes its place, with all that the file says of the old.

    What only a reward adapter can (`reward_baseline`) goes with it.
    """
    kinds = (*REWARD_KINDS, "terms")
    named = {kind for kind in kinds if overrides.get(f"reward.{kind}")}
    reward = content.get("reward")
    if not isinstance(reward, dict) or named <= {kind for kind in kinds if reward.get(kind)}:  # also where none is named
        return
    for key in ("terms", *RewardTerm.model_fields):
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
