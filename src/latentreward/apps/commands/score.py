"""``latentreward score``: score a folder or list of images, and write a table and optionally an HTML page."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from latentreward.data.images import MAX_PIXELS, ExifOrientation
from latentreward.reward import ModelSource, PublishedSettings, RewardModel
from latentreward.reward.scoring.image_lists import ListedScoring, images_identity, read_scores, require_some, summarise
from latentreward.reward.scoring.layouts.base import StoredReward
from latentreward.reward.scoring.layouts.find import find_reward, fingerprint
from latentreward.reward.scoring.network import own_sizes
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
        flush_every: Images per part of the table: a killed process loses at most one part. Ctrl-C loses no score of a
            single process; each of several workers loses at most one part.
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
    page = None
    if gallery is not None:
        from latentreward.reward.scoring.gallery import Gallery

        page = Gallery(gallery, gallery_images, decode_threads, max_pixels)
    with SharedWork(command, workers, device, gpus_per_worker) as work:
        source = ModelSource(model, config=run_config, **loading)
        listed = read_images(images, prompt, image_column, prompt_column, allow_outside, max_prompt_chars)
        load = partial(RewardModel.from_pretrained, source, device=work.device, dtype=getattr(torch, dtype))
        reading = {"batch_size": batch_size, "decode_threads": decode_threads, "max_pixels": max_pixels}
        scoring = PartScoring(
            output, listed, partial(_scoring, load, listed, noise, each_level, exif, reading), workers
        )
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
        work.join({PARTS: scoring.task}, {**spec, "images": images_identity(listed, False), "batch_size": batch_size})
        files = PartFiles(output, spec, len(listed.rows))
        find = cache(partial(find_reward, source))
        notes: list[str] = []
        with files:
            if files.finished():
                print(f"{output} is complete already: {len(listed.rows)} images")
            else:
                if parts := files.missing(flush_every):
                    notes = scoring.score(work, files, parts, exif, find)
                files.finish()
    table = read_scores(output)
    print(f"{output}: {summarise(listed, table)}")
    if page is not None:
        start = time.monotonic()
        shown = page.write(listed, table, model, exif or find().exif, find().image_sizes)
        notes.append(f"page of {shown} images written in {time.monotonic() - start:.1f} s: {gallery}")
    if notes:
        print("; ".join(notes))
    if table["problem"].null_count == 0:
        raise InputError(f"images: none of {len(listed.rows)} can be scored; {output} says why")


@dataclass
class PartScoring:
    """Scoring of the missing parts of a table by one or several processes."""

    output: Path  # table to write
    listed: ImageList  # images to score
    load: Callable[[], ListedScoring]  # function that loads the model
    workers: int
    # What the processes found in the images so far: ``rotated``, ``unused`` and the model's ``seconds``
    found: dict[str, float] = field(default_factory=dict)
    model: RewardModel | None = None  # model of this process, once it has scored a part

    def score(
        self,
        work: SharedWork,
        files: PartFiles,
        parts: Sequence[range],
        exif: ExifOrientation | None,
        find: Callable[[], StoredReward],
    ) -> list[str]:
        """Score the given parts; return remarks on time and clips, and on images' shapes (all runs) and EXIF."""
        require_some(self.listed)
        total = sum(map(len, parts))
        if kept := files.rows - total:
            print(f"{kept} of {files.rows} images were scored before and are kept", flush=True)

        def keep(part: range, result: tuple[range, pa.Table, dict[str, float]]) -> None:
            rows, scores, found = result
            files.write(rows, scores)
            for name, value in found.items():
                self.found[name] = self.found.get(name, 0) + value
            if self.workers > 1:
                self._progress.add(len(rows))

        self._begun = time.monotonic()
        with Progress("score", files.rows, "images", kept) as self._progress:
            work.run(PARTS, None, parts, keep)
        seconds = time.monotonic() - self._begun
        speed = f"{total / seconds:.1f} images/s, {self.found['seconds']:.1f} s in the model"
        notes = [f"{total} images scored in {seconds:.1f} s ({speed})"]
        if self.found["unused"]:
            notes.append(f"{self.found['unused']} frames of clips longer than the training's were not used")
        read = self.model or find()  # of many processes the first may have come too late for a part
        rule = read.image_sizes or own_sizes(find().on_meta_device)  # the model's own, if its files record none
        assert rule is not None  # ListedScoring refuses a model without
        unfitting = 0
        for _, part in files.read():
            sides = zip(part["height"].to_pylist(), part["width"].to_pylist(), strict=True)
            unfitting += sum(height is not None and not rule.fits(height, width) for height, width in sides)
        if unfitting:
            notes.append(
                f"{unfitting} images have an aspect ratio the model was not trained on: cropped to the nearest"
            )
        if self.found["rotated"]:
            ignored = "images have an EXIF orientation, which this model ignores: --exif apply turns them"
            turned = "images turned upright by their EXIF orientation"
            notes.append(f"{self.found['rotated']} {ignored if (exif or read.exif) == 'ignore' else turned}")
        return notes

    def task(self, given: None) -> Callable[[range], Iterator[tuple[range, pa.Table, dict[str, float]]]]:
        """Load the model, and return the function that scores a part of the table.

        It yields ranges of rows with their tables, and what was found in their images. After a Ctrl-C it yields what is
        finished of the part.
        """
        scoring = self.load()
        self.model, self._begun = scoring.model, time.monotonic()
        if self.workers == 1:
            scoring.progress = self._progress.add

        def score_part(part: range) -> Iterator[tuple[range, pa.Table, dict[str, float]]]:
            try:
                for rows, table in scoring.tables([part]):
                    found = {"seconds": scoring.seconds, "rotated": scoring.rotated, "unused": scoring.unused}
                    scoring.seconds, scoring.rotated, scoring.unused = 0.0, 0, 0
                    yield rows, table, found
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"batch_size={scoring.batch_size} takes more memory than there is ({first_line(error)}); what was "
                    f"scored is kept in {self.output.name}.parts: set a smaller one"
                ) from error

        return score_part


def _scoring(
    load: Callable[[], RewardModel],
    listed: ImageList,
    noise: NoiseSettings,
    each_level: bool,
    exif: ExifOrientation | None,
    reading: Mapping[str, int],
) -> ListedScoring:
    """Load the model, and print its noise, and what the table will lack."""
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
