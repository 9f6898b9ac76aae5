"""The strategies under which training runs on two processes, and those that a method is tried under."""

from collections.abc import Callable
from typing import Any

from latentreward.core.checkpoints.fsdp2 import FSDP2Strategy

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp2": FSDP2Strategy,
    "sharded": lambda: FSDP2Strategy(True),
}
DDP_ALONE = ("mixture", "euphonium", "linear_dpo", "prfl")  # what differs from other methods knows nothing of shards


def strategies_of(method: str) -> list[str]:
    """Return the names of the strategies of a method of alignment."""
    return ["ddp"] if method in DDP_ALONE else ["ddp", "fsdp2"]
