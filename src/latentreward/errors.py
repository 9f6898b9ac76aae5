"""Errors for what a user can put right: shown as one line, without a traceback."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_LIST = 30


class InputError(ValueError):
    """Bad input: a setting, a file or a column that the user can change.

    Raise it with one line that names the field, the value and the remedy. The command line prints that line and exits
    with status 2, as it does for an OSError and for what constructors say against a setting; any other exception counts
    as a bug and keeps its traceback.
    """


@contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Say ``place`` before what is wrong."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}{error}") from error


def check_at_least_one(place: str = "", /, **settings: float | None) -> None:
    """Raise InputError, with ``place`` before the name, for a setting that is given and below 1."""
    for name, value in settings.items():
        if value is not None and not value >= 1:  # NaN too
            raise InputError(f"{place}{name} is {value:g}; it must be at least 1")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Tail for an error message about an unknown name.

    Args:
        name: What the user wrote.
        choices: Names that would have been accepted.

    Returns:
        ``"; did you mean 'x'?"`` for the closest choice, the list of choices if none is close, and an empty string
        if there are no choices or too many to read.
    """
    known = sorted(set(choices))
    by_lower_case = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    if close:
        return f"; did you mean {by_lower_case[close[0]]!r}?"
    return f"; choose from {', '.join(known)}" if 0 < len(known) <= LONGEST_LIST else ""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; from a loader's worker process, the message it had there."""
    text = str(error)
    if re.match(r"Caught \w+ in DataLoader worker", text):  # torch puts the worker's traceback before it
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type where it has none."""
    text = str(error).strip()
    if "weights_only" in text:  # torch refuses what could run code, and advises how to run it all the same
        name = re.search(r"GLOBAL (\S+)", text)
        return f"it names {name[1]}" if name else "it holds more than tensors and plain values"
    return text.splitlines()[0] if text else type(error).__name__
