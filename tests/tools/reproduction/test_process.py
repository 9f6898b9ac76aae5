"""The process of a step records which modules of the package it ran."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_module_that_runs_as_a_program_is_recorded_beside_what_it_imports(tmp_path: Path) -> None:
    record, module = tmp_path / "record.json", "latentreward.core.errors"
    arguments = [str(os.getpid()), str(record), module]
    subprocess.run([sys.executable, "-m", "tools.reproduction.process", *arguments], check=True)
    assert {"latentreward", module} <= {*json.loads(record.read_text())["modules"]}
