"""Writing of a cache: a plan of the reader's rows, then the files, which several workers may share.

The plan depends on the reader's rows and the spec alone, not on the number of processes.
"""

import json
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from latentreward.core.contracts import EditPrompt, ImageRef, PreferencePair, seen_as, sources_of
from latentreward.core.errors import InputError
from latentreward.core.running import pair_generator
from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import contents, remove_temporary, write_errors_named, write_file
from latentreward.core.storage.progress import Progress
from latentreward.core.storage.run_folder import first_difference
from latentreward.core.workers import SharedWork
from latentreward.data import ImageError, PairReader, PixelLoader, decode_image
from latentreward.data.clips import ClipLoader
from latentreward.data.dataset import check_edit
from latentreward.data.image_sizes import Bucket
from latentreward.data.images import COUNT, DAMAGED, decode_latents, read_header
from latentreward.data.loading import WorkerLoader
from latentreward.diffusion.cache import store
from latentreward.diffusion.cache.sources import Encoders, LatentSource
from latentreward.diffusion.cache.store import FIELDS, IMAGES, PAIRS, PROMPTS, SCHEMAS, SPEC, CachePlan, CacheSpec
from latentreward.diffusion.encoders.vae import edit_of_grey

logger = logging.getLogger(__name__)
KEPT = "finished files are kept: free some space and resume with the same command"
ENCODE = "encode"  # name of the task that encodes one file
SKIP = "replace the file, or set the reader's on_error to skip, and run the same command"


def images_of(pair: PreferencePair) -> dict[str, ImageRef]:
    """Return the images of a pair by their ``side``: a, b, and the pictures that these are edits of."""
    sources = {str(place): source for place, source in enumerate(sources_of(pair.prompt))}
    return {"a": pair.image_a, "b": pair.image_b, **sources}


def describe_data(reader: PairReader) -> dict[str, Any]:
    """Describe a reader's data by about 16 of its rows, so that a resumed run notices other data."""
    pairs = sampled_pairs(reader)
    rows = [[p.pair_id, p.prompt, p.label_a, *(one.image_key for one in images_of(p).values())] for p in pairs]
    first = {"source": pairs[0].source, "split": pairs[0].split} if pairs else {}
    return {"reader": type(reader).__name__, "rows": len(reader), **first, "sample": digest([json.dumps(rows)])}


