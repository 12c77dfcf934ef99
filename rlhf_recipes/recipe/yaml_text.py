"""recipe.yaml as text: plain YAML alone, with each key once."""

import re
from typing import Any

import yaml

from rlhf_recipes.recipe.errors import RecipeError, shortened


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, which PyYAML silently overwrites, and anchors, of which a few lines can make
    billions of values; and that reads only true and false as booleans.

    YAML 1.1 also reads yes, no, on and off so, which turns `save_strategy: no` into False. A date is text, as a run may be
    named after one.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None:
            problem = "anchors and aliases (& and *) are not read here; write the value out, or put quotes around a text"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                problem = "`<<` merges other mappings into one, which is not done here; write its keys out"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key}` appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in PLAIN_TAGS  # None: whatever has no constructor is refused
}
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag != "tag:yaml.org,2002:timestamp" and (tag != "tag:yaml.org,2002:bool" or first in "tTfF")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, where: str) -> Any:
    """
    Raises:
        RecipeError: it is no YAML, or more than text, numbers, true, false, null, lists and mappings.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error}{at}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not valid YAML: too deeply nested") from None
    except (yaml.YAMLError, TypeError, ValueError, LookupError) as error:  # the last three of !!int x, "\UFFFFFFFF" and such
        raise RecipeError(f"{where}: not valid YAML: {error}") from None


class _Dumper(yaml.SafeDumper):
    """Writes a value that stands in two places twice: anchors are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_DEEPEST, _LARGEST = 32, 3.4e38


def not_plain(value: Any) -> str | None:
    """Why a value cannot be written down and read back as it is; None where it can."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > _DEEPEST:
            return f"expected values nested at most {_DEEPEST} deep"
        if isinstance(item, dict):
            pending += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, list | tuple):
            pending += [(inner, depth + 1) for inner in item]
        elif isinstance(item, str):
            if odd := re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", item):
                return f"the character {odd[0]!a} cannot be part of it"
        elif isinstance(item, float):
            if not abs(item) <= _LARGEST:
                return f"expected a finite number that float32 holds, got {item}"
        elif isinstance(item, int):
            if abs(item) >= 2**63:
                return f"expected a number of at most 64 bits, got one of {item.bit_length()}"
        elif item is not None:
            return f"expected text, a number, true, false, null, a list or a mapping, got {shortened(item)}"
    return None
