"""Tokens of servers, in files and environment variables."""

from pathlib import Path

from latentreward.errors import InputError, first_line
from latentreward.storage.texts import read_text


def token_of_file(file: str | Path, setting: str) -> str:
    """Read a token from a file (``~`` is the home folder), without the white space around it.

    Raises:
        InputError: If the file cannot be read, or holds no token.
    """
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