def sampled_pairs(reader: PairReader) -> list[PreferencePair]:
    """Return about 16 pairs that are spread over a reader's data."""
    return [reader[index] for index in range(0, len(reader), max(1, len(reader) // 16))]


@dataclass
class RowScan(Dataset[Any]):
    """Rows of a reader as the plan needs them, without contents of images.

    A row is its pair; of each image a checksum of its path or bytes; and the sizes at which the pair's images are
    encoded, or why it is left out.
    """

    reader: PairReader
    spec: CacheSpec
    encoder: LatentSource  # tells what prompts and pictures the network takes

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[PreferencePair, list[int], tuple[Bucket, Bucket] | str]:
        pair = self.reader[index]
        refs = [*images_of(pair).values()]
        marks = [crc32((ref.data or b"") if ref.path is None else os.fsencode(ref.path)) for ref in refs]
        a, b, *sources = (ImageRef(ref.image_key, noise=ref.noise) for ref in refs)
        bare = replace(pair, prompt=EditPrompt(pair.prompt, sources), image_a=a, image_b=b)
        bare = bare if sources else replace(bare, prompt=str(pair.prompt))
        try:
            return bare, marks, self._sizes(pair.prompt, refs)
        except InputError as error:
            if self.reader.on_error == "raise":
                raise InputError(f"reader: {pair.pair_id}: {error}; {SKIP}") from error
            return bare, marks, error.problem if isinstance(error, ImageError) else COUNT

    def _sizes(self, prompt: str, refs: Sequence[ImageRef]) -> tuple[Bucket, Bucket] | str:
        images, exif = self.spec.images, self.reader.exif
        self.encoder.check_sources(len(refs) - 2)
        if self.spec.vae is None:
            return images.sizes_of_latents(*map(self._latents_size, refs))
        check_edit(seen_as(prompt, exif=exif, max_pixels=images.max_pixels), self.encoder.check_prompt)
        if not images.needs_headers():
            return images.sizes_of_pair(None, None)
        a, b, *_ = [Bucket(*read_header(ref, images.max_pixels, exif)[:2]) for ref in refs]
        return images.sizes_of_pair(a, b)

    def _latents_size(self, ref: ImageRef) -> Bucket:
        space = self.spec.latent_space
        *_, height, width = shape = decode_latents(ref, space.frame_downscale is not None).shape
        size = Bucket(height * space.downscale, width * space.downscale)
        if shape != space.shape(*size, self.spec.images.frames):
            problem = f"shape {shape}, but the latent space has [{space}]; correct encoder.latent_space"
            raise ImageError(f"latents {ref.image_key!r}: {problem}", DAMAGED)
        return size


class Plan:
    """Tables of a cache, which list each image and prompt once, in the order of the reader's rows.

    Images of a file are of one size. Of pictures that are edited the network takes the posterior's mode: where the
    latents of images are samples, theirs are in files of their own.
    """

    def __init__(self, reader: PairReader, spec: CacheSpec, seen: bool) -> None:
        self.reader, self.spec, self.seen = reader, spec, seen
        self.rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in SCHEMAS}
        self.known: dict[Any, tuple[Any, ...]] = {}
        self.files, self.numbers = dict[Any, tuple[int, int]](), {IMAGES: count(), PROMPTS: count()}
        if spec.text is not None:
            self.prompt("", None)

    def _file(self, table: str, group: Any, most: int) -> int:
        """Return the number of the file for the next image or prompt of a group."""
        number, held = self.files.get(group, (0, most))
        number, held = (next(self.numbers[table]), 0) if held == most else (number, held)
        self.files[group] = number, held + 1
        return number

    def prompt(self, prompt: str, index: int | None) -> int:
        """Return the row of a prompt, which the reader's row ``index`` has."""
        name = (str(prompt), *(source.image_key for source in sources_of(prompt) if self.seen))
        if name not in self.known:
            file = None if self.spec.text is None else self._file(PROMPTS, None, self.spec.text.prompts_per_shard)
            self.known[name] = (len(self.rows[PROMPTS]),)
            self.rows[PROMPTS].append((str(prompt), file, index if self.seen else None))
        return self.known[name][0]

    def image(self, image: ImageRef, size: Bucket, mark: int, index: int, side: str) -> int:
        """Return the row of an image, which the reader's row ``index`` has; refuse another image with its key."""
        group = *size, self.spec.posterior == "sample" and side not in ("a", "b")
        if (image.image_key, group) not in self.known:
            self.known[image.image_key, group] = len(self.rows[IMAGES]), mark, index, side
            file = self._file(IMAGES, group, self.spec.images_per_shard)
            self.rows[IMAGES].append((image.image_key, *size, image.noise, side, file, index))
        number, first, *place = self.known[image.image_key, group]
        if first != mark:
            refs = [images_of(self.reader[row])[of] for row, of in (place, (index, side))]
            found = [ref.data if ref.path is None else ref.path.is_file() and ref.path.read_bytes() for ref in refs]
            if all(found) and found[0] != found[1]:  # of a missing file the reader's on_error decides
                one, two = (ref.path or "bytes" for ref in refs)
                names = f"{one} (row {place[0]}) and of {two} (row {index})"
                raise InputError(f"reader: image_key={image.image_key!r:.200} is of {names}; give each its own")
        return number

    def scan(self, encoder: LatentSource, num_workers: int) -> tuple[CachePlan, dict[str, bytes]]:
        """Scan all rows; return the plan and the files of the tables. Raises InputError if no row can be cached."""
        dropped, reader, generator = Counter[str](), self.reader, torch.Generator()  # else torch draws a global seed
        rows = RowScan(reader, self.spec, encoder)
        loader = WorkerLoader(rows, batch_size=64, num_workers=num_workers, collate_fn=list, generator=generator)
        with Progress("cache: plan", len(reader), "rows") as progress:
            for index, (pair, marks, sizes) in enumerate(chain.from_iterable(loader)):
                progress.add()
                if isinstance(sizes, str):
                    dropped[sizes] += 1
                    continue
                prompt, sides = self.prompt(pair.prompt, index), zip(images_of(pair).items(), marks, strict=True)
                a, b, *sources = [self.image(one, sizes[side == "b"], mark, index, side) for (side, one), mark in sides]
                self.rows[PAIRS].append((*(getattr(pair, name) for name in FIELDS), prompt, a, b, sources))
        if not self.rows[PAIRS]:
            reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common())
            raise InputError(f"reader: none of its rows can be cached ({reasons or 'it has none'}); check images")
        tables = {name: _parquet(self.rows[name], schema) for name, schema in SCHEMAS.items()}
        digests = {name: sha256(content).hexdigest() for name, content in tables.items()}
        pairs, images, prompts = (len(rows) for rows in self.rows.values())
        return CachePlan(self.spec, describe_data(reader), digests, pairs, images, prompts, dict(dropped)), tables


def _parquet(rows: list[tuple[Any, ...]], schema: dict[str, pa.DataType]) -> bytes:
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), schema.values(), strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, [*schema]), sink, compression="zstd", write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def prepare_cache(
    folder: Path, reader: PairReader, spec: CacheSpec, encoder: LatentSource, encoders: Encoders, num_workers: int
) -> list[int]:
    """Write the plan, or compare it with an earlier run's; return the numbers of the files to write."""
    with write_errors_named(folder, KEPT):
        remove_temporary(folder)
        begun, problems = None, list[str]()
        if (folder / SPEC).exists():
            begun = store.read_plan(folder)
            then, now = asdict(begun.spec) | {"data": begun.data}, asdict(spec) | {"data": describe_data(reader)}
            if difference := first_difference(then, now):
                raise InputError(f"{folder} was begun with {difference}; set it back, or choose another output")
            problems = store.damaged_tables(folder, begun)
        elif strangers := [name for name in contents(folder) if name not in SCHEMAS]:
            raise InputError(f"output={str(folder)!r} has no {SPEC} but holds {strangers[0]}; choose an empty folder")
        if begun is None or problems:
            seen = encoders.text is not None and encoders.text.sees_sources
            plan, tables = Plan(reader, spec, seen).scan(encoder, num_workers)
            if begun is not None and plan.name != begun.name:
                raise InputError(
                    f"{folder}: {problems[0]}, and the reader's rows are others now; choose another output"
                )
            for name, content in tables.items():
                write_file(folder / name, content, KEPT)
            write_file(folder / SPEC, plan.to_json(), KEPT)
        plan = store.read_plan(folder)
        states = store.check_files(folder, plan)
        if damaged := [problem for problem, _ in states if problem and not problem.endswith(store.MISSING)]:
            logger.warning("%s: %s (%d such); encoding again", folder, damaged[0], len(damaged))
        return [number for number, (problem, _) in enumerate(states) if problem]


