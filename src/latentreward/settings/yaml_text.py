"""Checks of YAML text before jsonargparse builds values from it: duplicate keys, tags, and texts that grow when built.

PyYAML keeps the last of two equal keys without a word, and builds what aliases repeat at its full size.
"""

from itertools import chain

import yaml

LARGEST = 100_000
"""Values that one YAML text may hold once its aliases are replaced by what they stand for."""
DEEPEST = 100
"""Levels of lists and mappings inside each other."""
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


def check_yaml(text: str) -> None:
    """Refuse YAML that would be read otherwise than it looks, or that would not fit memory.

    Raises:
        yaml.YAMLError: In one line, with the number of the line in ``text``.
    """
    if depth(text) > DEEPEST:
        raise yaml.YAMLError(f"more than {DEEPEST} lists and mappings inside each other; write a flatter file")
    node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if node is not None:
        _size(node, {})


def depth(text: str) -> int:
    """Count the levels of lists and mappings inside each other."""
    deepest = level = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        deepest = max(deepest, level)
    return deepest


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the values that ``node`` stands for once aliases are replaced; ``sizes`` holds those counted before."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.YAMLError(f"line {_line(node)}: an alias stands inside what it repeats; write it out")
        return sizes[id(node)]
    if node.tag not in PLAIN_TAGS and not node.tag.endswith(":timestamp") and not node.tag.endswith(":value"):
        raise yaml.YAMLError(f"line {_line(node)}: the tag {node.tag!r} is not accepted; write a plain value")
    sizes[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    nested = [] if isinstance(node, yaml.ScalarNode) else node.value
    children = chain(*nested) if isinstance(node, yaml.MappingNode) else nested
    sizes[id(node)] = 1 + sum(_size(child, sizes) for child in children)
    if sizes[id(node)] > LARGEST:
        raise yaml.YAMLError(f"line {_line(node)}: more than {LARGEST} values once aliases are replaced; write fewer")
    return sizes[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"line {_line(key)}: a list or mapping is no key; write a name")
        if key.value in lines:
            raise yaml.YAMLError(
                f"line {_line(key)}: {key.value!r} is given twice, first in line {lines[key.value]}; keep one of them"
            )
        lines[key.value] = _line(key)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
