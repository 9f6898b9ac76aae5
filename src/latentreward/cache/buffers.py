"""Memory for batches, used again and again: fresh pages cost more than reading the latents into them."""

import itertools
import mmap
from collections.abc import Sequence
from typing import Any, Self
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 64
Layout = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors that lie in one buffer, one after the other."""

_numbers = itertools.count()
_pools: WeakValueDictionary[int, "BufferPool"] = WeakValueDictionary()


class BufferPool:
    """Slots of memory that a loader's forked workers share with the trainer.

    A worker fills a slot and sends its number; the trainer looks at the slot itself. It is free again when the last
    tensor in it is gone. Where no slot is free, or workers were not forked, batches get memory of their own.

    Args:
        slots: Number of slots per process that fills them.
        slot_bytes: Size of a slot; pages take up memory once they are used.
        processes: Number of processes that fill slots.
    """

    def __init__(self, slots: int, slot_bytes: int, processes: int = 1) -> None:
        self.slots, self.slot_bytes = slots, -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = np.frombuffer(mmap.mmap(-1, max(1, slots * processes * self.slot_bytes)), np.uint8)
        self._taken = mmap.mmap(-1, max(1, slots * processes))
        self.number = next(_numbers)
        _pools[self.number] = self

    def __reduce__(self) -> tuple[type[Self], tuple[int, int]]:
        return type(self), (0, 0)  # a spawned worker does not share the memory

    def take(self, num_bytes: int) -> int | None:
        """A free slot of this process, now taken; None if there is none, or it would be too small."""
        worker = get_worker_info()
        first = 0 if worker is None else worker.id * self.slots
        slot = self._taken.find(b"\0", first, first + self.slots) if num_bytes <= self.slot_bytes else -1
        if slot < 0:
            return None
        self._taken[slot] = 1
        return slot

    def free(self, slot: int) -> None:
        """Let the slot be taken again."""
        self._taken[slot] = 0

    def bytes_of(self, slot: int, num_bytes: int) -> Tensor:
        """The slot's first bytes ``(num_bytes,)`` uint8."""
        start = slot * self.slot_bytes
        return torch.from_numpy(self._memory[start : start + num_bytes])

    def leased(self, slot: int, num_bytes: int) -> Tensor:
        """The same, freeing the slot when the tensor and all that were cut from it are gone."""
        return torch.from_numpy(np.asarray(_Lease(self, slot, self._memory[slot * self.slot_bytes :][:num_bytes])))


class _Lease:
    """Owner of a slot's bytes in numpy's eyes: lives as long as an array over them."""

    def __init__(self, pool: BufferPool, slot: int, content: np.ndarray) -> None:
        self._pool, self._slot, self._content = pool, slot, content
        self.__array_interface__: dict[str, Any] = content.__array_interface__

    def __del__(self) -> None:
        self._pool.free(self._slot)


def pool_of(number: int) -> BufferPool:
    """The pool of that number in this process, or in the one it was forked from."""
    return _pools[number]


def own_buffer(num_bytes: int) -> Tensor:
    """Uninitialised bytes ``(num_bytes,)`` uint8 outside any pool; in a loader's worker, in shared memory.

    So a batch crosses processes without a copy, however many tensors are cut from the buffer.
    """
    if get_worker_info() is None or num_bytes == 0:
        return torch.empty(num_bytes, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def layout_bytes(layout: Layout) -> int:
    """Bytes of a buffer for ``layout``; each tensor begins where any dtype may."""
    return sum(-(-_size(shape, dtype) // ALIGNMENT) * ALIGNMENT for shape, dtype in layout)


def carve(buffer: Tensor, layout: Layout) -> list[Tensor]:
    """The tensors of ``layout`` in ``buffer``."""
    tensors, start = [], 0
    for shape, dtype in layout:
        size = _size(shape, dtype)
        tensors.append(buffer[start : start + size].view(dtype).view(shape))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return tensors


def _size(shape: Sequence[int], dtype: torch.dtype) -> int:
    return dtype.itemsize * torch.Size(shape).numel()
