"""Check of YAML text before it is loaded."""

from itertools import chain
from typing import Any

import yaml

LARGEST = 100_000  # largest number of values in one YAML text after its aliases are expanded
DEEPEST = 100  # largest number of levels of nested lists and mappings
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str) -> None:
    """Raise yaml.YAMLError, with the line, for a key that is given twice, and for too many values or levels.

    PyYAML silently keeps the last of two equal keys. Aliases let a short text of a stranger fill the memory.
    """
    _count(yaml.compose(text, Loader=LOADER), {}, 0)


def _count(node: Any, sizes: dict[int, int], level: int) -> int:
    """Count the values of ``node`` with its aliases expanded; ``sizes`` holds the counts by ``id``."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in sizes:
        return sizes.get(id(node), 1)
    if level == DEEPEST:
        raise yaml.YAMLError(f"more than {DEEPEST} lists and mappings inside each other; write a flatter file")
    sizes[id(node)] = LARGEST  # for an alias inside the value that it repeats
    children = node.value
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                first = f"{key.value!r} is given twice, first in line {lines[key.value]}"
                raise yaml.YAMLError(f"line {line}: {first}; keep one of them")
            lines[key.value] = line
        children = chain(*node.value)
    sizes[id(node)] = 1 + sum(_count(child, sizes, level + 1) for child in children)
    if sizes[id(node)] > LARGEST:
        line = node.start_mark.line + 1
        raise yaml.YAMLError(f"line {line}: more than {LARGEST} values once aliases are replaced; write fewer")
    return sizes[id(node)]
