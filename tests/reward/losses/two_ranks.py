"""Run a function in real processes of one gloo group."""

import importlib
from pathlib import Path
from typing import Any

from torch import distributed

from tests import processes


def on_ranks(target: str, argument: str, folder: Path, world_size: int = 2) -> list[Any]:
    """Results of ``target`` (``module:function``), called as ``function(rank, argument)``, of every rank."""
    group = (target, argument, str(folder / "rendezvous"), world_size)
    return processes.on_ranks("tests.reward.losses.two_ranks:one_rank", group, world_size, timeout=240)


def one_rank(rank: int, target: str, argument: str, rendezvous: str, world_size: int) -> Any:
    """What one rank's function returns."""
    module, function = target.split(":")
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    result = getattr(importlib.import_module(module), function)(rank, argument)
    distributed.barrier()
    distributed.destroy_process_group()
    return result
