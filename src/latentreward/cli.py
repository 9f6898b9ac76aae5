"""The command line: finds the subcommand, runs it, and turns bad input into one line and an exit status.

Only the standard library is imported here, so that ``--help``, ``--version`` and misspelt subcommands answer at once.
"""

import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from latentreward import __version__
from latentreward.errors import InputError, did_you_mean, one_line
from latentreward.interrupts import (
    INTERRUPTED,
    TERMINATED,
    Terminated,
    exit_while_importing,
    interrupt_behind,
    sigterm_interrupts,
    tell_interrupt,
)

COMMANDS = {
    "fit": ("latentreward.commands.fit:run", "train, from a checkpoint if --ckpt_path is given"),
    "validate": ("latentreward.commands.fit:run", "metrics on the validation split"),
    "test": ("latentreward.commands.fit:run", "metrics on the test split"),
    "predict": ("latentreward.commands.fit:run", "score pairs and write them to parquet"),
    "configs": ("latentreward.commands.configs:run", "the YAML files that come with the package, or one of them"),
    "inspect": ("latentreward.commands.inspect:run", "what is in a data set: labels, sizes, bad rows, leakage"),
    "score-pairs": ("latentreward.commands.score_pairs:run", "scores of images in pixels, to filter pairs by"),
    "cache": ("latentreward.commands.cache:run", "encode a data set's images once, and its prompts if wanted"),
    "consolidate": ("latentreward.commands.consolidate:run", "one file from a sharded checkpoint, or of averages"),
    "generate": ("latentreward.commands.generate:run", "pictures of prompts, with any reward choosing among samples"),
    "evaluate-policy": ("latentreward.commands.evaluate_policy:run", "scores of one or two generators' pictures"),
    "publish": ("latentreward.commands.publish:run", "a reward model as a folder for others, or on the hub"),
    "export": ("latentreward.commands.export:run", "an aligned generator's LoRA, for diffusers or ComfyUI, or merged"),
    "score": ("latentreward.commands.score:run", "scores of a folder or list of images, and a page sorted by them"),
    "benchmark": ("latentreward.commands.benchmark:run", "reward models against people's choices, with a report"),
    "serve": ("latentreward.commands.serve:run", "a reward model behind HTTP, for latents or images"),
    "ui": ("latentreward.commands.ui:run", "a page in the browser to try a reward model by hand"),
}
"""Subcommand -> (function that takes the subcommand and its arguments, one line of help)."""

HELP = """\
usage: latentreward COMMAND [--config FILE ...] [--SETTING=VALUE ...]

{commands}

examples:
  latentreward fit --config configs/model/lrm_tiny.yaml --config configs/data/tinyworld_hpdv3.yaml \\
      --config configs/trainer/cpu.yaml
  latentreward fit --config runs/1/config.yaml --model.backbone sd15 --trainer.max_steps 1000 --print_config
  latentreward predict --config runs/1/config.yaml --ckpt_path runs/1/last.ckpt --predictions.output_dir scores

Later files and settings win; trainer.callbacks add up (null or [] clears them). A file configs/... that is not here is
taken from the installed package, see `latentreward configs`. Class paths may name your own modules in the current
folder.

options, anywhere on the line:
  --help, --version       `COMMAND --help` lists all settings
  --debug                 keep the traceback of an error (or set LATENTREWARD_DEBUG=1)
  --restrict-imports[=MODULE,...]
                          settings may name only classes of latentreward, torch, lightning, torchmetrics, and what is
                          in these modules; no program runs
  --allow-programs=PATH,...
                          programs that may run all the same; a shell or an interpreter may run anything
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run one subcommand.

    Args:
        args: Arguments without the program's name; the process's own by default.

    Raises:
        SystemExit: With status 2 after bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments or os.environ.get("LATENTREWARD_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    arguments.sort(
        key=lambda argument: argument.startswith(("--restrict-imports", "--allow-programs"))
    )  # behind the rest, whose order stays
    try:
        _dispatch(arguments)
    except (InputError, OSError) as error:
        if debug:
            raise
        print(f"latentreward: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as error:
        stop = interrupt_behind(error)
        if stop is None or debug:
            raise
        if args is None:  # the process ends: another Ctrl-C must not raise while threads are waited for
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        tell_interrupt(stop)
        sys.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)


def _dispatch(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="")
        return
    if "--version" in arguments:
        print(f"latentreward {__version__}")
        return
    if not arguments or arguments[0] not in COMMANDS:
        problem = f"unknown command {arguments[0]!r}" if arguments else "no command"
        raise InputError(f"{problem}{did_you_mean(arguments[0] if arguments else '', COMMANDS)}")
    module, function = COMMANDS[arguments[0]][0].split(":")
    collects = gc.isenabled()
    gc.disable()  # while importing, each collection would go through all that stays: a tenth of the start
    try:
        with exit_while_importing():
            run = getattr(importlib.import_module(module), function)
    finally:
        if collects:
            gc.enable()
    trains = COMMANDS[arguments[0]][0] == COMMANDS["fit"][0]  # Lightning and GracefulStop have handlers of their own
    with nullcontext() if trains else sigterm_interrupts():
        run(arguments[0], arguments[1:])
