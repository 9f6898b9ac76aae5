"""``latentreward cache``: encode the images, and optionally the prompts, of a data set once and store the results."""

import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, errors_at
from latentreward.core.interrupts import interrupts_told
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import locked
from latentreward.core.storage.progress import Progress
from latentreward.core.workers import SharedWork
from latentreward.data import PairReader, count_text
from latentreward.diffusion.cache import store
from latentreward.diffusion.cache.sources import CacheDtype, ImageSettings, LatentSource
from latentreward.diffusion.cache.store import CacheSpec
from latentreward.diffusion.cache.writing import (
    ENCODE,
    Encoding,
    describe_data,
    images_of,
    prepare_cache,
    sampled_pairs,
)

LINES = 20  # most problems that --check prints one by one


def cache(
    output: PathText,
    reader: PairReader | None = None,
    encoder: LatentSource | None = None,
    images: ImageSettings = ImageSettings(),  # noqa: B008
    dtype: CacheDtype = "float16",
    seed: int = 0,
    images_per_shard: int = 1024,
    num_workers: int | None = None,
    device: str = "auto",
    workers: int = 1,
    gpus_per_worker: float | None = None,
    check: bool = False,
) -> None:
    """Write the latents of a data set's images, and optionally embeddings of its prompts, to a folder.

    The same command resumes a run that was stopped in any way, and writes damaged files again.

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
        device: Device that encodes; auto takes an accelerator if there is one.
        workers: Processes that encode: on this machine, or on the Ray cluster of RAY_ADDRESS. More than 1 need the
            extra ``cluster``.
        gpus_per_worker: GPUs of each of several workers, e.g. 0.5; by default 1 if there are any.
        check: Whether to verify every file of ``output`` instead of writing; prints missing and damaged files, and
            exits with status 1 if there are any.
    """
    command, folder = partial(cache, **locals()), Path(output)
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
    kept = f"finished files are kept in {folder}: the same command goes on there"
    with interrupts_told(lambda: kept), SharedWork(command, workers, device, gpus_per_worker) as work:
        with errors_at("reader: "):  # before weights
            pictures = {len(images_of(pair)) - 2 for pair in sampled_pairs(reader)}
            encoder.check_sources(min(pictures - {0}, default=0))
        encoders = encoder.load()
        images.check(encoders.side_multiple)
        with errors_at("images."):
            encoders.space.check_frames(images.frames)
        vae = encoder.origin, encoder.vae_dtype, encoder.posterior, encoder.batch_size
        exif = "ignore" if encoders.vae is None else reader.exif
        spec = CacheSpec(encoders.space, encoders.vae_fingerprint, encoders.text_spec, *vae, images, dtype, seed,
                         images_per_shard, exif)  # fmt: skip
        encoding = Encoding(reader, encoders, num_workers, work)
        work.join({ENCODE: encoding.task}, {**asdict(spec), "data": describe_data(reader)})
        with locked(folder, "output"):
            todo = prepare_cache(folder, reader, spec, encoder, encoders, num_workers)
            begun, files = time.monotonic(), store.files_of(folder)
            total = sum(len(files[number].rows) for number in todo)
            with Progress("cache", total, "images and prompts") as progress:
                encoding.write(folder, todo, progress.add)
            rate = total / (time.monotonic() - begun)
            report(folder)
            if todo:
                print(f"{rate:.1f} images and prompts per second with {workers} workers")


def verify(folder: Path) -> None:
    """Check a cache and print what was found; exit with status 1 if anything is missing or damaged."""
    plan = store.read_plan(folder)
    if not (problems := store.damaged_tables(folder, plan)):
        states = store.check_files(folder, plan)
        problems = [problem for problem, _ in states if problem]
        if unread := Counter(reason for _, rows in states for reason in rows.values()):
            print(f"images that could not be read when the cache was written: {count_text(unread)}")
    if problems:
        more = [f"… and {len(problems) - LINES} more"] if len(problems) > LINES else []
        print(*problems[:LINES], *more, sep="\n")
        print(f"{folder}: {len(problems)} files missing or damaged; run the command that wrote it to put them right")
        sys.exit(1)
    print(f"{folder} is whole: {plan.pairs} pairs, {plan.images} images, {plan.prompts} prompts")


def report(folder: Path) -> None:
    """Print what the cache holds, and what was left out."""
    plan, files = store.read_plan(folder), store.files_of(folder)
    content = f"{plan.pairs} pairs, {plan.images} images, {plan.prompts} prompts, {len(files)} files"
    print(f"{folder}: {content}, {sum((folder / file.name).stat().st_size for file in files) / 2**20:.1f} MiB")
    print(f"dropped pairs: {count_text(Counter(plan.dropped))}")
    if lost := {
        row: why for file in files for row, why in store.check_file(folder, plan, file, contents=False).items()
    }:
        first = repr(store.read_table(folder, store.IMAGES)["image_key"][min(lost)].as_py())
        more = " and others" if len(lost) > 1 else ""
        print(f"images not read: {count_text(Counter(lost.values()))} ({first}{more}); pairs with them are not used")


run = partial(run_function, cache)
