"""Encoding of planned images and prompts to shards, which several processes may share."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentreward.core.contracts import ImageRef, PreferencePair, TensorRecord, seen_as, sources_of
from latentreward.core.errors import InputError
from latentreward.core.seeding import pair_generator
from latentreward.core.shared_work import SharedWork, end_after
from latentreward.core.storage.durable import write_file
from latentreward.data import ImageError, PairReader, PixelLoader, decode_image
from latentreward.data.clips import ClipLoader
from latentreward.data.images import decode_latents
from latentreward.data.loading import WorkerLoader
from latentreward.diffusion.cache import layout
from latentreward.diffusion.cache.check import Shard, read_shards, tensor_shapes
from latentreward.diffusion.cache.layout import CachePlan, ShardManifest, manifest_name, read_plan
from latentreward.diffusion.cache.shards import KEPT, write_shard
from latentreward.diffusion.cache.sources import Encoders
from latentreward.diffusion.encoders.vae import edit_of_grey


@dataclass(frozen=True)
class EncodeBatch(TensorRecord):
    """Rows of one shard that are encoded together: images, latents or prompts."""

    shard: Shard  # shard that the rows belong to
    first: int  # index of the batch's first row in the shard
    names: tuple[str, ...]  # image keys, or the prompts themselves
    pixels: Tensor | None = None  # ``(n, 3, H, W)``, of clips ``(n, 3, F, H, W)``, in [-1, 1]; None if latents, prompts
    noise: Tensor | None = None  # ``(n, C, ...)`` standard normal, to sample the VAE's posterior; None for its mode
    latents: Tensor | None = None  # ``(n, C, ...)`` latents that need no encoding; None for images and prompts
    unreadable: Mapping[int, str] | None = None  # index of a row in the shard → why its image could not be read
    unused: int = 0  # number of frames of the batch's clips that are not used

    def __len__(self) -> int:
        return len(self.names)


class PlannedRows:
    """Lookup of the images or prompts that make up each shard, from the tables of a planned cache.

    Args:
        folder: Folder of the cache.

    Attributes:
        rows: Number of a shard → row indices, in the table of images or prompts, that make it up, in its order.
    """

    def __init__(self, folder: Path) -> None:
        names = layout.IMAGES, layout.PROMPTS, layout.SOURCES
        images, prompts, sources = (pq.read_table((folder / name).absolute()) for name in names)
        self.image_keys, self.prompts = images["image_key"], prompts["prompt"]
        seen = layout.READER_ROW.name in prompts.column_names
        self.prompt_rows = prompts[layout.READER_ROW.name] if seen else None
        self.reader_rows = sources["reader_row"].to_numpy()
        self.sides = sources["side"]
        self.rows: dict[int, np.ndarray] = {}
        for table in (images, prompts):  # a prompt that is not cached has no shard
            shard, row = (table[name].fill_null(-1).to_numpy() for name in ("shard", "row"))
            order = np.lexsort((row, shard))
            numbers, starts = np.unique(shard[order], return_index=True)
            self.rows |= dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))


class EncodeBatches(Dataset[EncodeBatch]):
    """Data set of a cache's batches, by the number of their shard and the index of their first row in it.

    Args:
        folder: Folder of the cache, which holds a plan.
        reader: Reader of the images.
        max_pixels: Largest number of pixels of an image; larger images count as unreadable.
    """

    def __init__(self, folder: Path, reader: PairReader, max_pixels: int) -> None:
        self.plan, self.shards, self.planned = read_plan(folder), read_shards(folder), PlannedRows(folder)
        self.reader, self.max_pixels = reader, max_pixels
        self._fetched: tuple[int, PreferencePair] | None = None

    def keys_of(self, shard: Shard) -> list[tuple[int, int]]:
        """List the keys of a shard's batches, in the order of its rows."""
        return [(shard.number, first) for first in range(0, shard.count, self._batch_size(shard))]

    def __getitem__(self, key: tuple[int, int]) -> EncodeBatch:
        """Read and decode a batch; an unreadable image becomes zeros and is listed in ``unreadable``.

        Raises:
            ImageError: If an image cannot be read and the reader's ``on_error`` is ``"raise"``.
            InputError: If the reader's rows differ from those that were planned.
        """
        shard, first = self.shards[key[0]], key[1]
        rows = self.planned.rows[shard.number][first : first + self._batch_size(shard)]
        if shard.kind == "text":
            limit, exif = self.max_pixels, self.reader.exif  # as for the pictures' latents
            prompts = self.prompts(rows, lambda image: decode_image(image, limit, exif))
            return EncodeBatch(shard, first, tuple(prompts))
        shape = tensor_shapes(self.plan, shard)[layout.LATENTS][1:]
        images = [self._image(int(row)) for row in rows]
        keys = tuple(image.image_key for image in images)
        content, unreadable, self._unused = [], {}, 0
        for number, image in enumerate(images):
            try:
                content.append(self._load(image, shard))
            except ImageError as error:
                self._check_skips(error)
                content.append(None)
                unreadable[first + number] = error.problem
        ready = self.plan.spec.vae is None
        blank = torch.zeros(shape) if ready else self._loader(shard).blank()
        loaded = torch.stack([blank if item is None else item for item in content])
        if ready:
            return EncodeBatch(shard, first, keys, latents=loaded, unreadable=unreadable)
        noise = None
        if self.plan.spec.posterior == "sample" and shard.kind == layout.LATENTS_FOLDER:
            generators = (pair_generator(self.plan.spec.seed, "posterior", 0, "", key) for key in keys)
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return EncodeBatch(shard, first, keys, loaded, noise, unreadable=unreadable, unused=self._unused)

    def prompts(self, rows: np.ndarray, read: Callable[[ImageRef], object]) -> list[str]:
        """Return prompts by their rows, with their pictures if the text encoder sees these.

        Grey stands for a picture that ``read`` fails to read, whose pairs are not used.

        Raises:
            ImageError: If a picture cannot be read and the reader's ``on_error`` is ``"raise"``.
            InputError: If the reader's rows differ from those that were planned.
        """
        texts = self.planned.prompts.take(rows).to_pylist()
        if self.planned.prompt_rows is None:
            return texts
        found: list[str] = []
        for text, number in zip(texts, self.planned.prompt_rows.take(rows).to_pylist(), strict=True):
            prompt = "" if number is None else self._pair(number).prompt
            if str(prompt) != text:
                raise InputError(
                    f"reader: the prompt of row {number} is {str(prompt)!r:.80}, but was {text!r:.80} when the cache "
                    "was planned; give the same data, or choose another output"
                )
            try:
                for image in sources_of(prompt):
                    read(image)
            except ImageError as error:
                self._check_skips(error)
                prompt = edit_of_grey(text, len(sources_of(prompt)))
            found.append(seen_as(prompt, exif=self.reader.exif, max_pixels=self.max_pixels))
        return found

    def _check_skips(self, error: ImageError) -> None:
        if self.reader.on_error == "raise":
            remedy = "replace the file, or set the reader's on_error to skip, and run the same command"
            raise ImageError(f"{error}; {remedy}", error.problem) from error

    def _batch_size(self, shard: Shard) -> int:
        text = self.plan.spec.text
        return text.batch_size if text is not None and shard.kind == "text" else self.plan.spec.batch_size

    def _image(self, row: int) -> ImageRef:
        number, side = int(self.planned.reader_rows[row]), self.planned.sides[row].as_py()
        pair = self._pair(number)
        image, key = layout.images_of(pair).get(side), self.planned.image_keys[row].as_py()
        if image is None or image.image_key != key:
            raise InputError(
                f"reader: image {side} of row {number} ({pair.pair_id}) is {image and image.image_key!r}, but was "
                f"{key!r} when the cache was planned; give the same data, or choose another output"
            )
        return image

    def _pair(self, number: int) -> PreferencePair:
        if self._fetched is None or self._fetched[0] != number:  # else it is that of the last image or prompt
            self._fetched = number, self.reader[number]
        return self._fetched[1]

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


