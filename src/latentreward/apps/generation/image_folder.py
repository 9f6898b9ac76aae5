"""A folder of generated images with a table of prompts, seeds and scores, which the processes of a command fill."""

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageSequence
from torch import Tensor

from latentreward.alignment import Policy, PriorNoise, Sampling
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError, first_line
from latentreward.core.interrupts import interrupts_held
from latentreward.core.reports.drawing import PLAIN, SHOWN_FRAMES, animate, draw_pair, strip, tile, to_images
from latentreward.core.shared_work import SharedWork
from latentreward.core.storage.durable import write_file
from latentreward.core.storage.progress import Progress
from latentreward.core.storage.run_folder import RunFolder
from latentreward.data.alignment.prompt_files import source_files
from latentreward.data.images import image_bytes, png
from latentreward.data.readers.json_rows import parse_json, short

SETTINGS = "generate.json"
COLUMNS = ("file", "prompt", "place", "image", "seed", "score", "mean_score")
NOISE = "noise"
"""Column with the noise that a picture was sampled from, if the network's own path leads from it to the picture."""
SOURCES = "source_images"
"""Column of edits: a JSON list of the pictures that were edited, copied into the folder ``sources``."""
GRID_CELLS = 48
"""Greatest number of images in ``grid.png``."""
GRID_SIDE = 256
"""Longest side of an image in ``grid.png``, in pixels."""

KEPT = "pictures written before are kept: free some space and run it again"
Row = dict[str, Any]
Name = tuple[int, int]
"""Index of a prompt, and number of an image of this prompt, both from 0."""
Made = tuple[Any, Sequence[Row]]
"""Batch of images, and its rows of the table."""


def file_name(place: int, image: int, prompt: str, suffix: str = ".png") -> str:
    """Return a file name that every file system accepts: index of the prompt, number of the image, words of the prompt.

    Only ASCII letters and digits of the prompt are kept, at most 60 characters.
    """
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:60].rstrip("-")
    return "_".join([f"{place:05d}", str(image), *([words] if words else [])]) + suffix


