"""Lightning data modules that turn pair readers into loaders of preference batches."""

import logging
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from latentreward.core.contracts import taken_of_edits
from latentreward.core.errors import InputError, check_at_least_one, check_multiples
from latentreward.core.running import run_seed
from latentreward.data.clips import FPS, ClipLoader, check_clips, check_frames, require_pyav
from latentreward.data.dataset import PairDataset, collate_pairs
from latentreward.data.images import MAX_PIXELS, PixelLoader, ResizePolicy
from latentreward.data.loading import ResumableBatchSampler, ResumableLoader, WorkerLoader, ignore_signals, shares_of
from latentreward.data.readers.base import OnError, PairReader, count_text
from latentreward.data.sampling import BucketBatchSampler, EvaluationBatches, PairBatchSampler, Sizing
from latentreward.data.score_table import ScoreTargets, check_targets, label_remedy
from latentreward.data.splits import USED, SharedPrompts, select_rows, split_by_prompt

logger = logging.getLogger(__name__)


class PairLoaders(LightningDataModule):
    """Base class of data modules with up to four splits of pairs, for pixels or for cached latents.

    A subclass fills :attr:`datasets` and implements ``train_dataloader`` and ``evaluation_loading``.

    Args:
        batch_size: Pairs per batch and rank; fewer if some are unreadable, or where evaluation divides the rest.
        num_workers: Loader processes per rank; 0 loads in the training process.
        prefetch_factor: Batches that each worker loads in advance.
        pin_memory: Put batches in page-locked memory if there is an accelerator.
        shuffle: Use a new order of ``train`` in each epoch. The order does not depend on the world size.
        seed: Seed of the order of ``train``; None takes the run's ``seed_everything``.
    """

    datasets: dict[str, Any]  # data set of each split that is set: train, val, test, predict
    emptied: Mapping[str, str] = MappingProxyType({})  # error message of each split that has no rows left
    remedy: str  # end of the message about a split that is not set; says what to set ``{split}`` to

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
        """Return batches of ``val``, each pair once over all ranks; in training, an empty list if ``val`` is unset."""
        if "val" in self.datasets or (self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING):
            return self._evaluation_loader("val")
        return []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of ``test``, each pair once over all ranks."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of ``predict``, each pair once over all ranks."""
        # Lightning looks for row numbers, which only its own batch samplers tell; what we write names pairs.
        warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
        return self._evaluation_loader("predict")

    @classmethod
    def unset(cls, name: str) -> InputError:
        """Return the error about a split that is needed but not set."""
        return InputError(f"data.{name} is not set; {cls.remedy.format(split=name)}")

    def require_rows(self, names: Iterable[str]) -> None:
        """Raise InputError if one of the named splits has no rows left."""
        for name in names:
            if name in self.emptied:
                raise InputError(self.emptied[name])

    def _dataset(self, name: str) -> Any:
        """Return the data set of a split; raise InputError if it is not set or has fewer pairs than ranks."""
        self.require_rows([name])
        if name not in self.datasets:
            raise self.unset(name)
        dataset, ranks = self.datasets[name], shares_of(self.trainer)["num_replicas"]
        if len(dataset) < ranks:
            raise InputError(f"data.{name} has {len(dataset)} pairs for {ranks} ranks; use fewer devices or more pairs")
        return dataset

    def _worker_settings(self) -> dict[str, Any]:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        pinned = self.pin_memory and accelerator is not None and accelerator.type != "mps"  # a Mac has no such memory
        ahead = self.prefetch_factor if self.num_workers else None
        return {"num_workers": self.num_workers, "prefetch_factor": ahead, "pin_memory": pinned}

    def evaluation_loading(self, dataset: Any) -> dict[str, Any]:
        """Return the ``DataLoader`` arguments for evaluation on this rank: sampler, batch size and ``collate_fn``."""
        raise NotImplementedError

    def _evaluation_loader(self, name: str) -> DataLoader[Any]:
        dataset = self._dataset(name)
        return WorkerLoader(
            dataset,
            **self.evaluation_loading(dataset),
            **self._worker_settings(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_signals,
        )


class PreferenceDataModule(PairLoaders):
    """Pairs for training, validation, test and prediction, decoded from images to one size.

    Unlabelled rows are left out, except in ``predict``. By default no prompt is in two of ``train``, ``val`` and
    ``test``: rows of ``train`` whose prompt is also in ``val`` or ``test`` are left out, and rows of ``val`` whose
    prompt is also in ``test``. Readers read their rows and prompts when they are constructed; the loaders' workers
    read the images. Pairs of a batch edit equally many pictures. Checkpoints hold the position in the training epoch.
    On the command line a subcommand opens only the splits that it needs.

    Args:
        size: Side in pixels, or (height, width), of the images that the network takes.
        train: Pairs to train on.
        val: Pairs to validate on.
        test: Pairs to test on.
        predict: Pairs to score, labelled or not. They may share prompts with other splits.
        resize: How images are resized to ``size``, see :class:`PixelLoader`.
        val_share: Share of the prompts of ``train`` whose pairs become ``val``, where ``val`` is not set, e.g. 0.1.
        shared_prompts: ``"drop"`` leaves out rows whose prompt is in a later split (see above). ``"keep"`` keeps them,
            so that metrics also count prompts that were trained on. ``"raise"`` raises InputError if there are any.
        on_error: ``on_error`` of readers that set none themselves, see :class:`PairReader`. In YAML it applies to bad
            rows and to unreadable images. Readers made in Python have read their rows before, so that it applies to
            their images only.
        max_pixels: Largest width × height of an image; images with more pixels are refused before decoding.
        frames: Number of frames of clips, for networks that make clips: then the files are mp4 files, of which the
            first ``frames`` frames are taken. 1 for images.
        fps: Frames per second of clips, see :class:`~latentreward.data.clips.ClipLoader`.
        targets: Given values of the images, such as a teacher's scores, for a loss that learns from them.
        loading: See :class:`PairLoaders`.
    """

    remedy = (
        "give it a reader, with the class of your other splits and its own file or split, e.g. --data.{split} "
        "JSONLPairReader --data.{split}.file FILE"
    )

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        train: PairReader | None = None,
        val: PairReader | None = None,
        test: PairReader | None = None,
        predict: PairReader | None = None,
        resize: ResizePolicy = "stretch",
        val_share: float | None = None,
        shared_prompts: SharedPrompts = "drop",
        on_error: OnError = "raise",
        max_pixels: int = MAX_PIXELS,
        frames: int = 1,
        fps: float = FPS,
        targets: ScoreTargets | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        height, width = (size, size) if isinstance(size, int) else size
        check_at_least_one("data.", size=min(height, width))
        check_clips("data.", frames, fps)
        require_pyav(frames)
        self._sides, self._frames = (height, width), frames
        self.loader = PixelLoader(height, width, resize, max_pixels)
        if frames > 1:
            self.loader = ClipLoader(**vars(self.loader), frames=frames, fps=fps)
        if val_share is not None and train is not None:
            if val is not None:
                raise InputError("data.val_share: data.val is set too; leave one of them out")
            train, val = split_by_prompt(train, val_share)
        readers = {"train": train, "val": val, "test": test}
        given = {name: reader for name, reader in readers.items() if reader is not None}
        rows, self.emptied = select_rows(given, shared_prompts, label_remedy(targets))
        given |= {} if predict is None else {"predict": predict}
        values = {} if targets is None else {name: targets.values(name, reader) for name, reader in given.items()}
        self.datasets = {
            name: PairDataset(reader, self.loader, rows.get(name), on_error, name, values.get(name))
            for name, reader in given.items()
        }
        for name, dataset in self.datasets.items():
            dataset.check_files(f"data.{name}")

    def setup(self, stage: str) -> None:
        """Check that the network takes images of ``size``, or clips of ``frames``, and as many pictures to edit."""
        module = self.trainer.lightning_module if self.trainer else None
        check_targets(module, self.datasets, stage)
        owners = (getattr(module, "model", None), "backbone"), (module, "policy"), (module, "generator")
        for owner, name in owners:
            network = getattr(owner, name, None)
            if (multiple := getattr(network, "side_multiple", None)) is not None:
                check_multiples("data.size", self._sides, multiple)
            family = getattr(network, "family", None)
            taken = getattr(network, "sources", None) or getattr(family, "sources", None)
            for split, dataset in self.datasets.items() if taken is not None else ():
                dataset.taken = taken_of_edits(taken, dataset.edits)
                dataset.check_prompt = getattr(family, "check_prompt", dataset.check_prompt)
                if split in USED.get(stage, ()):
                    dataset.check_sources()
            if network is not None and self._frames > 1:
                check_frames("data.", network, self._frames)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of ``train``; every rank gets equally many pairs."""
        if getattr(self.trainer, "overfit_batches", 0):  # needs a fixed order
            return self._evaluation_loader("train")
        dataset, shares = self._dataset("train"), shares_of(self.trainer)
        order = {"shuffle": self.shuffle, "seed": self.seed}
        sampler: ResumableBatchSampler = PairBatchSampler(len(dataset), self.batch_size, **shares, **order)
        # Which sampler it is does not depend on the batch size, which may change where a run goes on.
        if len(np.unique(sizes := _sizes(dataset), axis=0)) > 1:
            sizing = Sizing(self.batch_size, world_size=shares["num_replicas"], **order)
            sampler = BucketBatchSampler(sizes, sizing, shares["rank"])
        return ResumableLoader(dataset, sampler, collate_fn=collate_pairs, **self._worker_settings())

    def teardown(self, stage: str) -> None:
        """Log, for each split, the numbers of pairs with unreadable images by reason."""
        for name, dataset in self.datasets.items():
            if skipped := dataset.skipped():
                logger.warning("data.%s: images not read on this rank: %s", name, count_text(skipped))

    def evaluation_loading(self, dataset: PairDataset) -> dict[str, Any]:
        shares = shares_of(self.trainer)
        collate = partial(collate_pairs, blanks=dataset is not self.datasets.get("predict"))
        if getattr(self.trainer, "overfit_batches", 0):  # Lightning sets a sampler of its own, of single pairs
            return {"batch_size": self.batch_size, "collate_fn": collate}
        sizing = Sizing(self.batch_size, world_size=shares["num_replicas"])
        batches = EvaluationBatches(_sizes(dataset), sizing, shares["rank"])
        return {"batch_size": None, "sampler": batches, "collate_fn": collate}


def _sizes(dataset: PairDataset) -> np.ndarray:
    """Return the size of each pair, ``(N, 3)``, images of one size: a batch edits one number of pictures."""
    numbers = dataset.source_numbers()
    return np.column_stack([np.ones((len(numbers), 2), int), numbers])