def encode_batch(batch: EncodeBatch, encoders: Encoders, dtype: torch.dtype) -> dict[str, Tensor]:
    """Encode a batch to the tensors of its shard in ``dtype``, ``len(batch)`` rows each.

    Of prompts with a mask the tokens follow each other without padding.

    Raises:
        InputError: If a value is not finite, because the encoder or the stored dtype has overflowed.
    """
    mask, encoded = None, {layout.LATENTS: batch.latents}
    if batch.shard.kind == "text":
        assert encoders.text is not None
        text = encoders.text(batch.names)
        encoded = {layout.PROMPT_EMBEDS: text.prompt_embeds, layout.POOLED_PROMPT_EMBEDS: text.pooled_prompt_embeds}
        mask = text.prompt_mask
    elif batch.pixels is not None:
        assert encoders.vae is not None
        latents = encoders.vae.encode(batch.pixels, batch.noise)
        for row in batch.unreadable or ():
            latents[row - batch.first] = 0
        encoded = {layout.LATENTS: latents}
    rows = {name: tensor.to(dtype) for name, tensor in encoded.items() if tensor is not None}
    for tensor in rows.values():
        finite = tensor.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            name = batch.names[int((~finite).nonzero()[0])]
            raise InputError(
                f"{batch.shard.kind} of {name!r:.80} are not finite in {dtype}; set dtype and the encoder's own to "
                "bfloat16 or float32"
            )
    if mask is not None:
        rows[layout.PROMPT_EMBEDS] = rows[layout.PROMPT_EMBEDS][mask]
        rows[layout.PROMPT_LENGTHS] = mask.sum(dim=1, dtype=torch.int32)
    return rows


