"""Encoding of planned images and prompts to rows of shards: data set, LightningModule, and callback that writes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from latentreward.cache import layout
from latentreward.cache.check import Shard, tensor_shapes
from latentreward.cache.layout import CachePlan, ShardManifest, manifest_name, read_plan
from latentreward.cache.shard_writer import KEPT, ShardWriter
from latentreward.cache.sources import Encoders
from latentreward.contracts import ImageRef, PreferencePair, TensorRecord
from latentreward.data.clips import ClipLoader
from latentreward.data.images import ImageError, PixelLoader
from latentreward.data.latents import decode_latents
from latentreward.data.readers import PairReader
from latentreward.errors import InputError
from latentreward.seeding import pair_generator
from latentreward.storage.durable import write_errors_named, write_file
from latentreward.storage.progress import Progress


@dataclass(frozen=True)
class EncodeBatch(TensorRecord):
    """Rows of one shard that are encoded together: images, latents or prompts.

    Attributes:
        shard: Shard that the rows belong to.
        first: Index of the batch's first row in the shard.
        names: Image keys, or the prompts themselves.
        pixels: ``(n, 3, H, W)``, or ``(n, 3, F, H, W)`` for clips, in [-1, 1]; None for latents and prompts.
        noise: ``(n, C, ...)`` standard normal, for a sample of the VAE's posterior; None for its mode.
        latents: ``(n, C, ...)`` latents that need no encoding; None for images and prompts.
        unreadable: Index of a row in the shard → why its image could not be read.
        unused: Number of frames of the batch's clips that are not used.
    """

    shard: Shard
    first: int
    names: tuple[str, ...]
    pixels: Tensor | None = None
    noise: Tensor | None = None
    latents: Tensor | None = None
    unreadable: Mapping[int, str] | None = None
    unused: int = 0

    def __len__(self) -> int:
        return len(self.names)


class PlannedRows:
    """Lookup of the images or prompts that make up each shard, from the tables of a planned cache.

    Args:
        folder: Folder of the cache.
    """

    def __init__(self, folder: Path) -> None:
        images, prompts = pq.read_table(folder / layout.IMAGES), pq.read_table(folder / layout.PROMPTS)
        sources = pq.read_table(folder / layout.SOURCES)
        self.image_keys, self.prompts = images["image_key"], prompts["prompt"]
        self.reader_rows = sources["reader_row"].to_numpy()
        self.sides = sources["side"]
        self._images = _by_shard(images["shard"].to_numpy(), images["row"].to_numpy())
        self._prompts = _by_shard(*(prompts[name].fill_null(-1).to_numpy() for name in ("shard", "row")))

    def rows(self, shard: Shard) -> np.ndarray:
        """Return the row indices, in the table of images or prompts, that make up ``shard``, in the shard's order."""
        return (self._images if shard.kind == "latents" else self._prompts)[shard.number]