class ImageFolder:
    """A folder of generated images with the table ``images.csv`` or ``images.jsonl``; files are written atomically.

    Images are named by a pair of numbers from 0: ``place``, the index of the prompt, and ``image``, the number of the
    image of this prompt. A folder that an earlier run with equal settings wrote is continued.

    Args:
        folder: Folder; made if it does not exist.
        settings: Settings that the images depend on besides prompts, as plain values; written to ``generate.json``.
        table: Format of the table.
        left_over: Batches that a killed run made but did not add to the table, each with its rows.

    Raises:
        InputError: If the folder holds other files, or images made with other settings; or if the table or the
            settings are damaged.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], table: Literal["csv", "jsonl"], left_over: Sequence[Made] = ()
    ) -> None:
        self.folder, self.table = folder, folder / f"images.{table}"
        self.rows: dict[Name, Row] = {}
        try:
            kept: list[Row] = []
            if self.table.is_file():
                with self.table.open(encoding="utf-8", newline="") as file:
                    kept = list(csv.DictReader(file) if table == "csv" else map(json.loads, file))
            for row in (*kept, *(row for _, rows in left_over for row in rows)):
                if not (isinstance(row["file"], str) and isinstance(row["prompt"], str)):
                    raise TypeError("a row without file and prompt")
                self.rows[int(row["place"]), int(row["image"])] = row
        except (ValueError, LookupError, TypeError, RecursionError, csv.Error) as error:
            raise InputError(
                f"output_dir: {self.table} is damaged ({first_line(error)}); restore it, or choose another output_dir"
            ) from error
        remedy = "choose another output_dir"
        RunFolder(folder, folder / SETTINGS, settings, "output_dir", remedy, KEPT).claim(made=bool(self.rows))
        if left_over:
            self.add(left_over)

    def missing(self, wanted: Sequence[Name], texts: Sequence[str]) -> list[Name]:
        """List the images of ``wanted`` that have not been written; refuse one that was made for another prompt.

        ``texts`` are the prompts by their index.
        """
        found = []
        for place, image in wanted:
            row = self.rows.get((place, image))
            if row is None or not (self.folder / row["file"]).is_file():
                found.append((place, image))
            elif row["prompt"] != str(texts[place]) or not self._edits(row, texts[place]):
                raise InputError(
                    f"output_dir: {self.folder / row['file']} shows {row['prompt']!r}, not {texts[place]!r}, which is "
                    "there now; choose another output_dir"
                )
        return found

    def _sources(self, row: Row) -> list[str]:
        """Return the names of the copies of the pictures that an image was made of."""
        told = row.get(SOURCES) or "[]"
        found = parse_json(told, None) if isinstance(told, str) else None
        if not isinstance(found, list):
            raise InputError(
                f"output_dir: {self.table} is damaged ({SOURCES} of {row['file']} is {short(told)}, no JSON list); "
                "restore it, or choose another output_dir"
            )
        return found

    def _edits(self, row: Row, prompt: str) -> bool:
        """Tell whether an image was made of the pictures that a prompt edits, by their copies."""
        files = source_files(int(row["place"]), prompt)
        if self._sources(row) != [*files]:
            return False
        copies = [(self.folder / name, image) for name, image in files.items()]
        return all(copy.is_file() and copy.read_bytes() == image_bytes(image) for copy, image in copies)

    @interrupts_held()
    def add(self, made: Sequence[Made]) -> None:
        """Add batches with their rows, as :func:`write_images` returns them, and write the table."""
        self.rows |= {(row["place"], row["image"]): row for _, rows in made for row in rows}
        rows, text = [self.rows[name] for name in sorted(self.rows)], io.StringIO(newline="")
        if self.table.suffix == ".jsonl":
            text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            more = [name for name in (NOISE, SOURCES) if any(name in row for row in rows)]
            writer = csv.DictWriter(text, [*COLUMNS, *more])
            writer.writeheader()
            writer.writerows(rows)
        write_file(self.table, text.getvalue().encode(), KEPT)

    def write_grid(self, names: Sequence[Name]) -> None:
        """Write ``grid.png`` with the first :data:`GRID_CELLS` images of ``names``; of clips, some frames."""
        cells = []
        for row in [self.rows[name] for name in names[:GRID_CELLS]]:
            picture: Image.Image = Image.open(self.folder / row["file"])
            width = GRID_SIDE
            if getattr(picture, "n_frames", 1) > 1:
                frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
                picture, width = strip(frames), SHOWN_FRAMES * GRID_SIDE
            picture.thumbnail((width, GRID_SIDE))
            score = "" if row.get("score") in (None, "") else f"{float(row['score']):.3f}"
            pictures = [Image.open(self.folder / name) for name in self._sources(row)]
            for source in pictures:
                source.thumbnail((GRID_SIDE, GRID_SIDE))
            captions = [*("source" for _ in pictures), score]
            cells.append(draw_pair([*pictures, picture], captions, row["prompt"], PLAIN))
        write_file(self.folder / "grid.png", png(tile(cells, math.ceil(math.sqrt(len(cells))))), KEPT)

    def summary(self, names: Sequence[Name]) -> str:
        """Return one line for the terminal: the folder, the number of images and their mean score."""
        scores = [float(self.rows[name]["score"]) for name in names if self.rows[name].get("score") not in (None, "")]
        mean = f"; mean score {sum(scores) / len(scores):.4f}" if scores else ""
        return f"{self.folder}: {len(names)} pictures{mean}"


@interrupts_held()
def write_images(
    folder: Path,
    names: Sequence[Name],
    prompts: Sequence[str],
    pixels: torch.Tensor,
    scores: torch.Tensor | None,
    seed: int,
) -> list[Row]:
    """Write B images as PNG files, or B clips as animated WebP without loss, and return their rows of the table.

    ``names`` holds the index of the prompt and the number of each image. ``pixels`` are ``(B, 3, H, W)``, or
    ``(B, 3, F, H, W)`` for clips, in [-1, 1]. ``scores`` ``(N, B)`` are those of the N samples from which each image
    was chosen as the best, if any.
    """
    rows: list[Row] = []
    for column, ((place, image), prompt) in enumerate(zip(names, prompts, strict=True)):
        frames, clip = to_images(pixels[column]), pixels.ndim == 5
        name = file_name(place, image, prompt, ".webp" if clip else ".png")
        write_file(folder / name, animate(frames, lossless=True) if clip else png(frames[0]), KEPT)
        row: Row = {"file": name, "prompt": str(prompt), "place": place, "image": image, "seed": seed}
        if sources := source_files(place, prompt):
            for copy, source in sources.items():
                write_file(folder / copy, image_bytes(source), KEPT)
            row[SOURCES] = json.dumps([*sources])
        if scores is not None:
            row |= {"score": scores[:, column].max().item(), "mean_score": scores[:, column].mean().item()}
        rows.append(row)
    return rows


DETERMINISTIC = Sampling(eta=0.0, noise_level=0.0)
"""Sampling settings without noise in the steps, for DDIM and for flow matching."""


def write_batch(
    folder: Path,
    draw: Callable[[PromptBatch], tuple[Tensor, Tensor | None]],
    decode: Callable[[Tensor], Tensor],
    seed: int,
    batch: Sequence[Sequence[Any]],
    key: Callable[[int, int], str] = "{}/{}".format,
    with_noise: bool = False,
) -> list[Row]:
    """Sample, decode and write one batch of images; return their rows of the table.

    Args:
        folder: Folder that gets the images.
        draw: Function from B prompts to latents ``(B, C, ...)``, and scores ``(N, B)`` of N samples per prompt or None.
        decode: Function from latents to pixels in [-1, 1] on the CPU, see :func:`write_images`.
        seed: Seed written to the table.
        batch: Images as [index of the prompt, number of the image, prompt].
        key: Function from index of the prompt and number of the image to the key that seeds the noise of this image.
        with_noise: Whether the table tells the noise that each image was sampled from.
    """
    names = [(place, image) for place, image, _ in batch]
    prompts = PromptBatch(tuple(prompt for _, _, prompt in batch), tuple(starmap(key, names)))
    latents, scores = draw(prompts)
    rows = write_images(folder, names, prompts.prompts, decode(latents), scores, seed)
    if with_noise:
        # The chosen one of N samples, by the name that `best_of_n` draws it under.
        ends = [""] * len(rows) if scores is None else [f"/{number}" for number in scores.argmax(dim=0).tolist()]
        for row, start, end in zip(rows, prompts.keys, ends, strict=True):
            row[NOISE] = str(PriorNoise(seed, start + end, tuple(latents.shape[1:])))
    return rows


def make_pictures(
    work: SharedWork, task: str, folder: ImageFolder, wanted: Sequence[Name], texts: Sequence[str], batch_size: int
) -> None:
    """Let the processes of a command make the missing ones of the ``wanted`` images, and add them to the folder.

    Wanted images are cut into batches, and then those that are there are left out: a run that goes on samples a batch
    together with the images that a run without a stop would sample it with, to the last bit. ``texts`` are the prompts
    by their index; the task is a :func:`write_batch`.
    """
    left = {*folder.missing(wanted, texts)}
    cut = (wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size))
    batches = ([[place, image, texts[place]] for place, image in batch if (place, image) in left] for batch in cut)
    with Progress(folder.folder.name, len(left), "pictures", processes=work.size) as progress:
        work.run(task, [batch for batch in batches if batch], folder.add, lambda batch: progress.add(len(batch)))


def decode_latents(policy: Policy, latents: Tensor) -> Tensor:
    """Decode latents to pixels ``(B, 3, H, W)``, or ``(B, 3, F, H, W)`` for clips, in [-1, 1] on the CPU."""
    if policy.vae is None:
        raise InputError(f"{policy.source} has no VAE to decode with")
    return policy.vae.decode(latents).cpu()
