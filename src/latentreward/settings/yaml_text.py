"""Checks of YAML text before jsonargparse parses it: duplicate keys, tags, depth, and size with aliases expanded.

PyYAML silently keeps the last of two equal keys. It also expands aliases, so that a short text can fill the memory.
"""

from itertools import chain
from typing import Any

import yaml

LARGEST = 100_000  # largest number of values in one YAML text after its aliases are expanded
DEEPEST = 100  # largest number of levels of nested lists and mappings
PLAIN = ("map", "seq", "str", "int", "float", "bool", "null", "merge", "timestamp", "value")  # "value" is that of "="
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in PLAIN}
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str) -> None:
    """Raise yaml.YAMLError, with the line, for duplicate keys, keys that are no texts, tags, depth and many values."""
    if depth(text) > DEEPEST:
        raise yaml.YAMLError(f"more than {DEEPEST} lists and mappings inside each other; write a flatter file")
    node = yaml.compose(text, Loader=LOADER)
    if node is not None:
        _size(node, {})


def depth(text: str) -> int:
    """Count the levels of nested lists and mappings."""
    deepest = level = 0
    for event in yaml.parse(text, Loader=LOADER):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        deepest = max(deepest, level)
    return deepest


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the values of ``node`` after its aliases are expanded.

    ``sizes`` holds the counts by ``id``; 0 while a node is being counted.

    Raises:
        yaml.YAMLError: If there are too many values, a tag or a bad key, or an alias inside its own anchor.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.YAMLError(
                f"line {_line(node)}: an alias is inside the value that it repeats; write the value out"
            )
        return sizes[id(node)]
    if node.tag not in PLAIN_TAGS:
        raise yaml.YAMLError(f"line {_line(node)}: the tag {node.tag!r} is not accepted; write a plain value")
    sizes[id(node)] = 0
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"line {_line(key)}: a list or mapping is not a key; write a name")
        if key.value in lines:
            raise yaml.YAMLError(
                f"line {_line(key)}: {key.value!r} is given twice, first in line {lines[key.value]}; keep one of them"
            )
        lines[key.value] = _line(key)
    nested = [] if isinstance(node, yaml.ScalarNode) else node.value
    children = chain(*nested) if isinstance(node, yaml.MappingNode) else nested
    sizes[id(node)] = 1 + sum(_size(child, sizes) for child in children)
    if sizes[id(node)] > LARGEST:
        raise yaml.YAMLError(f"line {_line(node)}: more than {LARGEST} values once aliases are replaced; write fewer")
    return sizes[id(node)]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
