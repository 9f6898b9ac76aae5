"""Run a function in real processes of one gloo group: ``python -m tests.losses.two_ranks module:function ...``.

Fresh interpreters, not forks: a fork of a process that has used autograd threads can hang.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import latentreward

ROOT = Path(__file__).resolve().parents[2]


def on_ranks(target: str, argument: str, folder: Path, world_size: int = 2) -> list[Any]:
    """Results of ``target`` (``module:function``), called as ``function(rank, argument)``, of every rank."""
    source = Path(latentreward.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(source)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.losses.two_ranks", target, argument, str(folder), str(world_size)]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def main(target: str, argument: str, folder: str, world_size: str, rank: str) -> None:
    """One rank."""
    module, function = target.split(":")
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=int(rank), world_size=int(world_size)
    )
    result = getattr(importlib.import_module(module), function)(int(rank), argument)
    torch.save(result, Path(folder) / f"rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
