"""Record of what a network's blocks return in a pass of its own, which ends behind the last one that is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import nn


class PassEnded(Exception):
    """Ends a pass of a network behind the last block that is read."""


class FirstBlocks(nn.Module):
    """Stand-in for a network's list of blocks during a pass that is recorded.

    Args:
        blocks: Blocks that run.
        count: Number of blocks of the whole list, which networks ask for (Chroma).
        ends: Whether the pass ends behind these blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int, ends: bool) -> None:
        super().__init__()
        self.blocks, self.count, self.ends = tuple(blocks), count, ends

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.blocks
        if self.ends:
            raise PassEnded


@contextmanager
def recorded(
    network: Any, lists: Mapping[str, FirstBlocks], watched: Mapping[Any, nn.Module]
) -> Iterator[dict[Any, Any]]:
    """Record what modules return in the pass of a network that the body of the context makes.

    If one of ``lists`` ends the pass, what follows in the body is left out too.

    Args:
        network: diffusers network.
        lists: Stand-ins for its lists of blocks, by name.
        watched: Modules whose outputs are recorded, each by its key in the record.
    """
    seen: dict[Any, Any] = {}
    forward, own_forward, whole = network.forward, vars(network).get("forward"), {n: getattr(network, n) for n in lists}

    def note(key: Any, module: nn.Module, inputs: Any, output: Any) -> None:
        seen[key] = output

    def until_end(*inputs: Any, **named: Any) -> Any:
        with suppress(PassEnded):
            return forward(*inputs, **named)
        return seen  # FSDP2 gathers the network's weights once a gradient arrives at what the pass returns

    def end(*call: Any) -> None:
        raise PassEnded

    hooks = [module.register_forward_hook(partial(note, key)) for key, module in watched.items()]
    for name, blocks in lists.items():
        setattr(network, name, blocks)
    if ends := any(blocks.ends for blocks in lists.values()):
        network.forward = until_end
        hooks.append(network.register_forward_hook(end))
    try:
        with suppress(PassEnded):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for name, blocks in whole.items():
            setattr(network, name, blocks)
        if ends:
            del network.forward
        if own_forward is not None:
            network.forward = own_forward