class EncodeBatches(Dataset[EncodeBatch]):
    """Data set of the batches to encode for some shards, shard by shard.

    Args:
        folder: Folder of the cache.
        plan: Plan of the cache.
        shards: Shards to encode.
        reader: Reader of the images.
        max_pixels: Largest number of pixels of an image; larger images count as unreadable.
    """

    def __init__(
        self, folder: Path, plan: CachePlan, shards: Sequence[Shard], reader: PairReader, max_pixels: int
    ) -> None:
        self.plan, self.reader, self.max_pixels = plan, reader, max_pixels
        self.planned = PlannedRows(folder)
        self.batches = [
            (shard, first, min(first + self._batch_size(shard), shard.count))
            for shard in shards
            for first in range(0, shard.count, self._batch_size(shard))
        ]
        self._fetched: tuple[int, PreferencePair] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> EncodeBatch:
        """Read and decode batch ``index``; an unreadable image becomes zeros and is listed in ``unreadable``.

        Raises:
            ImageError: If an image cannot be read and the reader's ``on_error`` is ``"raise"``.
            InputError: If the reader's rows differ from those that were planned.
        """
        shard, first, stop = self.batches[index]
        rows = self.planned.rows(shard)[first:stop]
        if shard.kind == "text":
            return EncodeBatch(shard, first, tuple(self.planned.prompts.take(rows).to_pylist()))
        shape = tensor_shapes(self.plan, shard)[layout.LATENTS][1:]
        images = [self._image(int(row)) for row in rows]
        keys = tuple(image.image_key for image in images)
        content, unreadable, self._unused = [], {}, 0
        for number, image in enumerate(images):
            try:
                content.append(self._load(image, shard))
            except ImageError as error:
                if self.reader.on_error == "raise":
                    remedy = "replace the file, or set the reader's on_error to skip, and run the same command"
                    raise ImageError(f"{error}; {remedy}", error.problem) from error
                content.append(None)
                unreadable[first + number] = error.problem
        ready = self.plan.spec.vae is None
        loaded = torch.stack([self._blank(shard, shape) if item is None else item for item in content])
        if ready:
            return EncodeBatch(shard, first, keys, latents=loaded, unreadable=unreadable)
        noise = self._noise(keys, shape)
        return EncodeBatch(shard, first, keys, loaded, noise, unreadable=unreadable, unused=self._unused)

    def _batch_size(self, shard: Shard) -> int:
        text = self.plan.spec.text
        return text.batch_size if text is not None and shard.kind == "text" else self.plan.spec.batch_size

    def _image(self, row: int) -> ImageRef:
        number, side = int(self.planned.reader_rows[row]), self.planned.sides[row].as_py()
        if self._fetched is None or self._fetched[0] != number:  # else it is the other image of the last pair
            self._fetched = number, self.reader[number]
        pair = self._fetched[1]
        image, key = pair.image_a if side == "a" else pair.image_b, self.planned.image_keys[row].as_py()
        if image.image_key != key:
            raise InputError(
                f"reader: image {side} of row {number} ({pair.pair_id}) is {image.image_key!r}, but was {key!r} when "
                "the cache was planned; give the same data, or choose another output"
            )
        return image

    def _load(self, image: ImageRef, shard: Shard) -> Tensor:
        spec = self.plan.spec
        if spec.vae is None:
            return torch.from_numpy(decode_latents(image, spec.latent_space.frame_downscale is not None)).float()
        loader = self._loader(shard)
        if not isinstance(loader, ClipLoader):
            return loader(image)
        clip = loader.load(image)
        self._unused += clip.unused
        return clip.pixels

    def _loader(self, shard: Shard) -> PixelLoader:
        spec = self.plan.spec
        assert shard.height is not None and shard.width is not None and spec.resize is not None
        image = PixelLoader(shard.height, shard.width, spec.resize, self.max_pixels, self.reader.exif)  # type: ignore[arg-type]
        return image if spec.frames == 1 else ClipLoader(**vars(image), frames=spec.frames, fps=spec.fps)

    def _blank(self, shard: Shard, shape: tuple[int, ...]) -> Tensor:
        """Return what stands for an unreadable image, or for unreadable latents of ``shape``."""
        return torch.zeros(shape) if self.plan.spec.vae is None else self._loader(shard).blank()

    def _noise(self, keys: Sequence[str], shape: tuple[int, ...]) -> Tensor | None:
        if self.plan.spec.posterior != "sample":
            return None
        seed = self.plan.spec.seed
        return torch.stack([torch.randn(shape, generator=pair_generator(seed, "posterior", 0, "", k)) for k in keys])


