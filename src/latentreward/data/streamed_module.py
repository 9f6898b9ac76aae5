"""Lightning data module whose training pairs are streamed."""

from typing import Any

from latentreward.data.collate import collate_pairs
from latentreward.data.datamodules import PreferenceDataModule
from latentreward.data.loading import ResumableLoader, shares_of
from latentreward.data.readers.base import normalise_prompt
from latentreward.data.streaming import PairStream, StreamedPairs, StreamSampler
from latentreward.errors import InputError, check_at_least_one


class StreamedPreferenceDataModule(PreferenceDataModule):
    """Pairs to train on from a stream, and readers for the other splits, as :class:`PreferenceDataModule`.

    Nothing is copied to this machine. In return the order is random only within ``shuffle_buffer`` rows and the order
    of the files; an epoch is a number of batches, and goes on where the last one ended; the stream is divided among
    the ranks and their loader processes by files; all of them read the files left over, fewer than there are processes,
    and each takes its share of their rows. Files of unlike lengths end a process's pass before others'. A run that goes
    on reads the stream again from its start up to its place, without decoding images, and must have as many
    ranks and ``num_workers`` and the same ``batch_size``, ``shuffle_buffer`` and seed; the same pairs then follow.

    Rows whose prompt is in ``val`` or ``test`` are left out, unless ``shared_prompts`` is ``"keep"``.

    Args:
        size: Side in pixels, or (height, width), of the images that the network takes.
        train: Stream of the pairs to train on.
        batches_per_epoch: Batches per rank in an epoch; sets when validation and epoch checkpoints happen.
        options: Other settings of :class:`PreferenceDataModule`, but for ``frames`` and ``targets``.

    Raises:
        InputError: If a setting is out of range or needs all rows of ``train``.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        train: PairStream | None = None,
        batches_per_epoch: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        check_at_least_one("data.", batches_per_epoch=batches_per_epoch)
        for setting, plain in (("targets", None), ("frames", 1)):
            if options.get(setting, plain) != plain:
                raise InputError(
                    f"data.{setting} needs rows with numbers, and a stream has none; use a reader in train"
                )
        shared_prompts = options.get("shared_prompts", "drop")
        if shared_prompts == "raise":
            raise InputError("data.shared_prompts: raise needs all prompts of train before training; set drop or keep")
        if train is None:
            return
        others = [dataset.reader for name, dataset in self.datasets.items() if name in ("val", "test")]
        prompts = (prompt for reader in others for prompt in reader.prompts())
        self.datasets["train"] = StreamedPairs(
            train,
            self.loader,
            lanes=max(1, self.num_workers),
            batch_size=self.batch_size,
            batches_per_epoch=batches_per_epoch,
            apart=map(normalise_prompt, prompts) if shared_prompts == "drop" else (),
            on_error=options.get("on_error", "raise"),
            seed=self.seed,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return batches of the stream; every rank gets ``batches_per_epoch`` of them.

        Raises:
            InputError: If ``train`` is not set, or the trainer's ``overfit_batches`` is.
        """
        if self._overfits():
            raise InputError("trainer.overfit_batches: a stream has no fixed batches; use a reader in data.train")
        dataset, shares = self._dataset("train"), shares_of(self.trainer)
        dataset.share = shares
        sampler = StreamSampler(dataset, self.num_workers, **shares)
        return ResumableLoader(dataset, sampler, collate_fn=collate_pairs, **self._worker_settings())
