"""A small data set of real JPEGs with every size, and the command line that caches it, in this process or its own."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

from latentreward.apps.cli import main
from latentreward.diffusion.cache.store import IMAGES, PROMPTS
from tests.processes import Forked, run_command

SQUARE, TALL, WIDE, LARGE = (32, 32), (48, 32), (32, 48), (64, 64)
BUCKETS = (SQUARE, TALL, WIDE, LARGE)
SETTINGS = (
    "--reader=latentreward.data.HPDv3Reader",
    "--reader.split=train",
    "--encoder=PipelineEncoders",
    "--encoder.source=sd_tiny",
    "--encoder.batch_size=4",
    f"--images.buckets={json.dumps(BUCKETS)}",
    "--images.min_pixels=256",
    "--images_per_shard=8",
    "--num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
)


def write_image(path: Path, number: int, size: tuple[int, int]) -> None:
    """A JPEG of soft colours, another for each ``number``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((size[1], size[0])).save(path, quality=90)


def write_data(root: Path, pairs: int = 12, sizes: Sequence[tuple[int, int]] = (SQUARE, SQUARE, TALL, WIDE)) -> Path:
    """Pairs of two images of one size; from the fifth pair on, the first image was seen four pairs before."""
    rows = []
    for number in range(pairs):
        names = [f"images/{number}{side}.jpg" for side in "ab"]
        for offset, name in enumerate(names):
            write_image(root / name, 2 * number + offset, sizes[number % len(sizes)])
        if number >= 4:
            names[0] = f"images/{number - 4}a.jpg"  # of the same size, and used once already
        rows.append(row(f"a cat {number // 2}", *names))
    return write_rows(root, rows)


def row(prompt: str, good: str, bad: str) -> dict[str, object]:
    """One row of HPDv3."""
    names = {"path1": good, "path2": bad, "model1": "flux", "model2": "sdxl"}
    return {"prompt": prompt, "choice_dist": [9, 3], "confidence": 0.97, **names}


def write_rows(root: Path, rows: list[dict[str, object]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "train.json").write_text(json.dumps(rows))
    return root


def run_cache(output: Path, root: Path, *settings: str) -> None:
    """``latentreward cache`` in this process."""
    main(cache_arguments(output, root, *settings))


def cache_arguments(output: Path, root: Path, *settings: str) -> list[str]:
    """The command line, after the name of the program."""
    return ["cache", str(output), *SETTINGS, f"--reader.root={root}", *settings]


def start_cache(output: Path, root: Path, *settings: str, setup: str) -> Forked:
    """``latentreward cache`` as a process of its own; ``setup`` are Python lines that it and its ranks run first."""
    folder = output.parent / "setup"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(setup)
    arguments = cache_arguments(output, root, *settings)
    return Forked(_cache_after, [setup, arguments], environment={"PYTHONPATH": str(folder)})


def _cache_after(setup: str, arguments: Sequence[str]) -> None:
    exec(setup, {})
    run_command(arguments)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file, by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a table."""
    return pq.read_table(folder / name).to_pylist()


def stored(cache: Path, kind: str = "latents", tensor: str = "latents") -> list[torch.Tensor]:
    """What a cache holds of each row of the table of images, or of prompts (``kind="text"``)."""
    files = [row["file"] for row in table(cache, IMAGES if kind == "latents" else PROMPTS)]
    rows = {}
    for number in set(files):
        held = load_file(cache / f"{kind}-{number:05d}.safetensors")
        lengths = held.get("prompt_lengths")
        split = (
            held[tensor].split(lengths.tolist()) if tensor == "prompt_embeds" and lengths is not None else held[tensor]
        )
        rows[number] = iter(split)
    return [next(rows[number]) for number in files]