@dataclass
class ShardEncoding:
    """Encoding of the shards of a planned cache, which several processes may share."""

    folder: Path  # folder of the cache
    reader: PairReader  # reader of the images
    max_pixels: int  # largest number of pixels of an image; larger images count as unreadable
    encoders: Encoders  # VAE and text encoders
    num_workers: int  # number of processes per device that read and decode images
    work: SharedWork  # the processes that encode
    progress: Callable[[int], object] = lambda number: None  # gets the rows of each batch encoded

    def task(self, numbers: Sequence[int]) -> Callable[[int], int]:
        """Return the function that writes the shard of a number, and returns how many frames of clips are not used."""
        device = self.work.device
        for encoder in (self.encoders.vae, self.encoders.text):
            if encoder is not None:
                encoder.eval().to(device)
        batches = EncodeBatches(self.folder, self.reader, self.max_pixels)
        keys: list[tuple[int, int]] = []
        loader = WorkerLoader(
            batches,
            batch_size=None,
            sampler=keys,  # of one shard after the other, for which the same worker processes load
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=device.type != "cpu",
            # The process group runs threads, and a fork of a process with threads may hang (seen with Python 3.11).
            multiprocessing_context="forkserver" if self.num_workers and self.work.size > 1 else None,
            worker_init_fn=end_worker_with_rank,
        )

        def write(number: int) -> int:
            keys[:] = batches.keys_of(batches.shards[number])
            return self._write(batches.shards[number], batches.plan, loader)

        return write

    def _write(self, shard: Shard, plan: CachePlan, batches: Iterable[EncodeBatch]) -> int:
        """Write a shard and, when it is complete, its manifest; return the number of frames that are not used."""
        dtype, unused, tokens = getattr(torch, plan.spec.dtype), 0, 0
        unreadable: dict[int, str] = {}

        def encoded() -> Iterator[tuple[int, dict[str, Tensor]]]:
            nonlocal unused
            for batch in batches:
                with torch.inference_mode():
                    rows = encode_batch(batch.to(self.work.device), self.encoders, dtype)
                yield batch.first, {name: tensor.cpu() for name, tensor in rows.items()}
                unreadable.update(batch.unreadable or {})
                unused += batch.unused
                self.progress(len(batch))

        rows: Iterable[tuple[int, dict[str, Tensor]]] = encoded()
        if shard.kind == "text" and plan.spec.text is not None and plan.spec.text.masked:
            held = [tensors for _, tensors in rows]  # a file begins with the sizes of its tensors
            rows = [(0, {name: torch.cat([tensors[name] for tensors in held]) for name in held[0]})]
            tokens = len(rows[0][1][layout.PROMPT_EMBEDS])
        sha256 = write_shard(self.folder / shard.name, tensor_shapes(plan, shard, tokens), dtype, rows)
        manifest = ShardManifest(shard.count, sha256, plan.spec.hash, plan.hash, unreadable)
        write_file(self.folder / manifest_name(shard.name), manifest.to_json(), KEPT)
        return unused


def end_worker_with_rank(worker_id: int) -> None:
    """Kill this loader worker when its rank ends; with a fork server, the rank is not the worker's parent process."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    end_after(rank.join)
