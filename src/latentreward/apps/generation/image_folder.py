"""A folder of generated images with a table of prompts, seeds and scores, which the processes of a command fill."""

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence
from torch import Tensor

from latentreward.alignment import Policy, PriorNoise, Sampling
from latentreward.apps.generation.search import Chosen
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError, first_line
from latentreward.core.interrupts import interrupts_held
from latentreward.core.reports.drawing import PLAIN, SHOWN_FRAMES, animate, draw_pair, strip, tile, to_images
from latentreward.core.storage.durable import write_file
from latentreward.core.storage.progress import Progress
from latentreward.core.storage.run_folder import RunFolder
from latentreward.core.workers import SharedWork
from latentreward.data.alignment.prompt_files import source_files
from latentreward.data.images import image_bytes, png
from latentreward.data.readers.json_rows import parse_json, short

TABLE, SETTINGS = "images.csv", "generate.json"
NOISE = "noise"
"""Column with the noise that a picture was sampled from, if the network's own path leads from it to the picture."""
SOURCES = "source_images"
"""Column of edits: a JSON list of the pictures that were edited, copied into the folder ``sources``."""
COLUMNS = ("file", "prompt", "place", "image", "seed", "score", "mean_score")
GRID_CELLS, GRID_SIDE = 48, 256
"""Greatest number of images in ``grid.png``, and longest side of an image there, in pixels."""
KEPT = "pictures written before are kept: free some space and run it again"
Row = dict[str, Any]
Name = tuple[int, int]
"""Index of a prompt, and number of an image of this prompt, both from 0."""
Made = tuple[Row, Mapping[str, bytes]]
"""Row of the table of an image, and its files: name in the folder → content."""


def file_name(place: int, image: int, prompt: str, suffix: str = ".png") -> str:
    """Return a file name that every file system accepts: index of the prompt, number of the image, words of the prompt.

    Only ASCII letters and digits of the prompt are kept, at most 60 characters.
    """
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:60].rstrip("-")
    return "_".join([f"{place:05d}", str(image), *([words] if words else [])]) + suffix


