"""Parsing of JSON from untrusted clients: its structure is bounded before objects are made."""

import base64
from itertools import accumulate
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from latentreward.apps.serving.refusals import RequestError
from latentreward.core.errors import first_line
from latentreward.core.storage.json_files import parse

PROMPT_LENGTH = 10_000  # greatest length of a prompt, in characters; text encoders truncate far earlier
Content = TypeVar("Content", bound=BaseModel)


def read_json(body: bytes, kind: type[Content], most: int, form: str) -> Content:
    """Parse JSON into a pydantic model; ``most`` and ``form`` are those of :func:`check_structure`.

    Raises:
        RequestError: If the body is no such JSON. With status 413 if it is too long in parts.
    """
    check_structure(body, most, form)
    return parse_json(body, kind, form)


def parse_json(text: bytes, kind: type[Content], form: str) -> Content:
    """Parse JSON of bounded structure into a pydantic model; raise RequestError with ``form`` if it is no such."""
    try:
        parse(text)  # pydantic would take the last value of a key that is given twice
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body: {first_line(error)}; give a JSON object {form}") from error
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:60] or "the body"
        raise RequestError(f"{where}: {first['msg']}; give a JSON object {form}") from error


def check_structure(body: bytes, most: int, form: str) -> None:
    """Refuse, before parsing, JSON that would become many objects, or long texts of several bytes per character.

    The body is split at unescaped quotes, with a limit on the number of pieces, so that time and memory are bounded for
    any content. ``most`` limits the number of texts, and of bytes outside of texts. Messages show ``form``, an example.

    Raises:
        RequestError: If the body has too many escapes, texts or values, or a text that is too long for a prompt and is
            not base64.
    """
    if body.count(b"\\") > 2**20 + len(body) // 32:  # some encoders write one before each slash of base64
        raise RequestError("the body holds more escapes (\\) than prompts of a permitted length need", 413)
    pieces = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"', 2 * most)
    if len(pieces) > 2 * most:
        raise RequestError(f"over {most} texts; send fewer images at once", 413)
    between = [piece.translate(None, b" \t\r\n") for piece in pieces[::2]]
    if sum(map(len, between)) > most:
        steps = ((sign in b"[{") - (sign in b"]}") for sign in b"".join(between)[:most])
        deep = max(accumulate(steps)) > 8  # which no request is
        raise RequestError(f"{'too deeply nested' if deep else 'too many values'} for {form}")
    # A character of a prompt has at most 12 bytes in JSON: two times \uXXXX.
    long = [text for text in pieces[1::2] if len(text) > 12 * PROMPT_LENGTH]
    if any(b"\\u" in text or not text.isascii() for text in long):
        raise RequestError("a text is too long for a prompt, and no base64", 413)


def from_base64(place: str, text: str) -> bytes:
    """Decode base64; raise RequestError that names ``place`` if the text is none."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(f"{place} is no base64") from error
