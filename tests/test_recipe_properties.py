"""Whatever is written in a recipe or on a command line: it resolves and can be written down again, or it is a RecipeError."""

import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_recipes.command_line import parse_command_line
from rlhf_recipes.recipe.errors import RecipeError
from rlhf_recipes.recipe.loading import DEFAULT_RECIPE, load_recipe
from rlhf_recipes.recipe.sections import SECTIONS, Recipe
from rlhf_recipes.recipe.stages import TRAINED

GOOD = {"model": {"path": "x"}, "reward": {"adapter": "y"}}
IMDB = yaml.safe_load((DEFAULT_RECIPE / "recipe.yaml").read_text(encoding="utf-8"))
SHARED_KEYS = [(section, key) for section, cls in SECTIONS.items() for key in cls.model_fields]
STAGE_KEYS = [(stage, key) for stage, row in TRAINED.items() for key in row.fields]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=8)
    | st.text(max_size=12)
    | st.text(st.characters(), max_size=4)  # surrogates, which no file can hold, too
    | st.sampled_from([math.nan, math.inf, -0.0, "5e-7", "1e400", "nan", "-inf", "no", "null", "~", "latest", "0x10", "1_0"])
)
nested = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3) | st.sets(scalars, max_size=2),
    max_leaves=8,
)
anything = scalars | nested
every_key = st.sampled_from(SHARED_KEYS) | st.sampled_from(STAGE_KEYS)


def examples(count):
    """The same examples every time, without a time limit for one."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Where the recipes of this file are written, one after the other."""
    return tmp_path_factory.mktemp("properties") / "recipe.yaml"


def answered(function, *args):
    """What it returns; None where it refuses, in one printable line."""
    try:
        return function(*args)
    except RecipeError as error:
        message = str(error)
    assert message
    assert message.isprintable()
    return None


def resolved(content: str | bytes | dict, file, overrides: dict | None = None) -> Recipe | None:
    """The recipe of a file's content, which is then the same after being written and read; None where it is refused."""
    if isinstance(content, dict):
        try:
            content = yaml.safe_dump(content, allow_unicode=True).encode()
        except (yaml.YAMLError, UnicodeEncodeError):  # a surrogate, in a file: only a test can ask for it
            content = yaml.safe_dump(content)
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    recipe = answered(load_recipe, file, overrides)
    if recipe is None:
        return None
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe
    return recipe


@examples(150)
@given(content=st.text() | st.binary())
def test_any_text(file, content):
    assert resolved(content, file) is None  # it would have to name a model


@examples(150)
@given(content=st.text(st.sampled_from("{}[]:,&*!|>-?'\"#%@ \nab1.~<="), max_size=60))
def test_any_text_of_what_yaml_is_made_of(file, content):
    assert resolved(content, file) is None


@examples(150)
@given(content=st.dictionaries(st.sampled_from([*SECTIONS, *TRAINED]) | scalars, anything, max_size=4))
def test_any_structure(file, content):
    resolved(GOOD | content, file)


@examples(400)
@given(at=every_key, value=anything)
def test_any_value_of_any_key(file, at, value):
    section, key = at
    resolved(GOOD | {section: {**GOOD.get(section, {}), key: value}}, file)
    resolved(GOOD, file, {f"{section}.{key}": value})  # as a program might give it


@examples(40)
@given(at=st.sampled_from([(s, k) for s, keys in IMDB.items() for k in keys]), name=st.text(max_size=8), value=anything)
def test_mutations_of_the_default_recipe(file, at, name, value):
    section, key = at
    keys = IMDB[section]
    renamed = {name if k == key else k: v for k, v in keys.items()}
    less = {k: v for k, v in keys.items() if k != key}
    for changed in (renamed, less, keys | {key: value}, value):
        resolved(IMDB | {section: changed}, file)


@examples(400)
@given(at=every_key, value=st.text(max_size=12) | anything.map(repr) | st.integers().map(str) | st.floats().map(str))
def test_any_value_on_the_command_line(file, at, value):
    section, key = at
    if (line := answered(parse_command_line, [f"--{section}.{key}={value}"])) is not None:
        resolved(GOOD, file, line.overrides)


@examples(300)
@given(words=st.lists(st.text(max_size=8) | st.sampled_from(["--", "-h", "--recipe", "--resume", "--a.b", "--run.name"])))
def test_any_command_line(words):
    answered(parse_command_line, words)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--run.name=2024-01-31", "2024-01-31"),  # YAML's dates are text
        ("--run.name=no", "no"),  # and so are its other booleans
        ("--run.project=a\u00a0b", "a\u00a0b"),
        ("--run.seed=0x10", 16),
        ("--objective.beta=1", 1.0),
        ("--objective.beta=5e-7", 5e-7),
        ("--reward.function=true", True),
        ("--evaluate.policies=[reference, a=b]", ["reference", "a=b"]),
    ],
)
def test_what_resolves(file, word, value):
    overrides = parse_command_line([word]).overrides
    without = {"reward.adapter": None} if "function" in word else {}
    section, _, key = next(iter(overrides)).partition(".")
    assert getattr(getattr(resolved(GOOD, file, overrides | without), section), key) == value
