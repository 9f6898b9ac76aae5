"""Reading of texts, JSON and other plain values that were written elsewhere, with one-line errors."""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Gt, MinLen

from latentreward.core.errors import InputError, did_you_mean, first_line, printable
from latentreward.core.storage.user_files import IS_POINTER, POINTER, PULL

if TYPE_CHECKING:  # pydantic is imported where something is checked: `--help` comes without the third of a second
    from pydantic import ConfigDict, TypeAdapter

Kind = TypeVar("Kind", bool, int, float)
Content = TypeVar("Content")
STRICT: "ConfigDict" = {"allow_inf_nan": False, "extra": "forbid"}
"""Value of ``__pydantic_config__`` of a dataclass that :func:`checked` builds: finite numbers, no unknown names."""
SIZE = Annotated[int, Gt(0)]  # Type of the sizes among the entries that :func:`entry` returns
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""Pydantic's errors about a name that a record does not have."""
SHOWN = 100  # number of characters of a value from elsewhere that a message repeats
MISSING = ("missing", "missing_argument")  # pydantic's errors about a name that a record lacks
PLAIN = (bool, int, float, str, NoneType)


def parse(text: bytes | str) -> Any:
    """Parse JSON; InputError, a ValueError too, if an object has a key twice, of which the last would win."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError(f"key {shown(Counter(key for key, _ in pairs).most_common(1)[0][0])!r} is given twice")
    return found


def read_config(path: Path, name: str | None = None, remedy: str = "download it again") -> dict[str, Any]:
    """Read a JSON file that holds an object; raises InputError if it is damaged."""
    name = name or str(path)
    try:
        config = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is damaged ({first_line(error)}); {remedy}") from error
    if not isinstance(config, dict):
        raise InputError(f"{name} is damaged (it holds a {type(config).__name__}); {remedy}")
    return config


def checked(kind: type[Content] | Any, value: Any, place: str = "", remedy: str = "") -> Any:
    """Check a plain value, as JSON and YAML hold it, against a type that pydantic knows, and return it as that type.

    Types are checked strictly: a text is no number and a truth value none; numbers are finite. A whole number is also a
    float, a list also a tuple, and a mapping also a dataclass. ``place`` is the value's name in messages; it may end in
    a colon and a blank, after which the faulty part is named.
    """
    from pydantic import ValidationError

    try:
        return adapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        first = next((one for one in faults if one["type"] in UNKNOWN), faults[0])
        *parents, last = first["loc"] or ("",)
        inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        fault = f"{first['msg'].removeprefix('Value error, ')}, not {shown(repr(first['input']))}"
        if first["type"] in UNKNOWN:
            known = {one["loc"][-1] for one in faults if one["type"] in MISSING and [*one["loc"][:-1]] == parents}
            known |= {one.name for one in fields(kind)} if is_dataclass(kind) and not parents else set()
            fault = f"no setting has this name{did_you_mean(str(last), map(str, known))}"
        elif first["type"] in MISSING:
            fault = f"it is missing in {shown(first['input'])}"
        fault = fault.replace("Input should", "it must")
        inside = inside.removeprefix(".") if place[-1:] in ("", " ") else inside
        at = f"{place}{inside}".removesuffix(": ")
        raise InputError(f"{at}: {fault}{remedy and '; '}{remedy}") from error
    except (TypeError, ValueError, RecursionError) as error:  # it has other keys than texts, or is inside itself
        raise InputError(f"{place}: it is no plain value ({first_line(error)}){remedy and '; '}{remedy}") from error


def shown(value: Any) -> str:
    """Show the beginning of a value from elsewhere, in one printable line."""
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


@cache
def adapter(kind: Any) -> "TypeAdapter[Any]":
    """Return pydantic's check of a type, which refuses NaN and infinity; a record has a configuration of its own."""
    from pydantic import PydanticUserError, TypeAdapter

    try:
        return TypeAdapter(kind, config=STRICT)
    except PydanticUserError:
        return TypeAdapter(kind)


