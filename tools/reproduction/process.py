"""Process of one step: runs the command line, or a module, and records processor time and imported source files.

``python -m tools.reproduction.process PID RECORD MODULE ARGUMENT...``; an empty MODULE stands for the command line of
``latentreward``. The record is written only if the command succeeds, and the process ends with PID, which started it.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from threading import Thread

from latentreward.apps.taste.steps import end_with

OURS = ("latentreward", "tools")
"""Packages whose modules are recorded; ``tools`` is in a clone alone."""


def main() -> None:
    """Run the process."""
    parent, record, module, *arguments = sys.argv[1:]
    Thread(target=end_with, args=(int(parent),), daemon=True).start()
    sys.argv = [module or "latentreward", *arguments]
    try:
        runpy.run_module(module or "latentreward", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code:
            raise
    times = os.times()
    told = {"cpu_seconds": round(times.user + times.system + times.children_user + times.children_system, 1)}
    loaded = {name for name, one in sys.modules.items() if (getattr(one, "__file__", None) or "").endswith(".py")}
    ours = {name for name in loaded | {module} if name.partition(".")[0] in OURS}  # `module` was named __main__
    Path(record).write_text(json.dumps({**told, "modules": sorted(ours)}))


if __name__ == "__main__":
    main()
