"""Process of one step: runs the command line, or a module, and records processor time and imported source files.

``python -m latentreward.reproduction.process RECORD MODULE ARGUMENT...``; an empty MODULE stands for the command line
of ``latentreward``. The record is written only if the command succeeds.
"""

import json
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the process."""
    record, module, *arguments = sys.argv[1:]
    sys.argv = [module or "latentreward", *arguments]
    try:
        runpy.run_module(module or "latentreward", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code:
            raise
    times = os.times()
    seconds = times.user + times.system + times.children_user + times.children_system
    found = [name for name, one in sys.modules.items() if _is_ours(name, getattr(one, "__file__", None))]
    Path(record).write_text(json.dumps({"cpu_seconds": round(seconds, 1), "modules": sorted(found)}))


def _is_ours(name: str, file: str | None) -> bool:
    return name.split(".", maxsplit=1)[0] == "latentreward" and file is not None and file.endswith(".py")


if __name__ == "__main__":
    main()