class ShardEncoder(LightningModule):
    """LightningModule whose ``predict_step`` encodes batches to rows of shards.

    Args:
        encoders: VAE and text encoders.
        dtype: Dtype in which latents and embeddings are stored.
    """

    def __init__(self, encoders: Encoders, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae, self.text, self.storage = encoders.vae, encoders.text, dtype

    def predict_step(self, batch: EncodeBatch, batch_idx: int) -> dict[str, Tensor]:
        """Encode a batch to the tensors of its shard in the stored dtype, ``len(batch)`` rows each.

        Of prompts with a mask the tokens follow each other without padding.

        Raises:
            InputError: If a value is not finite, because the encoder or the stored dtype has overflowed.
        """
        encoded, mask = self._encoded(batch)
        rows = {name: tensor.to(self.storage) for name, tensor in encoded.items()}
        for tensor in rows.values():
            finite = tensor.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                name = batch.names[int((~finite).nonzero()[0])]
                raise InputError(
                    f"{batch.shard.kind} of {name!r:.80} are not finite in {self.storage}; set dtype and the encoder's "
                    "own to bfloat16 or float32"
                )
        if mask is not None:
            rows[layout.PROMPT_EMBEDS] = rows[layout.PROMPT_EMBEDS][mask]
            rows[layout.PROMPT_LENGTHS] = mask.sum(dim=1, dtype=torch.int32)
        return rows

    def _encoded(self, batch: EncodeBatch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the rows of each tensor, and the mask of prompts with unequal numbers of tokens."""
        if batch.shard.kind == "text":
            assert self.text is not None
            text = self.text(batch.names)
            rows = {layout.PROMPT_EMBEDS: text.prompt_embeds, layout.POOLED_PROMPT_EMBEDS: text.pooled_prompt_embeds}
            return {name: tensor for name, tensor in rows.items() if tensor is not None}, text.prompt_mask
        if batch.latents is not None:
            return {layout.LATENTS: batch.latents}, None
        assert self.vae is not None and batch.pixels is not None
        latents = self.vae.encode(batch.pixels, batch.noise)
        for row in batch.unreadable or ():
            latents[row - batch.first] = 0
        return {layout.LATENTS: latents}, None


class ShardsToDisk(Callback):
    """Callback that writes the rows from :class:`ShardEncoder` to shards, and a manifest after a shard's last row.

    Prompts with a mask are held in memory until their shard is complete, because a file begins with its tensors' sizes.

    Args:
        folder: Folder of the cache, which must hold a plan when prediction starts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: ShardWriter | None = None
        self._unreadable: dict[int, str] = {}
        self._held: list[dict[str, Tensor]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the plan of the cache."""
        self.plan = read_plan(self.folder)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EncodeBatch, *_: Any
    ) -> None:
        """Write the rows of one batch, and the manifest after the last batch of a shard."""
        with write_errors_named(self.folder, KEPT):
            first, last = batch.first, batch.first + len(batch) == batch.shard.count
            if layout.PROMPT_LENGTHS in outputs:
                self._held.append({name: tensor.cpu() for name, tensor in outputs.items()})
                if not last:
                    return
                outputs = {name: torch.cat([rows[name] for rows in self._held]) for name in outputs}
                first, self._held = 0, []
            if first == 0:
                shapes = tensor_shapes(self.plan, batch.shard, len(outputs.get(layout.PROMPT_EMBEDS, ())))
                dtype = getattr(torch, self.plan.spec.dtype)
                self._writer, self._unreadable = ShardWriter(self.folder / batch.shard.name, shapes, dtype), {}
            assert self._writer is not None
            self._writer.write(first, outputs)
            self._unreadable.update(batch.unreadable or {})
            if last:
                sha256, count, plan = self._writer.finish(), batch.shard.count, self.plan
                self._writer = None
                manifest = ShardManifest(count, sha256, plan.spec.hash, plan.hash, self._unreadable)
                write_file(self.folder / manifest_name(batch.shard.name), manifest.to_json(), KEPT)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the unfinished shard."""
        if self._writer is not None:
            self._writer.abandon(exception)


class OneThread(Callback):
    """Callback that limits PyTorch to one thread per process while encoding.

    On a CPU, the number of threads changes the last bits of the results, and so the files' bytes.
    """

    def __init__(self) -> None:
        self._threads: int | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set one thread, in place of Lightning's number, which depends on the number of processes."""
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous number of threads."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous number of threads."""
        self.on_predict_end(trainer, pl_module)


class EncodingRate(Callback):
    """Callback that shows progress and rate of encoding, in images and prompts.

    Attributes:
        total: Number of images and prompts to encode, over all ranks.
        done: Number that this rank has encoded.
        seconds: Seconds since encoding began.
        unused: Number of frames of this rank's clips that were not used.
    """

    def __init__(self) -> None:
        self.total, self.done, self.seconds, self.unused = 0, 0, 0.0, 0
        self._progress: Progress | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the progress display."""
        self.total = trainer.datamodule.total  # type: ignore[attr-defined]
        self._begun = time.monotonic()
        total = self.total if trainer.is_global_zero else 0
        self._progress = Progress("cache", total, "images and prompts", processes=trainer.world_size)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EncodeBatch, *_: Any
    ) -> None:
        """Add the batch's images and prompts to ``done``; rank 0 shows its ``done`` times the number of ranks."""
        self.done, self.seconds = self.done + len(batch), time.monotonic() - self._begun
        self.unused += batch.unused
        assert self._progress is not None
        self._progress.add(len(batch))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the progress display."""
        if self._progress is not None:
            self._progress.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the progress display, so that later displays of this process are not nested in it."""
        self.on_predict_end(trainer, pl_module)


def _by_shard(shard: np.ndarray, row: np.ndarray) -> dict[int, np.ndarray]:
    order = np.lexsort((row, shard))
    numbers, starts = np.unique(shard[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))