def check_arguments(target: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Raise InputError for settings from JSON of other types than the plain ones that ``target`` is annotated with."""
    parameters = signature(target, eval_str=True).parameters
    for name, value in settings.items():
        if name in parameters and is_plain(parameters[name].annotation):
            checked(parameters[name].annotation, value, name)


def is_plain(kind: Any) -> bool:
    """Tell whether an annotation names only types of JSON: numbers, texts, null, literals, and lists of these."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType, Sequence, list, tuple):
        return all(one is Ellipsis or is_plain(one) for one in arguments)
    return kind in PLAIN or origin is Literal or (origin is Annotated and is_plain(arguments[0]))


def entry(config: Mapping[str, Any], field: str, kind: type[Kind], name: str, default: Kind | None = None) -> Kind:
    """Return the entry ``field`` of a config that was written elsewhere, called ``name`` in messages.

    ``kind`` is ``int`` for sizes, which are at least 1. An entry that is missing or null has the ``default``; without
    one it must be there.
    """
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise InputError(f"{name} lacks {field}; get the pipeline as published")
    found: Kind = checked(SIZE if kind is int else kind, value, f"{name}: {field}", "get the pipeline as published")
    return found


def entries(
    config: Mapping[str, Any], field: str, kind: type[Kind], name: str, default: Sequence[Kind] = ()
) -> tuple[Kind, ...]:
    """Return the values of an entry that is a list; for the arguments and errors see :func:`entry`."""
    one: Any = SIZE if kind is int else kind
    several: Any = Annotated[tuple[one, ...], MinLen(1)]
    return entry(config, field, several, name, default or None)  # type: ignore[type-var, arg-type]


UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # byte order marks with which texts in UTF-16 begin

csv.field_size_limit(2**31 - 1)  # of 128 KiB by default, less than a column of metadata may hold


class UnreadableTextError(InputError):
    """Error about a text that cannot be read: file or place in it, what the text is, and what to do about it."""

    def __init__(self, name: str, problem: str, remedy: str = "save it as UTF-8") -> None:
        super().__init__(f"{name} is {problem}; {remedy}")
        self.problem = problem


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark; UnreadableTextError for other bytes and null characters."""
    if data.startswith(POINTER):
        raise UnreadableTextError(name, IS_POINTER, PULL)
    if data.startswith(b"PK\3\4"):
        raise UnreadableTextError(name, "a zip archive, not a text (unpack it)", "give a file in it")
    encoding = "utf-16" if data.startswith(UTF_16) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        problem = f"not {encoding.removesuffix('-sig').upper()} at byte {error.start + 1}"
        raise UnreadableTextError(name, problem) from error
    if "\0" in text:
        raise UnreadableTextError(name, f"not text (a null character after {text.index(chr(0))} characters)")
    return text


def read_text(file: Path) -> str:
    """Read a text file, see :func:`decode_text`."""
    return decode_text(file.read_bytes(), str(file))


def read_table(text: str, suffix: str) -> "csv.DictReader[str]":
    r"""Return the rows of a table of text; lines end with ``\n`` or ``\r\n``, no other character.

    In a table with the suffix ``.tsv`` quotation marks are part of the text (as in PartiPrompts).
    """
    lines = (found[0] for found in re.finditer(r"[^\n]*\n|[^\n]+", text))  # io.StringIO takes four times the memory
    if suffix == ".tsv":
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        head = text.partition("\n")[0]  # spreadsheets write semicolons where numbers have commas
        table = csv.DictReader(lines, strict=True, delimiter=";" if ";" in head and "," not in head else ",")
    names = [name for name in table.fieldnames or () if name]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise csv.Error(f"two columns have the name {twice!r:.60}")
    return table


def token_of_file(file: str | Path, setting: str) -> str:
    """Read a token from a file (``~`` is the home folder); raises InputError if the file cannot be read or has none."""
    source = f"{setting}={file}"
    try:
        text = read_text(Path(file).expanduser())
    except (OSError, InputError) as error:
        raise InputError(f"{source} cannot be read ({first_line(error)}); give a text file") from error
    return checked_token(text.strip(), source)


def checked_token(token: str, source: str) -> str:
    """Return a token; raise InputError that names its ``source`` if it cannot stand in a header of HTTP."""
    if not (token and token.isascii() and token.isprintable()):
        raise InputError(f"{source} must hold a token of printable ASCII characters")
    return token
