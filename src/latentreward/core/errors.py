"""What a user is told: errors to correct, in one line without a traceback, and not the idle messages of libraries."""

import difflib
import logging
import math
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import walk_tb
from typing import Any, get_args, get_type_hints

LONGEST_LIST = 30  # number of valid names up to which an error message lists all of them
LIGHTNING_NO_GPU = "No supported gpu backend found"
NO_GPU = "torch finds no GPU on this machine; set --trainer.accelerator cpu or auto, or install torch for the GPU"
"""What a user is told in place of :data:`LIGHTNING_NO_GPU`, the whole of Lightning's message."""

LONGEST_QUOTE = 200  # characters up to which an error message quotes a file's name or what a file holds
SEARCHED = "in the current folder, beside the --config file, or installed"  # Where a module that settings name may lie
UNSEEN = ("Cc", "Cf", "Cs")  # Unicode categories of characters that a terminal does not draw but may obey


class InputError(ValueError):
    """Bad input that the user can correct: a setting, a file or a column.

    The message should be one line that names the field, the value and the remedy. The command line prints that line and
    exits with status 2. An OSError, a ValueError that a constructor raises about a setting, or an error in the user's
    own code ends in the same way. Any other exception counts as a bug and keeps its traceback.
    """


@contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Prefix the message of an InputError raised inside the block with ``place``, e.g. ``"head: "``."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}{error}") from error


def check_at_least_one(place: str = "", /, **settings: float | None) -> None:
    """Raise InputError for the first setting below 1, named with the prefix ``place``; None is accepted."""
    for name, value in settings.items():
        if value is not None and not value >= 1:  # NaN too
            raise InputError(f"{place}{name} is {value:g}; it must be at least 1")


def check_range(span: str, hint: str = "", /, **settings: float | None) -> None:
    """Raise InputError for the first setting outside an interval; None is accepted.

    Args:
        span: Interval, such as ``"[0, 1)"``; an end ``inf)`` stands for any finite number.
        hint: End of the message, such as a paper's value.
        settings: Values by name.
    """
    low, high = (float(end) for end in span[1:-1].split(","))
    least = "positive" if span.startswith("(0,") else f"at least {low:g}"
    wanted = f"lie in {span}" if math.isfinite(high) else f"be {least}{' and finite' * span.endswith(')')}"
    for name, value in settings.items():
        ends = {low: span[0] == "[", high: span[-1] == "]"}
        if value is not None and not (low <= value <= high and ends.get(value, True)):  # NaN too
            raise InputError(f"{name}={value:.9g} must {wanted}{hint and f'; {hint}'}")


def check_multiples(field: str, sides: Iterable[int], multiple: int) -> None:
    """Raise InputError if a side of a setting, images or latents, named ``field``, is no positive multiple."""
    for side in sides:
        if side < 1 or side % multiple:
            below = side // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below > 0 else str(multiple)
            need = f"the {multiple} that the model needs"
            raise InputError(f"{field}: {side} is no multiple of {need}; make it {nearest}")


def check_once(**settings: Sequence[float]) -> None:
    """Raise InputError for the first setting in which a value is repeated."""
    for name, values in settings.items():
        if len(set(values)) < len(values):
            raise InputError(f"{name}={list(values)}; give each one once")


def check_choices(kind: type, /, **settings: Any) -> None:
    """Raise InputError for the first setting that is none of the values of its ``Literal`` in ``kind.__init__``."""
    hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    for name, value in settings.items():
        if value not in get_args(hints[name]):
            known = map(str, get_args(hints[name]))
            raise InputError(f"{kind.__name__}: {name}={value!r} is not known{did_you_mean(str(value), known)}")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest of ``choices``, or the list of a few."""
    known = sorted(set(choices))
    by_lower_case = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case)
    if close:
        ratios = {one: difflib.SequenceMatcher(None, one, name.lower()).ratio() for one in close}
        nearest = max(close, key=lambda one: (ratios[one], sum(map(str.__eq__, one, name.lower()))))  # sd15 for sd16
        return f"; did you mean {by_lower_case[nearest]!r}?"
    return f"; choose from {', '.join(known)}" if 0 < len(known) <= LONGEST_LIST else ""


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks; of one raised in a DataLoader's worker the original message."""
    text = str(error)
    if re.match(r"Caught \w+ in DataLoader worker", text):  # torch puts the worker's traceback before the message
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return printable(" ".join(text.split())) or type(error).__name__


def where(error: BaseException | None) -> str:
    """Return class and place of an error in the user's own code, in brackets, for the end of a message about it.

    The place is the innermost line of a file that is neither installed nor of this package, also in a DataLoader's
    worker process. The result is empty without such a file, and behind an InputError, which says enough.
    """
    installed: tuple[str, ...] = str(Path(os.__file__).parent), str(Path(__file__).parents[1])
    installed += (*getattr(sys.modules.get("latentreward.callbacks"), "__path__", ()),)
    place = ""
    while error is not None and not isinstance(error, InputError):
        lines = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
        for file, line in [*lines, *re.findall(r'File "(.+)", line (\d+), in', str(error))]:
            if file.endswith(".py") and not file.startswith(installed) and "-packages/" not in file:
                place = f" ({type(error).__name__}, {Path(file).name}:{line}; --debug shows the traceback)"
        error = error.__cause__ or error.__context__
    return place


