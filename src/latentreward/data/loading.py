"""A loader of training batches that can stop after any batch and go on from there, on other machines if need be."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ResumableBatchSampler(Protocol):
    """What :class:`ResumableLoader` asks of a batch sampler.

    An epoch's batches are a pure function of the data, the seed, the epoch, the sizing (batch size, world size, token
    budget: whatever shapes batches) and, after a resume, of the pairs that this epoch has used already. All ranks
    agree on them without talking, and each takes its share; every rank gets equally many.

    The state belongs to no rank: rank 0's, saved in a checkpoint, serves every rank of the resumed run, whose sizing
    may be another. So it says which *pairs* are used, directly (``{"epoch": 3, "used": 512}``, the head of an order
    that no sizing changes) or as the batches taken under each sizing in turn
    (``{"epoch": 3, "spans": [{"batch_size": 4, "world_size": 2, "batches": 64}, ...]}``, from which the sampler
    derives them anew); plain numbers, strings, lists and dicts. What is left of the epoch is then batched under the
    present sizing, and no pair of the epoch comes twice or is lost.

    Attributes:
        epoch: Number of the epoch that the next iteration belongs to.
    """

    epoch: int

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch. Another one than ``epoch`` starts from its first batch; the same one changes nothing."""

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches of indices that are left of the epoch; reads the state, and never changes it."""

    def __len__(self) -> int:
        """Batches per rank of a *whole* epoch, also after a resume in its middle: Lightning counts the used ones in."""

    def remaining(self) -> int:
        """Batches per rank that an iteration begun now yields; ``len(self)`` at the start of an epoch, at most that."""

    def state_dict(self, batches: int) -> dict[str, Any]:
        """State once each rank was handed ``batches`` batches of an iteration begun now, 0 to :meth:`remaining`."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to that place: of that epoch, the next iteration yields what is left."""


class EpochOfBatches(DistributedSampler[int]):
    """Stands in the loader's ``sampler`` and passes the epoch on to its batch sampler.

    Lightning calls ``set_epoch`` of a loader's ``sampler`` alone, and puts a sampler of its own in the place of all
    but a ``DistributedSampler``, because it cannot know that a batch sampler deals out shares itself.

    Args:
        batch_sampler: Whose epoch it is.
    """

    def __init__(self, batch_sampler: ResumableBatchSampler) -> None:
        super().__init__(range(1), num_replicas=1, rank=0)  # type: ignore[arg-type]
        self.batch_sampler = batch_sampler

    def set_epoch(self, epoch: int) -> None:
        """Tell the batch sampler."""
        self.batch_sampler.set_epoch(epoch)


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` whose place in the epoch is part of Lightning's checkpoints.

    Lightning saves :meth:`state_dict` with its loops and loads it before the first batch. Batches count once they are
    handed over, not when workers prefetch them. Nothing is drawn or fetched before the first batch is asked for, so
    Lightning may create iterators before it knows the epoch.

    Args:
        dataset: Map-style data set; one with ``__getitems__`` gets a batch's indices in one call.
        batch_sampler: Decides this rank's batches and holds the state.
        collate_fn: Makes a batch of what the data set returned.
        num_workers: Loader processes; 0 loads in the training process.
        prefetch_factor: Batches that each worker holds ready.
        pin_memory: Hand batches over in page-locked memory.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: ResumableBatchSampler,
        *,
        collate_fn: Callable[[Any], Any],
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,  # type: ignore[arg-type]
            collate_fn=collate_fn,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals,
        )
        # torch puts an unused SequentialSampler here and then locks the attribute.
        object.__setattr__(self, "sampler", EpochOfBatches(batch_sampler))
        self.places: ResumableBatchSampler = batch_sampler
        self._delivered, self._delivered_epoch = 0, batch_sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._delivered, self._delivered_epoch = 0, self.places.epoch
        for batch in super().__iter__():
            self._delivered += 1
            yield batch

    def delivered(self) -> int:
        """Batches handed over in this process since the epoch began, or since it was resumed."""
        return self._delivered if self._delivered_epoch == self.places.epoch else 0

    def state_dict(self, undo: int = 0) -> dict[str, Any]:
        """Place in the epoch, the same on every rank.

        Args:
            undo: Give the place of so many batches ago; at most :meth:`delivered`.
        """
        return self.places.state_dict(self.delivered() - undo)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place; call it before iterating."""
        self.places.load_state_dict(state_dict)
        self._delivered, self._delivered_epoch = 0, self.places.epoch


def ignore_signals(worker_id: int) -> None:
    """In a loader's worker process: leave signals that ask for an end to the training process.

    Batch systems and terminals send them to every process of a job; a worker that obeyed would take the batches along
    that the training process still needs. Workers end when told to, or when their parent is gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill the daemon processes that are left when the interpreter exits, loaders' workers among them.

    ``multiprocessing`` itself would send them a SIGTERM, which workers ignore, and then wait for them forever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
