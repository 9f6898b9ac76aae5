"""A loader of training batches that can resume after any batch, also with another number of ranks."""

# torchdata's StatefulDataLoader keeps one state per rank, which does not fit a resumed run with other ranks.
import atexit
import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.data._utils import signal_handling

from latentreward.core.errors import InputError

DEAD_WORKER = re.compile(r"RuntimeError: (DataLoader worker \(pid|Pin memory)|(Connection\w+|EOF)Error: (?!Caught)")
"""Start of errors about a killed worker process; torch's errors about a worker that raised begin with "Caught"."""
WORKER_REMEDY = "perhaps memory ran out: set num_workers lower, or give the job more memory"


class ResumableBatchSampler(Protocol):
    """Interface of a batch sampler for :class:`ResumableLoader`.

    An epoch's batches depend only on the data, the seed, the epoch, the settings that shape batches (batch size, world
    size, token budget) and, after a resume, on the pairs that this epoch has used already. All ranks therefore compute
    the same batches without communication. Each rank yields its own part, equally many batches on every rank.

    The state does not depend on the rank: a checkpoint holds the state of rank 0, and every rank of the resumed run
    loads it. Batch size and world size of the resumed run may differ. The state therefore says which *pairs* of the
    epoch are used: it counts them, in an order that does not depend on batch size or world size, or lists the batches
    taken under each combination of settings, from which the sampler computes the used pairs again. It consists of plain
    numbers, strings, lists and dicts. The remaining pairs of the epoch are batched under the new settings; none is
    repeated or lost. A count means nothing in another order, so a state with one also holds what determines the order.
    """

    epoch: int  # number of the epoch of the next iteration

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. A new epoch starts at its first batch; setting the current epoch again changes nothing."""

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's remaining batches of indices in the epoch; iterating does not change the saved state."""

    def __len__(self) -> int:
        """Return the batches per rank of a *whole* epoch, also after a resume: Lightning counts used batches too."""

    def remaining(self) -> int:
        """Return the batches per rank that an iteration started now yields, from 0 to ``len(self)``."""

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Return the state after ``batches`` (0 to :meth:`remaining`) batches of this iteration on each rank."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; the next iteration yields the remaining batches of the state's epoch."""


