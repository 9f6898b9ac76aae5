"""Run a function under Lightning in real processes of one gloo group, as torchrun would start them."""

import importlib
import socket
from pathlib import Path
from typing import Any

from tests import processes


def on_ranks(target: str, folder: Path, world_size: int = 2, timeout: float = 400) -> list[Any]:
    """Results of ``target`` (``module:function``), called as ``function(folder)``, of every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
    return processes.on_ranks(
        "tests.distributed.ranks:one_rank",
        (target, folder),
        world_size,
        lambda rank: {**shared, "LOCAL_RANK": str(rank)},
        timeout,
    )


def one_rank(rank: int, target: str, folder: Path) -> Any:
    """What one rank's function returns."""
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)(folder)
