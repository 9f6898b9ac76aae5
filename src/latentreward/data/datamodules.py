"""Readers in, loaders of preference batches out."""

import logging
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from latentreward.data.collate import collate_pairs
from latentreward.data.dataset import PairDataset
from latentreward.data.images import MAX_PIXELS, PixelLoader, ResizePolicy
from latentreward.data.loading import ResumableLoader, WorkerLoader, ignore_signals, shares_of
from latentreward.data.readers import PairReader, count_text
from latentreward.data.readers.base import OnError
from latentreward.data.sampling import PairBatchSampler, PairSampler, even_batch_size
from latentreward.data.splits import SharedPrompts, select_rows
from latentreward.errors import InputError, check_at_least_one
from latentreward.seeding import run_seed

logger = logging.getLogger(__name__)


class PairLoaders(LightningDataModule):
    """Loaders of up to four splits of pairs, whatever their batches hold.

    A subclass fills :attr:`datasets`, makes the loader for training, and says how evaluation deals out its pairs.

    Args:
        batch_size: Pairs per batch and rank. A batch is smaller by its unreadable pairs, and over uneven shares of
            ranks evaluation may use another size near it.
        num_workers: Loader processes per rank; 0 loads in the training process.
        prefetch_factor: Batches that each worker holds ready.
        pin_memory: Hand batches over in page-locked memory, where there is an accelerator.
        shuffle: New order of ``train`` each epoch, the same for every world size.
        seed: Seed of that order; None takes the run's ``seed_everything``.

    Attributes:
        datasets: Pairs of the splits that are given: ``train``, ``val``, ``test``, ``predict``.
        remedy: What to give a split that is not set.
    """

    datasets: dict[str, Any]
    remedy: str

    def __init__(
        self,
        *,
        batch_size: int = 16,
        num_workers: int = 4,
        prefetch_factor: int = 2,
        pin_memory: bool = True,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one("data.", batch_size=batch_size, prefetch_factor=prefetch_factor)
        self.batch_size, self.shuffle = batch_size, shuffle
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.seed = run_seed(seed)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of ``val``, each pair once over all ranks; in training, none without ``val``."""
        if "val" in self.datasets or (self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING):
            return self._evaluation_loader("val")
        return []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of ``test``, each pair once over all ranks."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of ``predict``, each pair once over all ranks."""
        return self._evaluation_loader("predict")

    def _overfits(self) -> bool:
        """Whether Lightning wants the same few pairs in a fixed order."""
        return bool(getattr(self.trainer, "overfit_batches", 0))

    def _dataset(self, name: str) -> Any:
        """The split's pairs, at least one for each rank."""
        if name not in self.datasets:
            raise InputError(f"data.{name} is not set; {self.remedy}")
        dataset, ranks = self.datasets[name], shares_of(self.trainer)["num_replicas"]
        if len(dataset) < ranks:
            raise InputError(f"data.{name} has {len(dataset)} pairs for {ranks} ranks; use fewer devices or more pairs")
        return dataset

    def _worker_settings(self) -> dict[str, Any]:
        """What training and evaluation loaders have in common."""
        return {
            "num_workers": self.num_workers,
            "prefetch_factor": self.prefetch_factor if self.num_workers else None,
            "pin_memory": self.pin_memory and torch.accelerator.is_available(),
        }

    def _deal(self, dataset: Any) -> dict[str, Any]:
        """Arguments of the ``DataLoader`` that say which pairs of an evaluation make a batch on this rank, and how."""
        raise NotImplementedError

    def _evaluation_loader(self, name: str) -> DataLoader[Any]:
        dataset = self._dataset(name)
        return WorkerLoader(
            dataset,
            **self._deal(dataset),
            **self._worker_settings(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_signals,
        )


class PreferenceDataModule(PairLoaders):
    """Pairs for training, validation, test and prediction, decoded to one size.

    Unlabelled rows are left out, except in prediction. Unless ``shared_prompts`` is ``"keep"``, no prompt is in two
    splits: a row of ``train`` gives way to ``val`` and ``test``, a row of ``val`` to ``test``. Rows and prompts are
    known when the object is constructed; images are read by the loaders' workers. Checkpoints hold the place in the
    training epoch. The command line opens only what a subcommand needs.

    Args:
        size: Pixels of a side, or (height, width), as the network takes them.
        train: Pairs to learn from.
        val: Pairs to validate on.
        test: Pairs to test on.
        predict: Pairs to score, labelled or not; they may share prompts with the others.
        resize: How images come to ``size``, see :class:`PixelLoader`.
        shared_prompts: ``"drop"`` leaves out rows that give way to another split; ``"keep"`` keeps them, so that
            metrics also count prompts that were trained on; ``"raise"`` stops if there are any.
        on_error: What readers without an ``on_error`` of their own do with bad rows and images, see
            :class:`PairReader`. From YAML it reaches them before they are opened; readers made in Python have read
            their rows by then, so it holds for their images alone.
        max_pixels: Images with more pixels are refused before they are decoded.
        loading: See :class:`PairLoaders`.

    Raises:
        InputError: If a setting is out of range or a split has no rows left.
    """

    remedy = "give it a reader, e.g. latentreward.data.PickAPicReader"

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        train: PairReader | None = None,
        val: PairReader | None = None,
        test: PairReader | None = None,
        predict: PairReader | None = None,
        resize: ResizePolicy = "stretch",
        shared_prompts: SharedPrompts = "drop",
        on_error: OnError = "raise",
        max_pixels: int = MAX_PIXELS,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        height, width = (size, size) if isinstance(size, int) else size
        check_at_least_one("data.", size=min(height, width))
        loader = PixelLoader(height, width, resize, max_pixels)
        readers = {"train": train, "val": val, "test": test}
        given = {name: reader for name, reader in readers.items() if reader is not None}
        rows = select_rows(given, shared_prompts)
        given |= {} if predict is None else {"predict": predict}
        self.datasets = {
            name: PairDataset(reader, loader, rows.get(name), on_error, name) for name, reader in given.items()
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of ``train``; every rank gets equally many pairs."""
        if self._overfits():
            return self._evaluation_loader("train")
        dataset = self._dataset("train")
        sampler = PairBatchSampler(
            len(dataset), self.batch_size, **shares_of(self.trainer), shuffle=self.shuffle, seed=self.seed
        )
        return ResumableLoader(dataset, sampler, collate_fn=collate_pairs, **self._worker_settings())

    def teardown(self, stage: str) -> None:
        """Log one line per split with pairs whose images could not be read."""
        for name, dataset in self.datasets.items():
            if skipped := dataset.skipped():
                logger.warning("data.%s: images not read on this rank: %s", name, count_text(skipped))

    def _deal(self, dataset: PairDataset) -> dict[str, Any]:
        shares = shares_of(self.trainer)
        return {
            "batch_size": even_batch_size(len(dataset), shares["num_replicas"], self.batch_size),
            "sampler": PairSampler(len(dataset), **shares),
            "collate_fn": collate_pairs,
        }