class PlannedContents(Dataset[Any]):
    """Images and prompts of a planned cache, by the number of their file and of their row in it."""

    def __init__(self, folder: Path, reader: PairReader) -> None:
        self.plan, self.reader, self.files = store.read_plan(folder), reader, store.files_of(folder)
        self.images, self.prompts = (store.read_table(folder, name) for name in (IMAGES, PROMPTS))
        self._fetched: tuple[int, PreferencePair] | None = None

    def batches_of(self, number: int) -> list[list[tuple[int, int]]]:
        """List the places of each batch of a file."""
        spec, file = self.plan.spec, self.files[number]
        step = spec.text.batch_size if spec.text is not None and file.size is None else spec.batch_size
        places = [(number, row) for row in range(len(file.rows))]
        return [places[first : first + step] for first in range(0, len(places), step)]

    def __getitem__(self, place: tuple[int, int]) -> tuple[str, Tensor | None, Tensor | None, str]:
        """Read an image, or a prompt, as ``on_error`` says about what cannot be read.

        Returns:
            The prompt, or the name of the image; of an image the pixels or ready latents, and noise to sample the VAE's
            posterior; and why it could not be read.
        """
        file, spec = self.files[place[0]], self.plan.spec
        table, row = self.prompts if file.size is None else self.images, int(file.rows[place[1]])
        one = {name: table[name][row].as_py() for name in table.column_names}
        if file.size is None:
            return self._prompt(one["reader_row"], one["prompt"]), None, None, ""
        shape, images, key = spec.latent_space.shape(*file.size, spec.images.frames), spec.images, one["image_key"]
        loader = PixelLoader(*file.size, images.resize, images.max_pixels, self.reader.exif)
        if images.frames > 1:
            loader = ClipLoader(**vars(loader), frames=images.frames, fps=images.fps)
        problem, noise = "", None
        try:
            image = self._planned(one["reader_row"], one["side"], key)
            if spec.vae is None:
                has_time = spec.latent_space.frame_downscale is not None
                content = torch.from_numpy(decode_latents(image, has_time)).float()
            else:
                content = loader(image)
        except ImageError as error:
            problem = self._skipped(error)
            content = torch.zeros(shape) if spec.vae is None else loader.blank()
        if spec.posterior == "sample" and one["side"] in ("a", "b"):
            noise = torch.randn(shape, generator=pair_generator(spec.seed, "posterior", 0, "", key))
        return key, content, noise, problem

    def _prompt(self, row: int | None, text: str) -> str:
        """Return a prompt, with its pictures if the text encoder sees them; grey ones for those that cannot be read."""
        if row is None:
            return text
        prompt, limit, exif = self._planned(row, None, text), self.plan.spec.images.max_pixels, self.reader.exif
        try:
            for image in sources_of(prompt):
                decode_image(image, limit, exif)
        except ImageError as error:
            self._skipped(error)
            prompt = edit_of_grey(text, len(sources_of(prompt)))
        return seen_as(prompt, exif=exif, max_pixels=limit)

    def _planned(self, row: int, side: str | None, name: str) -> Any:
        """Return an image of the reader's row, or its prompt; raises InputError if it is not the one of that name."""
        if self._fetched is None or self._fetched[0] != row:  # else it is that of the last image or prompt
            self._fetched = row, self.reader[row]
        pair = self._fetched[1]
        found = pair.prompt if side is None else images_of(pair).get(side)
        if (now := str(found) if side is None else found and found.image_key) != name:
            what = f"the prompt of row {row} is" if side is None else f"image {side} of row {row} is"
            remedy = "give the same data, or choose another output"
            raise InputError(f"reader: {what} {now!r:.80}, but was {name!r:.80} when the cache was planned; {remedy}")
        return found

    def _skipped(self, error: ImageError) -> str:
        if self.reader.on_error == "raise":
            raise ImageError(f"{error}; {SKIP}", error.problem) from error
        return error.problem


