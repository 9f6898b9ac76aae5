"""The command line: finds and runs a subcommand, and turns an :class:`InputError` into one line and exit status 2.

This module imports only the standard library and small modules of this package. ``--help``, ``--version`` and the
message about an unknown subcommand therefore appear without the seconds that importing torch takes.
"""

import atexit
import gc
import importlib
import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper

from latentreward import __version__
from latentreward.core.errors import InputError, did_you_mean, one_line, silence_libraries, where
from latentreward.core.interrupts import (
    INTERRUPTED,
    TERMINATED,
    Terminated,
    interrupt_behind,
    sigterm_interrupts,
    tell_interrupt,
)

UNREAD = 128 + 13
"""Exit status of a command whose output nobody reads any more: that of other programs, which SIGPIPE ends."""
COMMANDS = {
    "taste": "train a reward on your own pictures, and align with it; --rate opens a page to rate",
    "fit": "train a reward model, or align a generator; --ckpt_path resumes a run",
    "score": "score a folder or list of images, and write a page sorted by score",
    "generate": "sample pictures for prompts; a reward may choose the best of several",
    "publish": "write a reward model as a folder for others",
    "serve": "answer HTTP requests for scores of latents or images",
    "inspect": "report a data set's labels, image sizes, bad rows and shared prompts",
    "configs": "list or print the YAML files of the package, or compose a run of them",
    "cache": "write the latents of a data set's images, and prompt embeddings if set",
    "validate": "compute the metrics of the validation split",
    "test": "compute the metrics of the test split",
    "predict": "score pairs of images and write the scores to parquet",
    "evaluate-policy": "score the pictures of one generator, or compare two",
    "benchmark": "compare reward models with people's choices, and write a report",
    "plan-keep": "find how many of many noises are worth finishing, for generate --keep",
    "export": "write an aligned generator's LoRA in other programs' formats",
    "score-pairs": "score the images of pairs with pixel-space scorers, to filter pairs",
    "export-pairs": "write the pairs of any reader as a data set for the library datasets",
    "consolidate": "turn a sharded checkpoint into one file, with EMA weights if set",
}
"""Subcommand → one line of help."""
FIRST = 7  # number of commands that the help shows before the others
TRAINER = ("fit", "validate", "test", "predict")
"""Subcommands that run a Lightning trainer; one module has them all."""

HELP = """\
usage: latentreward COMMAND [--config FILE ...] [--SETTING=VALUE ...]

{first}

more:
{others}

examples:
  latentreward taste pictures --rate
  latentreward fit --config configs/model/lrm_tiny.yaml --config configs/data/tinyworld_hpdv3.yaml \\
      --config configs/trainer/cpu.yaml
  latentreward score pictures scores.csv --model runs/1 --gallery scores.html

A later file or setting overrides an earlier one; lists of trainer.callbacks are joined (null or [] clears the list).
A file configs/... that is not in the current folder is read from the installed package; `latentreward configs` lists
these files. Class paths may name your own modules in the current folder or beside a --config file.

options, at any position:
  --help, --version       `COMMAND --help` lists all settings of COMMAND
  --debug                 show the traceback of an error (or set LATENTREWARD_DEBUG=1)
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run one subcommand.

    Args:
        args: Arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: With status 2 after bad input, 130 after Ctrl-C, 143 after SIGTERM, 141 if nobody reads the output.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):  # characters that the encoding lacks, as in the C locale, are escaped
        if isinstance(stream, TextIOWrapper):  # not so in a notebook
            with suppress(OSError):  # of a pipe in the place of a file that was open already
                stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in arguments or os.environ.get("LATENTREWARD_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    with failures_told(debug, alone=args is None):
        _dispatch(arguments, alone=args is None)


@contextmanager
def failures_told(debug: bool = False, alone: bool = True) -> Iterator[None]:
    """Turn wrong input and an interrupt inside the block into a line on stderr and the exit status of :func:`main`.

    With ``debug``, errors keep their traceback. ``alone`` says that the process does nothing else.
    """
    try:
        yield
        sys.stdout.flush()  # at exit, a pipe without a reader would be a message of Python's
    except Exception as error:
        if isinstance(error, BrokenPipeError) and unread():
            sys.exit(UNREAD)
        place = where(error)  # an error in the user's own code is no bug of this package
        if debug or not (place or isinstance(error, InputError | OSError)):
            raise
        print(f"latentreward: error: {one_line(error)}{place}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as error:
        stop = interrupt_behind(error)
        if stop is None or debug:
            raise
        if alone:  # the process is about to end: a second Ctrl-C must not raise while threads are joined
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        tell_interrupt(stop)
        sys.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)


def module_of(command: str) -> str:
    """Return the name of the module with a subcommand's function ``run(command, arguments)``."""
    return f"latentreward.apps.commands.{'fit' if command in TRAINER else command.replace('-', '_')}"


def unread() -> bool:
    """Tell whether the reader of stdout has ended, as in ``latentreward configs | head``; then stdout is dropped."""
    output = select.poll()
    output.register(sys.stdout, select.POLLERR)
    if found := bool(output.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there at exit
    return found


def _dispatch(arguments: list[str], alone: bool) -> None:
    """Run the subcommand that ``arguments`` name; ``alone`` says that the process does nothing else."""
    if arguments and arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
        print(HELP.format(first="\n".join(lines[:FIRST]), others="\n".join(lines[FIRST:])), end="")
        return
    if "--version" in arguments:
        print(f"latentreward {__version__}")
        return
    if not arguments or arguments[0] not in COMMANDS:
        problem = f"unknown command {arguments[0]!r}" if arguments else "no command"
        raise InputError(f"{problem}{did_you_mean(arguments[0] if arguments else '', COMMANDS)}")
    collects = gc.isenabled()
    gc.disable()  # imported objects stay alive, so that collections during the import free nothing and cost 10 % of it
    try:
        with sigterm_interrupts():
            run = importlib.import_module(module_of(arguments[0])).run
        if alone:
            gc.freeze()  # nor do later collections look through them: up to a second before the first step
            atexit.register(gc.unfreeze)  # libraries complain of objects that the collection at the exit misses
    finally:
        if collects:
            gc.enable()
    silence_libraries()
    with sigterm_interrupts():  # in a fit, until GracefulStop sets its handlers
        run(arguments[0], arguments[1:])