class ImageFolder:
    """A folder of generated images with the table ``images.csv``; files are written atomically.

    Images are named by a pair of numbers from 0: ``place``, the index of the prompt, and ``image``, the number of the
    image of this prompt. A folder that an earlier run with equal ``settings`` (plain values that the images depend on
    besides prompts, kept in ``generate.json``) wrote is continued. One that holds other files or is damaged is refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.table = folder, folder / TABLE
        self.rows: dict[Name, Row] = {}
        if self.table.is_file():
            try:
                with self.table.open(encoding="utf-8", newline="") as file:
                    reader = csv.DictReader(file, strict=True)
                    if not {*COLUMNS} <= {*(reader.fieldnames or COLUMNS)}:
                        raise ValueError("its first line does not name the columns")
                    self.rows = {(int(row["place"]), int(row["image"])): row for row in reader}
            except (ValueError, TypeError, csv.Error) as error:
                raise self._damaged(first_line(error)) from error
        remedy = "choose another output_dir"
        RunFolder(folder, folder / SETTINGS, settings, "output_dir", remedy, KEPT).claim(made=bool(self.rows))

    def _damaged(self, reason: str) -> InputError:
        remedy = "restore it, or choose another output_dir"
        return InputError(f"output_dir: {self.table} is damaged ({reason}); {remedy}")

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
        found = parse_json(told, None)
        if not isinstance(found, list):
            raise self._damaged(f"{SOURCES} of {row['file']} is {short(told)}, no JSON list")
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
        """Write the files of images, as :func:`draw_images` makes them, and then the table with their rows."""
        for row, files in made:
            for name, content in files.items():
                write_file(self.folder / name, content, KEPT)
            self.rows[row["place"], row["image"]] = row
        rows, text = [self.rows[name] for name in sorted(self.rows)], io.StringIO(newline="")
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
            score = f"{float(row['score']):.3f}" if row.get("score") else ""
            pictures = [Image.open(self.folder / name) for name in self._sources(row)]
            for source in pictures:
                source.thumbnail((GRID_SIDE, GRID_SIDE))
            captions = [*("source" for _ in pictures), score]
            cells.append(draw_pair([*pictures, picture], captions, row["prompt"], PLAIN))
        write_file(self.folder / "grid.png", png(tile(cells, math.ceil(math.sqrt(len(cells))))), KEPT)

    def summary(self, names: Sequence[Name]) -> str:
        """Return one line for the terminal: the folder, the number of images and their mean score."""
        scores = [float(score) for name in names if (score := self.rows[name].get("score"))]
        mean = f"; mean score {sum(scores) / len(scores):.4f}" if scores else ""
        return f"{self.folder}: {len(names)} pictures{mean}"


def draw_images(
    names: Sequence[Name], prompts: Sequence[str], pixels: Tensor, scores: Tensor | None, seed: int
) -> list[Made]:
    """Encode B images as PNG, or B clips as animated WebP without loss; return their rows of the table and files.

    ``pixels`` are ``(B, 3, H, W)``, or ``(B, 3, F, H, W)`` for clips, in [-1, 1]. ``scores`` ``(N, B)`` are those of
    the N samples from which each image was chosen as the best, if any.
    """
    made: list[Made] = []
    for column, ((place, image), prompt) in enumerate(zip(names, prompts, strict=True)):
        frames, clip = to_images(pixels[column]), pixels.ndim == 5
        name = file_name(place, image, prompt, ".webp" if clip else ".png")
        files = {name: animate(frames, lossless=True) if clip else png(frames[0])}
        row: Row = {"file": name, "prompt": str(prompt), "place": place, "image": image, "seed": seed}
        if sources := source_files(place, prompt):
            files |= {copy: image_bytes(source) for copy, source in sources.items()}
            row[SOURCES] = json.dumps([*sources])
        if scores is not None:  # as text, since a score of 0 is one too
            best, mean = scores[:, column].max().item(), scores[:, column].mean().item()
            row |= {"score": str(best), "mean_score": str(mean)}
        made.append((row, files))
    return made


DETERMINISTIC = Sampling(eta=0.0, noise_level=0.0)
"""Sampling settings without noise in the steps, for DDIM and for flow matching."""


def draw_batch(
    draw: Callable[[PromptBatch], Chosen],
    decode: Callable[[Tensor], Tensor],
    seed: int,
    batch: Sequence[Sequence[Any]],
    with_noise: bool = False,
) -> Iterator[list[Made]]:
    """Sample and decode one batch of images; yield their rows of the table and files.

    Args:
        draw: Function that samples finished latents of B prompts.
        decode: Function from latents to pixels in [-1, 1] on the CPU, see :func:`draw_images`.
        seed: Seed written to the table.
        batch: Images as [index of the prompt, number of the image, prompt].
        with_noise: Whether the table tells the noise that each image was sampled from.
    """
    names = [(place, image) for place, image, _ in batch]
    prompts = PromptBatch(tuple(prompt for _, _, prompt in batch), tuple(f"{place}/{image}" for place, image in names))
    latents, drawn, scores = draw(prompts)
    made = draw_images(names, prompts.prompts, decode(latents), scores, seed)
    if with_noise:
        for (row, _), key in zip(made, drawn.keys, strict=True):
            row[NOISE] = str(PriorNoise(seed, key, tuple(latents.shape[1:])))
    yield made


def fitting_batch(latent_shape: tuple[int, ...], device: torch.device) -> int:
    """Return how many samples to draw at once: small latents fill a processor only by many, large ones its memory.

    On a processor they are as many as have 32,768 latent pixels, 1 to 64: 8 of SD1.5 at 512 × 512. An accelerator takes
    at least 8.
    """
    fitting = 32_768 // math.prod((*latent_shape[-2:], *latent_shape[1:-2]))
    return min(max(fitting, 1 if device.type == "cpu" else 8), 64)


def make_pictures(
    work: SharedWork, task: str, folder: ImageFolder, wanted: Sequence[Name], texts: Sequence[str], batch_size: int
) -> None:
    """Make the missing ones of the ``wanted`` images, by all workers, and add them to the folder.

    Wanted images are cut into batches, and then those that are there are left out: a run that goes on samples a batch
    together with the images that a run without a stop would sample it with, to the last bit. ``texts`` are the prompts
    by their index; the task takes the prompts of all missing images, and returns a :func:`draw_batch`.
    """
    left = {*folder.missing(wanted, texts)}
    cut = (wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size))
    batches = ([[place, image, texts[place]] for place, image in batch if (place, image) in left] for batch in cut)
    with Progress(folder.folder.name, len(left), "pictures") as progress:

        def keep(batch: Sequence[Any], made: list[Made]) -> None:
            folder.add(made)
            progress.add(len(batch))

        work.run(task, [texts[place] for place, _ in sorted(left)], [batch for batch in batches if batch], keep)


def decode_latents(policy: Policy, latents: Tensor) -> Tensor:
    """Decode latents to pixels ``(B, 3, H, W)``, or ``(B, 3, F, H, W)`` for clips, in [-1, 1] on the CPU."""
    if policy.vae is None:
        raise InputError(f"{policy.source} has no VAE to decode with")
    return policy.vae.decode(latents).cpu()
