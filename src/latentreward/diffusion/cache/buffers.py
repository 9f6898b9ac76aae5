"""Reused memory for batches: allocating new pages takes longer than reading the latents into them."""

import itertools
import mmap
from collections.abc import Sequence
from typing import Self
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 64
"""Alignment in bytes of the start of each tensor in a buffer."""
Layout = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""(shape, dtype) of each tensor in a buffer, in the order of the buffer."""

POOLS: WeakValueDictionary[int, "BufferPool"] = WeakValueDictionary()
"""Pools by ID, created in this process or in its parent before the fork."""
_numbers = itertools.count()


class BufferPool:
    """Slots of memory that a loader's forked workers share with the training process, so that batches are not copied.

    A worker fills a slot with a batch and sends the slot's index; the training process reads the batch in the slot.
    The slot is free again when the last tensor in it is deleted. If no slot is free, or workers were not forked, a
    batch gets memory of its own.

    Args:
        slots: Number of slots per worker (or of the training process, without workers).
        slot_bytes: Bytes of a slot, which are allocated only when they are first written.
        processes: Number of processes that fill slots.

    Attributes:
        number: ID of the pool in ``POOLS``.
    """

    def __init__(self, slots: int, slot_bytes: int, processes: int = 1) -> None:
        self.slots, self.slot_bytes = slots, -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = np.frombuffer(mmap.mmap(-1, max(1, slots * processes * self.slot_bytes)), np.uint8)
        self._taken = mmap.mmap(-1, max(1, slots * processes))
        self.number = next(_numbers)
        POOLS[self.number] = self

    def __reduce__(self) -> tuple[type[Self], tuple[int, int]]:
        return type(self), (0, 0)  # a spawned worker cannot share the memory: it gets a pool without slots

    def take(self, num_bytes: int) -> int | None:
        """Reserve a free slot of this process and return its index; None if no slot is free or large enough."""
        worker = get_worker_info()
        first = 0 if worker is None else worker.id * self.slots
        slot = self._taken.find(b"\0", first, first + self.slots) if num_bytes <= self.slot_bytes else -1
        if slot < 0:
            return None
        self._taken[slot] = 1
        return slot

    def free(self, slot: int) -> None:
        """Mark a slot as free."""
        self._taken[slot] = 0

    def bytes_of(self, slot: int, num_bytes: int) -> Tensor:
        """Return a view of a slot's first bytes, ``(num_bytes,)`` uint8."""
        start = slot * self.slot_bytes
        return torch.from_numpy(self._memory[start : start + num_bytes])

    def leased(self, slot: int, num_bytes: int) -> Tensor:
        """Return a view of a slot's first bytes that frees the slot when it and all tensors cut from it are deleted."""
        content = self._memory[slot * self.slot_bytes :][:num_bytes]  # which tensors over it keep alive
        finalize(content, self.free, slot).atexit = False
        return torch.from_numpy(content)


def own_buffer(num_bytes: int) -> Tensor:
    """Allocate uninitialised bytes ``(num_bytes,)`` uint8 outside the pool.

    In a loader's worker, the bytes are in shared memory, so that a batch goes to the training process without a copy.
    """
    if get_worker_info() is None or num_bytes == 0:
        return torch.empty(num_bytes, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def layout_bytes(layout: Layout) -> int:
    """Return the size in bytes of a buffer for ``layout``, with each tensor's start aligned."""
    return sum(-(-_size(shape, dtype) // ALIGNMENT) * ALIGNMENT for shape, dtype in layout)


def carve(buffer: Tensor, layout: Layout) -> list[Tensor]:
    """Return the tensors of ``layout`` as views of ``buffer``."""
    tensors, start = [], 0
    for shape, dtype in layout:
        size = _size(shape, dtype)
        tensors.append(buffer[start : start + size].view(dtype).view(shape))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return tensors


def _size(shape: Sequence[int], dtype: torch.dtype) -> int:
    return dtype.itemsize * torch.Size(shape).numel()
