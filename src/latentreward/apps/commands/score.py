"""``latentreward score``: score a folder or list of images, and write a table and optionally an HTML page."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, first_line
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.progress import Progress
from latentreward.core.storage.run_folder import PartFiles
from latentreward.core.workers import SharedWork
from latentreward.data.image_lists import ImageList, read_images
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import MAX_PIXELS, ExifOrientation
from latentreward.reward import ModelSource, PublishedSettings, RewardModel
from latentreward.reward.scoring.find import find_reward, fingerprint
from latentreward.reward.scoring.image_lists import (
    FOUND,
    Gallery,
    ListedScoring,
    images_identity,
    read_scores,
    require_some,
    summarise,
)
from latentreward.reward.scoring.reward_model import own_sizes
from latentreward.reward.scoring.scoring_noise import NoiseSettings

PARTS = "parts"
"""Name of the task of the processes."""


def score(
    images: PathText,
    output: Path,
    model: PathText,
    prompt: str | None = None,
    noise: NoiseSettings = NoiseSettings(),  # noqa: B008
    each_level: bool = False,
    gallery: Path | None = None,
    gallery_images: int = 500,
    image_column: str | None = None,
    prompt_column: str | None = None,
    allow_outside: bool = False,
    max_prompt_chars: int = 10_000,
    run_config: PathText | None = None,
    batch_size: int = 8,
    decode_threads: int = 4,
    flush_every: int = 512,
    max_pixels: int = MAX_PIXELS,
    exif: ExifOrientation | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    workers: int = 1,
    gpus_per_worker: float | None = None,
    **loading: Any,
) -> None:
    """Score images or clips for their prompts, and write a table and, with --gallery, an HTML page sorted by score.

    The table has the columns image, prompt, score, z_score and quantile (empty if the model is not calibrated), width,
    height and problem (why an image has no score); of a model with two axes also fidelity and aesthetics, whose
    weighted sum is the score. Finished parts are kept in ``OUTPUT.parts/``: the same command
    resumes a killed run, and refuses other images, another model or other noise. A complete table is not computed
    again, so a page can be added later. A model trained on clips takes lists of mp4 files.

    Args:
        images: Folder, glob pattern such as 'pics/**/*.png', or list that ends in .jsonl or .csv. The prompts of a
            folder come from NAME.txt beside NAME.png, or from metadata.jsonl, metadata.csv or captions.jsonl in it.
        output: File to write: .csv or .parquet.
        model: Folder or hub id of a reward model, or a checkpoint, or the folder of a run.
        prompt: One prompt for all images.
        noise: Noise that is added to images before scoring.
        each_level: Whether to write also a column for each noise level, e.g. score_sigma_0.4.
        gallery: HTML page to write.
        gallery_images: Most images on the page; if there are more, the best and the worst are shown.
        image_column: Column of a list with the paths; by default file_name, file, path, image or name.
        prompt_column: Column of a list with the prompts; by default prompt, caption or text.
        allow_outside: Whether a list may name images outside its folder.
        max_prompt_chars: Most characters of a prompt; an image with a longer prompt gets no score.
        run_config: Config file of the model's training run; by default the one beside the checkpoint.
        batch_size: Images per forward pass.
        decode_threads: Threads that decode images ahead of the model.
        flush_every: Images per part of the table: a process that is stopped loses at most one part.
        max_pixels: Most pixels of an image; larger images are recorded as unreadable.
        exif: apply rotates images by their EXIF orientation, ignore takes the stored pixels; by default the model
            treats images as in its training.
        dtype: Precision of the model's backbone.
        device: Device, e.g. cuda:1; auto takes an accelerator if there is one.
        workers: Processes that score: on this machine, or on the Ray cluster of RAY_ADDRESS. More than 1 need the extra
            ``cluster``.
        gpus_per_worker: GPUs of each of several workers, e.g. 0.5; by default 1 if there are any.
        loading: See :class:`~latentreward.reward.ModelSource`.
    """
    command = partial(score, **{name: value for name, value in locals().items() if name != "loading"}, **loading)
    page = None if gallery is None else Gallery(gallery, gallery_images, decode_threads, max_pixels)
    with SharedWork(command, workers, device, gpus_per_worker) as work:
        source = ModelSource(model, config=run_config, **loading)
        find = cache(partial(find_reward, source))
        listed = read_images(images, prompt, image_column, prompt_column, allow_outside, max_prompt_chars)
        reading = {"batch_size": batch_size, "decode_threads": decode_threads, "max_pixels": max_pixels}
        progress: list[Progress] = []  # of the first process, once it begins
        rules: list[ImageSizes | None] = []  # that of a model in this process

        def task(given: None) -> Callable[[range], Iterator[tuple[pa.Table, dict[str, float]]]]:
            """Load the model, and return the function that scores a part, and tells what was found in its images."""
            load = partial(RewardModel.from_pretrained, source, device=work.device, dtype=getattr(torch, dtype))
            scoring = prepared(load, listed, noise, each_level, exif, reading)
            rules.append(scoring.model.image_sizes)
            if workers == 1:
                scoring.progress = progress[0].add

            def score_part(part: range) -> Iterator[tuple[pa.Table, dict[str, float]]]:
                scoring.found = dict.fromkeys(FOUND, 0.0)
                try:
                    yield scoring.table(part), scoring.found
                except torch.OutOfMemoryError as error:
                    kept = f"what was scored is kept in {output.name}.parts: set a smaller one"
                    memory = f"batch_size={batch_size} takes more memory than there is ({first_line(error)})"
                    raise InputError(f"{memory}; {kept}") from error

            return score_part

        spec = {
            "images": images_identity(listed),
            "model": fingerprint(model, source.revision),
            "base": None if source.base is None else fingerprint(source.base),
            "run_config": None if run_config is None else fingerprint(run_config),
            "revision": source.revision,
            "trust_remote_code": source.trust_remote_code,
            "published": dataclasses.asdict(source.published or PublishedSettings()),
            "noise": {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(noise).items()},
            "each_level": each_level,
            "max_pixels": max_pixels,
            "exif": exif,
            "dtype": dtype,
        }
        work.join({PARTS: task}, {**spec, "images": images_identity(listed, False), "batch_size": batch_size})
        notes: list[str] = []
        with PartFiles(output, spec, len(listed.rows)) as files:
            if files.finished():
                print(f"{output} is complete already: {len(listed.rows)} images")
            elif parts := files.missing(flush_every):
                require_some(listed)
                speed, found = score_parts(work, files, parts, progress)
                rule = rules[0] if rules else find().image_sizes or own_sizes(find().on_meta_device)
                notes = [speed, *remarks(files, found, rule, (exif or find().exif) == "ignore")]
            if not files.finished():
                files.finish()
    table = read_scores(output)
    print(f"{output}: {summarise(listed, table)}")
    if page is not None:
        start = time.monotonic()
        number = page.write(listed, table, model, exif or find().exif, find().image_sizes)
        notes.append(f"page of {number} images written in {time.monotonic() - start:.1f} s: {gallery}")
    if notes:
        print("; ".join(notes))
    if table["problem"].null_count == 0:
        raise InputError(f"images: none of {len(listed.rows)} can be scored; {output} says why")


def score_parts(
    work: SharedWork, files: PartFiles, parts: Sequence[range], progress: list[Progress]
) -> tuple[str, dict[str, float]]:
    """Score parts of the table, and write each; return a text on the time, and what was found in the images."""
    total = sum(map(len, parts))
    if kept := files.rows - total:
        print(f"{kept} of {files.rows} images were scored before and are kept", flush=True)
    found, begun = dict.fromkeys(FOUND, 0.0), time.monotonic()

    def keep(part: range, result: tuple[pa.Table, dict[str, float]]) -> None:
        files.write(part, result[0])
        found.update({name: value + result[1][name] for name, value in found.items()})
        if work.workers > 1:
            progress[0].add(len(part))

    with Progress("score", files.rows, "images", kept) as shown:
        progress.append(shown)
        work.run(PARTS, None, parts, keep)
    seconds = time.monotonic() - begun
    speed = f"{total / seconds:.1f} images/s, {found['seconds']:.1f} s in the model"
    return f"{total} images scored in {seconds:.1f} s ({speed})", found


def remarks(files: PartFiles, found: Mapping[str, float], rule: ImageSizes | None, ignored: bool) -> Iterator[str]:
    """Yield what users should know of their images: frames left out, shapes cropped (all runs), EXIF orientation."""
    if found["unused"]:
        yield f"{found['unused']:g} frames of clips longer than the training's were not used"
    assert rule is not None  # ListedScoring refuses a model without
    unfitting = 0
    for _, part in files.read():
        sides = zip(part["height"].to_pylist(), part["width"].to_pylist(), strict=True)
        unfitting += sum(height is not None and not rule.fits(height, width) for height, width in sides)
    if unfitting:
        yield f"{unfitting} images have an aspect ratio the model was not trained on: cropped to the nearest"
    if found["rotated"]:
        left = "images have an EXIF orientation, which this model ignores: --exif apply turns them"
        yield f"{found['rotated']:g} {left if ignored else 'images turned upright by their EXIF orientation'}"


def prepared(
    load: Callable[[], RewardModel],
    listed: ImageList,
    noise: NoiseSettings,
    each_level: bool,
    exif: ExifOrientation | None,
    reading: Mapping[str, int],
) -> ListedScoring:
    """Load the model for the list, and print its noise, and what the table will lack."""
    start = time.monotonic()
    model = load()
    model.exif = exif or model.exif
    own = noise.over(model.noise)
    columns = {"score": own}
    if each_level:
        kind, prefix = ("sigmas", "score_sigma") if own.sigmas else ("timesteps", "score_t")
        columns |= {f"{prefix}_{one:g}": dataclasses.replace(own, **{kind: (one,)}) for one in getattr(own, kind)}
    scoring = ListedScoring(model, listed.rows, columns, **reading)
    print(f"model loaded in {time.monotonic() - start:.1f} s; scoring at {own}", flush=True)
    if model.calibration is not None and not model.calibration.fits(own):
        at = model.calibration.noise
        print(f"z_score and quantile are empty: the model is calibrated at {at}, not at {own}")
    return scoring


run = partial(run_function, score, bare=2, classes=False)
