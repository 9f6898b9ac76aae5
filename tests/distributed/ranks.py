"""Run a function under Lightning in real processes of one gloo group, as torchrun would start them.

``python -m tests.distributed.ranks module:function FOLDER`` is one rank; fresh interpreters, not forks.
"""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import latentreward

ROOT = Path(__file__).resolve().parents[2]


def on_ranks(target: str, folder: Path, world_size: int = 2, timeout: float = 400) -> list[Any]:
    """Results of ``target`` (``module:function``), called as ``function(folder)``, of every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(latentreward.__file__).parents[1])]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world_size),
        "NODE_RANK": "0",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.ranks", target, str(folder)],
            cwd=ROOT,
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0][-6000:] for process in ranks]
        assert not any(process.returncode for process in ranks), "\n==== next rank ====\n".join(printed)
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def main(target: str, folder: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(Path(folder))
    torch.save(result, Path(folder) / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