def printable(text: str) -> str:
    """Escape characters by which a text could steer a terminal, or change the direction of writing; not line breaks."""
    shown = (c if c == "\n" or unicodedata.category(c) not in UNSEEN else ascii(c)[1:-1] for c in text)
    return text if text.isascii() and text.replace("\n", "").isprintable() else "".join(shown)


def tell(line: str) -> None:
    """Print a note on global rank 0, on what a run leaves out or does otherwise than asked."""
    from lightning_utilities.core.rank_zero import rank_zero_only

    if not getattr(rank_zero_only, "rank", 0):
        print(f"note: {printable(line)}", file=sys.stderr, flush=True)


def quoted(text: str) -> str:
    """Return a text from elsewhere for a message, cut at ``LONGEST_QUOTE`` characters."""
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 3]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    text = str(error).strip()
    if "weights_only" in text:  # torch.load's message advises weights_only=False, which would run the file's code
        name = re.search(r"GLOBAL (\S+)", text)
        return f"it names {name[1]}" if name else "it holds more than tensors and plain values"
    return text.splitlines()[0] if text else type(error).__name__


def fault_of(error: Exception) -> str:
    """Return :func:`first_line` of an error of a file's reader; raise it if the file is there but cannot be opened."""
    if isinstance(error, OSError) and error.filename and not isinstance(error, FileNotFoundError):
        raise error
    return first_line(error)


def lacks(cls: type) -> str:
    """Return the message about a class without some methods of its base class."""
    names = sorted(getattr(cls, "__abstractmethods__", ()))
    own = ((base.__name__, map(vars(base).get, names)) for base in cls.__mro__)
    bases = [name for name, found in own if any(getattr(one, "__isabstractmethod__", False) for one in found)]
    return f"{cls.__name__} lacks {', '.join(names)} of {' and '.join(bases)}; define what is missing"


ON_IMPORT = {
    # diffusers imports torchao where it is installed; the lines are about kernels and tensors that int8 does not use.
    "torchao": ("Failed to load",),
    "torch.utils._pytree": ("is an Enum subclass",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    "transformers.utils.import_utils": ("requires torchvision",),  # pictures are resized with PIL here, on purpose
}
"""What :data:`LOGGED` is, of messages that the import of diffusers causes."""
LOGGED = {
    "lightning.pytorch.utilities.rank_zero": (
        "Tip:",  # advertises Lightning's services
        "Detected KeyboardInterrupt",  # our own line says what is kept
        "TPU available: False",  # the line about GPUs above it names the device in use
        "Restored all states from the checkpoint",  # the line "Restoring states" above it names the file
    ),
    "lightning.fabric.utilities.seed": ("Seed set to",),  # config.yaml has seed_everything
    # The empty list [] says that no part must be kept in float32.
    "diffusers.models.modeling_utils": ("should be kept in float32: [].",),
}
"""Name of a logger -> texts; a message of this logger that contains one of the texts is suppressed."""

WARNED = (
    r".isinstance\(treespec, LeafSpec\). is deprecated",  # caused by Lightning's own use of a newer torch
    r"Found \d+ module\(s\) in eval mode at the start of training",  # frozen networks and encoders are in eval mode
    # Our data modules return an empty list for a split that is not set. For an empty loader, the message names the
    # loader's class instead of `list` and is still shown.
    "Total length of `list` across ranks is zero",
    "Grad strides do not match bucket view strides",  # DDP copies gradients of 1 x 1 convolutions, which is cheap
)
"""Regular expressions for the beginnings of suppressed warnings."""


def silence_libraries(on_import: bool = False) -> None:
    """Suppress the messages of :data:`LOGGED` and :data:`WARNED`, or of ``ON_IMPORT``, for the rest of the process.

    What is logged without a handler goes to the terminal, which names of files in it cannot steer from then on.
    """
    if logging.lastResort is not None:
        logging.lastResort.addFilter(escape_message)
    for name in ON_IMPORT if on_import else LOGGED:
        logging.getLogger(name).addFilter(is_shown)
    for start in () if on_import else WARNED:
        warnings.filterwarnings("ignore", message=start)


def escape_message(record: logging.LogRecord) -> bool:
    """Make a log message :func:`~latentreward.core.errors.printable`; a filter that lets every message through."""
    with suppress(Exception):  # of a call whose arguments do not fit its text: logging prints it and goes on
        record.msg, record.args = printable(record.getMessage()), ()
    return True


def is_shown(record: logging.LogRecord) -> bool:
    """Tell whether a log message is shown: it contains none of its logger's texts. A logging filter."""
    with suppress(Exception):  # as above
        return not any(text in record.getMessage() for text in {**ON_IMPORT, **LOGGED}[record.name])
    return True