class CountedBatches(ResumableBatchSampler):
    """Base of batch samplers whose epochs have a fixed number of batches per rank; counts the batches.

    ``finish`` is called before the last batch that ``max_prompts`` prompts of the whole run, over all ranks, allow is
    yielded; it should make the run stop after this batch.
    """

    def __init__(
        self,
        batch_size: int,
        batches_per_epoch: int,
        *,
        max_prompts: int | None = None,
        finish: Callable[[], None] = lambda: None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.batches_per_epoch, self.global_batch = batches_per_epoch, batch_size * num_replicas
        self.max_prompts, self.finish, self.seed = max_prompts, finish, seed
        self.num_replicas, self.rank = num_replicas, rank
        # Batches of this epoch before the current iteration, and those that it has yielded.
        self.epoch = self.batches = self.taken = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.batches, self.taken = epoch, 0, 0

    def __len__(self) -> int:
        return self.batches_per_epoch

    def remaining(self) -> int:
        return max(self.batches_per_epoch - self.batches, 0)

    def state_dict(self, batches: int) -> dict[str, Any]:
        return {"epoch": self.epoch, "batches": self.batches + batches, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_same_order(state_dict, seed=self.seed)
        self.epoch, self.batches, self.taken = state_dict["epoch"], state_dict["batches"], 0


class EpochOfBatches(DistributedSampler[int]):
    """Placeholder for a loader's ``sampler`` that passes ``set_epoch`` on to the batch sampler.

    Lightning calls ``set_epoch`` only on a loader's ``sampler``. Lightning also replaces any sampler but a
    ``DistributedSampler``, because it cannot know that the batch sampler already divides the rows among ranks.
    """

    def __init__(self, batch_sampler: ResumableBatchSampler) -> None:
        super().__init__(range(1), num_replicas=1, rank=0)  # type: ignore[arg-type]
        self.batch_sampler = batch_sampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the batch sampler."""
        self.batch_sampler.set_epoch(epoch)


class WorkerLoader(DataLoader[Any]):
    """A ``DataLoader`` that raises ChildProcessError of one line if a worker is killed, or goes on without workers."""

    goes_on: bool = False  # after a worker was killed, load on in this process, for a run that should save and stop
    worker_died: bool = False  # whether a worker was killed

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before, taken = signal.getsignal(signal.SIGCHLD), 0
        try:
            batches = super().__iter__()
            if self.num_workers and threading.current_thread() is threading.main_thread():
                # torch's SIGCHLD handler raises anywhere, even in the middle of an optimiser step. It is not needed:
                # reading the next batch raises too. Another loader of this process may have installed it before.
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
    """A ``DataLoader`` whose position in the epoch is saved in Lightning's checkpoints.

    Lightning saves :meth:`state_dict` with its loops and loads it before the first batch. A batch counts as used when
    the trainer receives it, not when a worker prefetches it. Nothing is sampled or loaded before the first batch is
    requested, because Lightning may create iterators before it sets the epoch. ``batch_sampler`` chooses this rank's
    batches and holds the state; ``settings`` are further arguments of ``DataLoader``.
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
        # torch sets an unused SequentialSampler and then forbids assigning to the attribute.
        object.__setattr__(self, "sampler", EpochOfBatches(batch_sampler))
        self.places: ResumableBatchSampler = batch_sampler
        self._delivered, self._delivered_epoch = 0, batch_sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._delivered, self._delivered_epoch = 0, self.places.epoch
        for batch in super().__iter__():
            self._delivered += 1
            yield batch

    def delivered(self) -> int:
        """Return the number of batches that the trainer received since the epoch began or was resumed."""
        return self._delivered if self._delivered_epoch == self.places.epoch else 0

    def state_dict(self, undo: int = 0) -> dict[str, Any]:
        """Return the position in the epoch, equal on all ranks, ``undo`` (at most :meth:`delivered`) batches ago."""
        return self.places.state_dict(self.delivered() - undo)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a position in the epoch; to be called before iterating."""
        if lacking := sorted(self.places.state_dict(0).keys() - state_dict.keys()):
            told = "data.train: the checkpoint stopped in an epoch of batches that were put together in another way"
            why = f"(its state has no {lacking[0]!r}), as where pairs edit unlike numbers of pictures, or none"
            remedy = "go on with the data, or the cache, and with sources as in its training, or start anew"
            raise InputError(f"{told} {why}; {remedy}")
        self.places.load_state_dict(state_dict)
        self._delivered, self._delivered_epoch = 0, self.places.epoch


def check_same_order(state_dict: Mapping[str, Any], **settings: Any) -> None:
    """Raise InputError if a state was saved under other settings of the order: the rest would repeat and skip pairs."""
    fields = {"seed": "seed_everything (or data.seed)", "world_size": "trainer.devices"}
    fields["shuffle_buffer"] = "data.train.shuffle_buffer"
    for name, value in settings.items():
        if (saved := state_dict[name]) != value:
            raise InputError(
                f"{fields.get(name, f'data.{name}')} is {value}, but {saved} in the checkpoint, so its epoch would go "
                f"on in another order; go on with {saved}, or start anew"
            )


def shares_of(trainer: Any) -> dict[str, int]:
    """Return ``num_replicas`` and ``rank`` from Lightning's trainer; 1 and 0 if ``trainer`` is None."""
    return (trainer.distributed_sampler_kwargs if trainer else None) or {"num_replicas": 1, "rank": 0}


def as_is(batch: Any) -> Any:
    """Return the batch unchanged; ``collate_fn`` for a data set whose ``__getitems__`` returns whole batches."""
    return batch


def ignore_signals(worker_id: int) -> None:
    """Make a worker ignore the signals that batch systems and terminals send to every process of a job.

    A worker that obeyed would lose batches that the training process still needs. Workers end when the loader tells
    them to, or when their parent has ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill the daemon processes that are still alive when the interpreter exits, such as loaders' workers.

    ``multiprocessing`` itself would send SIGTERM, which workers ignore, and then wait forever for the workers to end.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the killed workers as failures
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