def encode_batch(
    names: Sequence[str], content: Tensor | None, noise: Tensor | None, encoders: Encoders, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Encode a batch to the tensors of its file in ``dtype``; of prompts with a mask the tokens follow each other."""
    mask, encoded = None, {store.LATENTS: content}
    if content is None and encoders.text is not None:
        text = encoders.text(names)
        mask, encoded = text.prompt_mask, {store.EMBEDS: text.prompt_embeds, store.POOLED: text.pooled_prompt_embeds}
    elif content is not None and encoders.vae is not None:
        encoded = {store.LATENTS: encoders.vae.encode(content, noise)}
    rows = {name: tensor.to(dtype) for name, tensor in encoded.items() if tensor is not None}
    for kind, tensor in rows.items():
        if not (finite := tensor.isfinite().flatten(1).all(dim=1)).all():
            what = f"{kind} of {names[int((~finite).nonzero()[0])]!r:.80} are not finite in {dtype}"
            raise InputError(f"{what}; set dtype and the encoder's own to bfloat16 or float32")
    if mask is not None:
        rows |= {store.EMBEDS: rows[store.EMBEDS][mask], store.LENGTHS: mask.sum(dim=1, dtype=torch.int32)}
    return rows


@dataclass
class Encoding:
    """Encoding of the files of a planned cache, which several workers may share."""

    reader: PairReader  # reader of the images
    encoders: Encoders  # VAE and text encoders
    num_workers: int  # number of processes per device that read and decode images
    work: SharedWork
    progress: Callable[[int], object] = lambda number: None  # gets the rows of each batch encoded

    def task(self, tables: Mapping[str, bytes]) -> Callable[[int], Iterator[bytes]]:
        """Return the function that yields the content of the file of a number.

        ``tables`` are the plan and the tables of the cache: name → content.
        """
        with TemporaryDirectory() as folder:
            for name, content in tables.items():
                (Path(folder) / name).write_bytes(content)
            planned, places = PlannedContents(Path(folder), self.reader), list[list[tuple[int, int]]]()
        device, plan = self.work.device, planned.plan
        for encoder in (self.encoders.vae, self.encoders.text):
            if encoder is not None:
                encoder.eval().to(device)
        loader = WorkerLoader(
            planned,
            batch_sampler=places,  # of one file after the other, for which the same worker processes load
            collate_fn=list,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # A worker of Ray runs threads, and a fork of a process with threads may hang (seen with Python 3.11).
            multiprocessing_context="forkserver" if self.num_workers and SharedWork.in_worker else None,
            worker_init_fn=end_with_parent,
        )

        def encode(number: int) -> Iterator[bytes]:
            parts, lost, first = list[dict[str, Tensor]](), dict[str, str](), 0
            places[:] = planned.batches_of(number)
            for batch in loader:
                names, *tensors, problems = zip(*batch, strict=True)
                content, noise = (None if one[0] is None else torch.stack(one).to(device) for one in tensors)
                unread = {row: problem for row, problem in enumerate(problems) if problem}
                with torch.inference_mode():
                    rows = encode_batch(names, content, noise, self.encoders, getattr(torch, plan.spec.dtype))
                    rows.get(store.LATENTS, torch.empty(0))[[*unread]] = 0
                parts.append({name: tensor.cpu() for name, tensor in rows.items()})
                lost |= {str(first + row): reason for row, reason in unread.items()}
                first += len(names)
                self.progress(len(names))
            whole = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
            record = {"plan": plan.name, "unread": lost, "sha256": store.digest_of(whole, lost)}
            yield save(whole, {"cache": json.dumps(record, sort_keys=True)})  # in one entry: it sorts none

        return encode

    def write(self, folder: Path, todo: Sequence[int], progress: Callable[[int], object]) -> None:
        """Encode and write the files of the numbers ``todo``."""
        files, shared = store.files_of(folder), self.work.workers > 1
        tables = {name: (folder / name).read_bytes() for name in (SPEC, *SCHEMAS)}

        def keep(number: int, content: bytes) -> None:
            write_file(folder / files[number].name, content, KEPT)
            if shared:
                progress(len(files[number].rows))

        if not shared:
            self.progress = progress
        self.work.run(ENCODE, tables, todo, keep)


def end_with_parent(worker_id: int) -> None:
    """Kill this loader process when the one that loads ends; with a fork server, that one is not its parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
