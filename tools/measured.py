"""What a measurement ran on: the clone, its commit, the machine, and the versions of packages."""

import os
import platform
import subprocess
from functools import partial
from importlib.metadata import version
from pathlib import Path

import latentreward
from latentreward.core.reports.page import versions

PACKAGE = Path(latentreward.__file__).parent
CLONE = PACKAGE.parents[1]
"""Folder of the repository if the package is installed from a clone."""


def commit() -> str:
    """Return the commit of the checkout that holds the package, with ``+`` if its files differ; empty without one."""
    if not (CLONE / ".git").exists():
        return ""
    git = partial(subprocess.check_output, cwd=CLONE, text=True, stderr=subprocess.DEVNULL)
    try:
        head = git(["git", "rev-parse", "--short=10", "HEAD"]).strip()
        changed = git(["git", "status", "--porcelain", "--", "src", "callbacks", "configs", "tools"])
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}{'+' if changed.strip() else ''}"


def machine() -> dict[str, str | int | None]:
    """Describe the processor and the system."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(found, platform.processor()) or platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.system()}


def computed_with() -> dict[str, str]:
    """Return the versions of Python and of the packages that train and compute."""
    return versions() | {name: version(name) for name in ("lightning", "peft")}
