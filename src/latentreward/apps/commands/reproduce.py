"""``latentreward reproduce``: measure claims and ablations of the papers in the tiny world, in a clone."""

import importlib
import sys
from collections.abc import Sequence

from latentreward.apps.steps.sources import CLONE
from latentreward.errors import InputError


def run(command: str, arguments: Sequence[str]) -> None:
    """Run ``tools/reproduce.py`` of the clone from which the package is installed.

    Raises:
        InputError: If the package is not installed from a clone, an argument is wrong, or a step fails.
    """
    if not (CLONE / "tools" / "reproduce.py").is_file():
        raise InputError(
            f"reproduce: {CLONE} has no tools/reproduce.py, which the package leaves out; install latentreward from a "
            "clone of its repository, by `pip install -e .`"
        )
    sys.path.insert(0, str(CLONE))
    importlib.import_module("tools.reproduce").run(command, arguments)
