"""Decoding of texts, of tables of text and of tokens that other programs or people wrote."""

import codecs
import csv
import re
from pathlib import Path

from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.user_files import IS_POINTER, POINTER, PULL

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

    Args:
        text: Whole table, its first line with the names of the columns.
        suffix: ``.csv``; or ``.tsv``, in which quotation marks are part of the text (as in PartiPrompts).

    Raises:
        csv.Error: If two columns have one name; while rows are read, if a quotation mark is not closed.
    """
    lines = (found[0] for found in re.finditer(r"[^\n]*\n|[^\n]+", text))  # io.StringIO takes four times the memory
    if suffix == ".tsv":
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        table = csv.DictReader(lines, strict=True)
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
