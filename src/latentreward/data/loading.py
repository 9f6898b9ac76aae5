"""A loader of training batches that can stop after any batch and go on from there, on other machines if need be."""

# Why our own loader: torchdata's StatefulDataLoader keeps one state per rank, and a resumed run may have other ranks.
import atexit
import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.data._utils import signal_handling

DEAD_WORKER = re.compile(r"RuntimeError: (DataLoader worker \(pid|Pin memory)|(Connection\w+|EOF)Error: (?!Caught)")
"""Start of errors about a worker process that was killed; torch's about one that raised begin with "Caught"."""
WORKER_REMEDY = "perhaps memory ran out: set num_workers lower, or give the job more memory"


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


class CountedBatches:
    """Count the batches of an epoch that holds a fixed number of them, for a :class:`ResumableBatchSampler`.

    Args:
        batch_size: Rows per batch and rank.
        batches_per_epoch: Batches per rank in an epoch.
        max_prompts: Prompts to use in all; None for no end.
        finish: Called as the last batch that these prompts give is dealt out; the run is to stop after it.
        num_replicas: World size.
        rank: Number of this rank.

    Attributes:
        global_batch: Rows of a batch on all ranks.
        epoch: Number of the epoch.
        batches: Batches per rank that were taken of it before the current iteration.
        taken: Batches that the current iteration has yielded.
    """

    def __init__(
        self,
        batch_size: int,
        batches_per_epoch: int,
        *,
        max_prompts: int | None = None,
        finish: Callable[[], None] = lambda: None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.batches_per_epoch, self.global_batch = batches_per_epoch, batch_size * num_replicas
        self.max_prompts, self.finish = max_prompts, finish
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch = self.batches = self.taken = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``; the same one again changes nothing."""
        if epoch != self.epoch:
            self.epoch, self.batches, self.taken = epoch, 0, 0

    def __len__(self) -> int:
        return self.batches_per_epoch

    def remaining(self) -> int:
        """Batches per rank that are left of the epoch."""
        return max(self.batches_per_epoch - self.batches, 0)

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Epoch, and batches taken of it after ``batches`` more."""
        return {"epoch": self.epoch, "batches": self.batches + batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the epoch and the batches taken of it."""
        self.epoch, self.batches, self.taken = state_dict["epoch"], state_dict["batches"], 0


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


class WorkerLoader(DataLoader[Any]):
    """A ``DataLoader`` that ends in one line when one of its worker processes was killed, or goes on without them.

    Attributes:
        goes_on: Whether this process then loads the batches itself, for a run that saves and stops soon.
        worker_died: Whether a worker was killed.

    Raises:
        ChildProcessError: While iterating, if a worker was killed and ``goes_on`` is false.
    """

    goes_on: bool = False
    worker_died: bool = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before, taken = signal.getsignal(signal.SIGCHLD), 0
        try:
            batches = super().__iter__()
            if self.num_workers and threading.current_thread() is threading.main_thread():
                # torch's handler raises anywhere, even halfway through an optimiser step; the next batch tells as well.
                # Another loader of this process may have set it before.
                torchs = getattr(before, "__module__", "") == signal_handling.__name__
                signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs else before)
            for batch in batches:
                taken += 1
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not self.num_workers or not DEAD_WORKER.match(f"{type(error).__name__}: {error}"):
                raise
            self.worker_died, self._iterator = True, None
            if not self.goes_on:
                raise ChildProcessError(f"a data loader's worker process was killed ({WORKER_REMEDY})") from error
            rest = islice(iter(self.batch_sampler), taken, None)  # type: ignore[arg-type]
            yield from DataLoader(self.dataset, batch_sampler=rest, collate_fn=self.collate_fn)  # type: ignore[arg-type]


class ResumableLoader(WorkerLoader):
    """A ``DataLoader`` whose place in the epoch is part of Lightning's checkpoints.

    Lightning saves :meth:`state_dict` with its loops and loads it before the first batch. Batches count once they are
    handed over, not when workers prefetch them. Nothing is drawn or fetched before the first batch is asked for, so
    Lightning may create iterators before it knows the epoch.

    Args:
        dataset: Map-style data set; one with ``__getitems__`` gets a batch's indices in one call.
        batch_sampler: Decides this rank's batches and holds the state.
        collate_fn: Makes a batch of what the data set returned.
        num_workers: Loader processes; 0 loads in the training process.
        settings: Further settings of ``DataLoader``.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: ResumableBatchSampler,
        *,
        collate_fn: Callable[[Any], Any],
        num_workers: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,  # type: ignore[arg-type]
            collate_fn=collate_fn,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals,
            **settings,
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


def shares_of(trainer: Any) -> dict[str, int]:
    """Look up ``num_replicas`` and ``rank`` of this process in Lightning's trainer; without one, it is alone."""
    return (trainer.distributed_sampler_kwargs if trainer else None) or {"num_replicas": 1, "rank": 0}


def as_is(batch: Any) -> Any:
    """``collate_fn`` for a data set that gives whole batches."""
    return batch


def ignore_signals(worker_id: int) -> None:
    """In a loader's worker process: leave signals that ask for an end to the training process.

    Batch systems and terminals send them to every process of a job; a worker that obeyed would take the batches along
    that the training process still needs. Workers end when told to, or when their parent is gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
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
