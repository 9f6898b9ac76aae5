"""Values of rows as other programs write them: JSON, numbers and texts, and the pictures that a row edits."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from latentreward.core.errors import InputError
from latentreward.core.storage.json_files import decode_text, parse
from latentreward.data.images import SUFFIXES

EDIT_SOURCE = re.compile(
    r"(source|src|input|condition|conditioning|reference|original|control|before)_(image|img)s?|path_src|prompt_images",
    re.I,
)
"""Names, in public data sets, of the column with the picture that a row's images are edits of."""
PERHAPS_SOURCE = re.compile(r"((image|img)_)?(source|src|input|original|before)", re.I)
"""Names of such a column if it holds a picture; else it may hold anything."""
SOURCES = ("source_images", "source_image")
"""Names under which readers read such pictures, in order of preference: a list, or one picture."""
MOST_SOURCES = 16
"""Largest number of pictures of a row."""
EDIT_UNREAD = "edit of a picture in a field that is not read"
ARRAY_REMEDY = "give the published file, one JSON list of objects"


def edit_problem(source: str, edits: bool = True) -> str:
    """Return what is wrong with rows that edit the picture in an unread field, for a reader that takes ``edits``."""
    remedy = f"and {SOURCES[0]} is read; rename it" if edits else "which this reader does not take; write JSON lines"
    return f"{short(source)} is a picture to edit, {remedy}, or set sources: ignore"


def parse_rows(
    data: bytes | str, name: str, remedy: str = ARRAY_REMEDY, as_list: Callable[[Any], Any] | None = None
) -> list[Any]:
    """Parse JSON that holds a list, or of which ``as_list`` makes one; ``name`` names the file in messages."""
    try:
        rows = parse(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error}); {remedy}") from error
    rows = rows if as_list is None else as_list(rows)
    if not isinstance(rows, list):
        raise InputError(f"{name}: holds {short(rows)}; {remedy}")
    return rows


def parse_value(line: bytes) -> tuple[Any, str]:
    """Parse a line of JSON; return its value, and a few words on why it holds none, empty if it does."""
    try:
        text = decode_text(line, "the line").strip()
        return parse(text), ""
    except InputError as error:
        return None, getattr(error, "problem", str(error))
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        return None, "cut off" if cut_off else f"no JSON at character {error.pos + 1}"
    except RecursionError:
        return None, "nested too deeply"
    except ValueError:  # Python converts 4300 digits at most
        return None, "a number is too long"


def parse_line(line: bytes) -> dict[str, Any] | str:
    """Parse a line; return its JSON object, or a few words on why it holds none."""
    return as_object(*parse_value(line))


def as_object(value: Any, problem: str) -> dict[str, Any] | str:
    """Return a value that is an object; of any other one, or one with a problem, a few words on why it is none."""
    if problem or isinstance(value, dict):
        return problem or value
    return f"{short(value)} is no JSON object"


def parse_json(text: str, otherwise: Any) -> Any:
    """Parse a JSON text; return ``otherwise`` if the text is not valid JSON, or gives a key twice."""
    try:
        return parse(text)
    except (ValueError, RecursionError):
        return otherwise


def parse_number(value: Any) -> float | None:
    """Convert a finite number, or a text with one, to float; None for anything else. Tables may hold decimals."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    if isinstance(value, str) and "_" in value:  # Python's own 1_000
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def parse_text(value: Any) -> str | None:
    """Return a text with lone surrogates replaced, which tokenizers refuse; None if ``value`` is not a text."""
    if not isinstance(value, str):
        return None
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def encodable(text: str) -> str:
    """Return a text whose lone surrogates, as in names of files that are not UTF-8, are written as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def find_edit_source(row: Mapping[str, Any], known: Collection[str] = ()) -> str | None:
    """Return the name of a row's field, none of ``known``, with the picture that its images are edits of; else None."""
    unread = {name: value for name, value in row.items() if value and name not in known}
    return next((name for name, value in unread.items() if _means_source(name, _is_picture(value))), None)


def list_sources(row: Mapping[str, Any], fields: Sequence[str] = SOURCES) -> tuple[str, list[Any]]:
    """Return the first of a row's fields with pictures to edit, and these pictures, none for a row without.

    A text in the form of a JSON list, as tables in CSV hold it, is a list. Of objects with a ``path`` only that counts.
    """
    for name in fields:
        value = row.get(name)
        value = parse_json(value, value) if isinstance(value, str) and value.startswith("[") else value
        if value:
            values = value if isinstance(value, list) else [value]
            by_path = (isinstance(one, dict) and one.get("path") and not one.get("bytes") for one in values)
            return name, [one["path"] if named else one for one, named in zip(values, by_path, strict=True)]
    return fields[0] if fields else "", []


@lru_cache
def _means_source(name: object, picture: bool) -> bool:
    return bool(EDIT_SOURCE.fullmatch(str(name)) or (picture and PERHAPS_SOURCE.fullmatch(str(name))))


def _is_picture(value: Any) -> bool:
    """Tell whether a value is bytes, a struct as ``datasets`` writes images, or the name of an image file."""
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, str):
        return value.lower().endswith(SUFFIXES)
    return isinstance(value, bytes) or (isinstance(value, dict) and ("bytes" in value or "path" in value))


def short(value: Any) -> str:
    """Format a value for an error message, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
