"""Check of values from JSON and YAML against types: one line with place and fault."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError
from latentreward.core.storage.json_files import STRICT, check_arguments, checked, entry


@dataclass(frozen=True)
class Part:
    """A part of a record."""

    __pydantic_config__ = STRICT
    size: int
    scales: tuple[float, ...] = ()
    kind: Literal["a", "b"] = "a"


INSIDE: list[Any] = []
INSIDE.append(INSIDE)


def test_a_value_of_the_type_is_converted() -> None:
    parts = {"x": {"size": 1, "scales": [1, 2.5]}}
    assert checked(dict[str, Part], parts) == {"x": Part(1, (1.0, 2.5))}


@pytest.mark.parametrize(
    ("kind", "value", "line"),
    [
        (Part, {"size": True}, "p.size: "),
        (Part, {"size": 1, "scales": [math.nan]}, "p.scales[0]: "),
        (Part, {"size": 1, "kind": "c"}, "p.kind: "),
        (dict[str, Part], {"x": {"sise": 2}}, "p.x.sise: "),
        (Part, {}, "p.size: "),
        (Part, 3, "p: "),
        (list[str], ["x" * 1000], None),
        (int, "x" * 1000, f"p: it must be a valid integer, not '{'x' * 99}…; remedy"),
        (int, "a\x1b[2J\nb", "p: it must be a valid integer, not 'a\\x1b[2J\\nb'; remedy"),
        (list[Any], INSIDE, "p: "),
        (list[Any], [{(1, 2): 3}], "p: "),
        (str, "\ud800", "p: "),
    ],
)
def test_a_value_of_another_type_is_one_line(kind: Any, value: Any, line: str | None) -> None:
    if line is None:
        assert checked(kind, value) == value
        return
    with pytest.raises(InputError) as error:
        checked(kind, value, "p", "remedy")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_arguments_of_a_call_are_checked_where_their_types_are_those_of_json() -> None:
    def target(size: int | None, scales: Sequence[float], source: PathText, other: Mapping[str, Part]) -> None: ...

    check_arguments(target, {"size": None, "scales": (1, 2.0), "source": "x", "other": 5, "unknown": 6})
    for settings, name in (({"size": 1.5}, "size"), ({"scales": 1}, "scales"), ({"source": 2}, "source")):
        with pytest.raises(InputError, match=f"^{name}: it must be "):
            check_arguments(target, settings)


@pytest.mark.parametrize(
    ("config", "kind", "problem"),
    [
        ({}, int, " lacks s; get the pipeline as published"),
        ({"s": 0}, int, ": s: it must be greater than 0, not 0; get the pipeline"),
        ({"s": True}, int, ": s: it must be a valid integer, not True"),
        ({"s": 1}, bool, ": s: it must be a valid boolean, not 1"),
        ({"s": 10**400}, float, ": s: it must be a (finite|valid) number, not 10"),
    ],
)
def test_an_entry_of_another_kind_is_one_line(config: dict[str, Any], kind: Any, problem: str) -> None:
    with pytest.raises(InputError) as error:
        entry(config, "s", kind, "vae")
    assert re.match(f"vae{problem}", str(error.value))  # pydantic's releases word the last one differently
