"""``latentreward cache``: encode the images, and optionally the prompts, of a data set once and store the results."""

import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, errors_at
from latentreward.core.interrupts import interrupts_told
from latentreward.core.settings.functions import run_function
from latentreward.core.shared_work import SHARDS, SharedWork, TrainerSettings
from latentreward.core.storage.durable import locked
from latentreward.core.storage.progress import Progress
from latentreward.data import PairReader, count_text
from latentreward.data.images import ExifOrientation
from latentreward.diffusion.cache.check import check_cache, read_shards
from latentreward.diffusion.cache.encoding import ShardEncoding
from latentreward.diffusion.cache.layout import (
    IMAGES,
    PAIRS,
    CacheDtype,
    CacheSpec,
    manifest_name,
    read_manifest,
    read_plan,
)
from latentreward.diffusion.cache.plan import describe_data, fewest_sources
from latentreward.diffusion.cache.preparing import prepare_cache
from latentreward.diffusion.cache.sizing import ImageSettings
from latentreward.diffusion.cache.sources import Encoders, LatentSource

ENCODE = "encode"
"""Name of the task that writes one shard."""
LINES = 20
"""Most problems that ``--check`` prints one by one."""
NAMED = 5
"""Most images that could not be read whose names are printed."""


def cache(
    output: PathText,
    reader: PairReader | None = None,
    encoder: LatentSource | None = None,
    images: ImageSettings = ImageSettings(),  # noqa: B008
    dtype: CacheDtype = "float16",
    seed: int = 0,
    images_per_shard: int = 1024,
    num_workers: int | None = None,
    trainer: TrainerSettings = TrainerSettings(),  # noqa: B008
    check: bool = False,
) -> None:
    """Write the latents of a data set's images, and optionally embeddings of its prompts, to a folder.

    The same command resumes a run that was stopped in any way, and writes damaged files again. Before it encodes, it
    prints the bytes to write; a disk with too little space is refused.

    Args:
        output: Folder of the cache.
        reader: Reader of the pairs to cache; rows without a label are cached too.
        encoder: Source of the latents: ``PipelineEncoders`` (encodes images) or ``PublishedLatents`` (copies latents).
        images: Sizes to which images are resized.
        dtype: Data type of the stored latents and embeddings.
        seed: Seed for sampling each image's latents from the VAE posterior.
        images_per_shard: Most images in one file; a stopped run loses at most one unfinished file per process.
        num_workers: Processes per device that read and decode images; 0 decodes in the encoding process. By default 4,
            or the number of cores if that is less.
        trainer: Settings of the processes that encode.
        check: Whether to verify every file of ``output`` instead of writing; prints missing and damaged files, and
            exits with status 1 if there are any.

    Raises:
        InputError: If a setting is wrong, or reader and encoder do not fit each other.
    """
    folder = Path(output)
    num_workers = min(4, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
    if check:
        verify(folder)
        return
    if reader is None or encoder is None:
        missing = "reader" if reader is None else "encoder"
        raise InputError(f"{missing} is missing; give it in a --config file, or say --check to verify a cache")
    if reader.holds != encoder.holds:
        kind = type(encoder).__name__
        remedy = {"images": "PipelineEncoders", "latents": "PublishedLatents"}.get(reader.holds, "a reader with images")
        raise InputError(f"encoder: {kind} takes {encoder.holds}, but the reader holds {reader.holds}; set {remedy}")
    kept = f"finished shards are kept in {folder}: the same command goes on there"
    with interrupts_told(lambda: kept), SharedWork(trainer, "auto", folder / SHARDS) as work:
        with errors_at("reader: "):  # before weights
            encoder.check_sources(fewest_sources(reader))
        encoders = encoder.load()
        images.check(encoders.side_multiple)
        with errors_at("images."):
            encoders.space.check_frames(images.frames)
        spec = make_spec(encoder, encoders, images, dtype, seed, images_per_shard, reader.exif)
        encoding = ShardEncoding(folder, reader, images.max_pixels, encoders, num_workers, work)
        if not work.join({ENCODE: encoding.task}, {**spec.record(), "data": describe_data(reader)}, folder):
            return
        with locked(folder, "output"):
            checks = encoder.check_sources, encoder.check_prompt
            todo = prepare_cache(folder, reader, images, spec, num_workers, encoders.text, *checks)
            unused: list[int] = []
            total, begun = sum(shard.count for shard in todo), time.monotonic()
            with Progress("cache", total, "images and prompts", processes=work.size) as progress:
                encoding.progress = progress.add
                numbers = [shard.number for shard in todo]
                work.run(ENCODE, numbers, lambda results: unused.extend(frames for _, frames in results))
            rate = total / (time.monotonic() - begun)
            report(folder, sum(unused))
            if todo:
                print(f"{rate:.1f} images and prompts per second with {work.size} processes")


def make_spec(
    encoder: LatentSource,
    encoders: Encoders,
    images: ImageSettings,
    dtype: CacheDtype,
    seed: int,
    per_shard: int,
    exif: ExifOrientation,
) -> CacheSpec:
    """Collect every setting that determines the bytes of the cache, apart from the data."""
    buckets = None if images.size is not None else tuple((b.height, b.width) for b in images.bucket_sizes())
    encodes = encoders.vae is not None
    return CacheSpec(
        origin=encoder.origin,
        vae=encoders.vae_fingerprint,
        vae_dtype=encoder.vae_dtype,
        latent_space=encoders.space,
        posterior=encoder.posterior,
        seed=seed,
        dtype=dtype,
        size=None if images.size is None else tuple(images.one_size()),  # type: ignore[arg-type]
        buckets=buckets,
        resize=images.resize if encodes else None,
        cross_bucket=images.cross_bucket,
        min_pixels=images.smallest(),
        batch_size=encoder.batch_size,
        images_per_shard=per_shard,
        text=encoders.text_spec,
        exif=exif if encodes else "ignore",
        frames=images.frames,
        fps=images.fps,
    )


def verify(folder: Path) -> None:
    """Check a cache and print what was found; exit with status 1 if anything is missing or damaged."""
    plan, problems, unreadable = check_cache(folder)
    for problem in problems[:LINES]:
        print(problem)
    if len(problems) > LINES:
        print(f"… and {len(problems) - LINES} more")
    if unreadable:
        print(f"images that could not be read when the cache was written: {count_text(unreadable)}")
    if problems:
        print(f"{folder}: {len(problems)} files missing or damaged; run the command that wrote it to put them right")
        sys.exit(1)
    print(f"{folder} is whole: {plan.pairs} pairs, {plan.images} images, {plan.prompts} prompts")


def report(folder: Path, unused: int) -> None:
    """Print what the cache holds, what was left out, and the number of ``unused`` frames of clips."""
    plan, shards = read_plan(folder), read_shards(folder)
    size = sum((folder / shard.name).stat().st_size for shard in shards)
    manifests = {shard.number: read_manifest(folder / manifest_name(shard.name)) for shard in shards}
    unreadable = Counter(reason for manifest in manifests.values() for reason in manifest.unreadable.values())
    lost = {(number, row) for number, manifest in manifests.items() for row in manifest.unreadable}
    content = f"{plan.pairs} pairs, {plan.images} images, {plan.prompts} prompts, {len(shards)} shards"
    print(f"{folder}: {content}, {size / 2**20:.1f} MiB")
    print(f"dropped pairs: {count_text(Counter(plan.dropped))}")
    if lost:
        images = pq.read_table((folder / IMAGES).absolute(), columns=["image_key", "shard", "row"])
        stored = zip(images["shard"].to_pylist(), images["row"].to_pylist(), strict=True)
        bad = {number for number, shard_and_row in enumerate(stored) if shard_and_row in lost}
        names = images["image_key"].take(sorted(bad)).to_pylist()
        table = pq.read_table((folder / PAIRS).absolute())
        sources = table["source_images"].to_pylist() if "source_images" in table.column_names else [()] * len(table)
        rows = zip(table["image_a"].to_pylist(), table["image_b"].to_pylist(), sources, strict=True)
        pairs = sum(not bad.isdisjoint((a, b, *edited)) for a, b, edited in rows)
        first = ", ".join(map(repr, names[:NAMED])) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        print(f"images not read: {count_text(unreadable)} ({first}); {pairs} pairs have such an image")
    if unused:
        print(f"clips longer than frames={plan.spec.frames}: {unused} frames were not used")


run = partial(run_function, cache)
