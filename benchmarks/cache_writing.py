"""Measure the cost of writing a cache against the bare VAE, and its growth with the number of pairs.

    python benchmarks/cache_writing.py [encode] [scale]

``encode``  encode JPEGs to latents, against the same VAE on pixels in memory
``scale``   write 1k, 10k and 100k pairs of given 4 KiB latents: seconds, memory

``encode`` uses a VAE of channels (64, 128, 256) on images of 128 × 128; the goal is at most 1.15 times the bare encode.
Times cover the loop over batches up to the last file, without imports and loading. ``scale`` runs each size in its
own process.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import MIB, Goal, Spread, ratio, table
from memory import PeakMemory
from PIL import Image

from latentreward.apps.commands.cache import ENCODE
from latentreward.core.contracts import ImageRef, LatentSpace, PreferencePair
from latentreward.core.shared_work import SharedWork
from latentreward.data import PairReader
from latentreward.diffusion.backbones.loading import tiny_pipeline
from latentreward.diffusion.cache.sources import ImageSettings, LatentSource, PipelineEncoders, PublishedLatents
from latentreward.diffusion.cache.store import CacheSpec
from latentreward.diffusion.cache.writing import Encoding, prepare_cache

SIDE = 128
BATCH = 8
SPACE = LatentSpace(channels=8, downscale=8, scaling_factor=1.0)
LATENTS = (8, 16, 16)
"""Shape of a latent: 2,048 numbers, which are 4 KiB in 16 bits."""


class DrawnPairs(PairReader):
    """Reader of pairs of random JPEGs in memory: smooth colours with a little noise."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.images = [draw_jpeg(number) for number in range(2 * pairs)]

    def __len__(self) -> int:
        return len(self.images) // 2

    def __getitem__(self, index: int) -> PreferencePair:
        sides = (ImageRef(f"image{2 * index + side}", self.images[2 * index + side]) for side in (0, 1))
        return PreferencePair(f"pair{index}", f"prompt {index}", *sides, label_a=1.0)


class ReadyLatents(PairReader):
    """Reader of pairs of random latents that take almost no time to generate."""

    holds = "latents"

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.pairs = pairs
        self.values = np.random.default_rng(0).normal(size=2 * np.prod(LATENTS)).astype(np.float16)

    def __len__(self) -> int:
        return self.pairs

    def __getitem__(self, index: int) -> PreferencePair:
        sides = (self._latents(2 * index + side) for side in (0, 1))
        return PreferencePair(f"pair{index}", f"prompt {index}", *sides, label_a=1.0)

    def _latents(self, number: int) -> ImageRef:
        start = number % np.prod(LATENTS)
        stream = io.BytesIO()
        np.save(stream, self.values[start : start + np.prod(LATENTS)].reshape(LATENTS))
        return ImageRef(f"image{number}", stream.getvalue(), holds="latents")


def draw_jpeg(number: int) -> bytes:
    """Return a JPEG of ``SIDE`` × ``SIDE`` pixels, about 10 kB."""
    draw = np.random.default_rng(number)
    colours = Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((SIDE, SIDE))
    noisy = np.asarray(colours).astype(int) + draw.integers(-12, 12, (SIDE, SIDE, 3))
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def write_pipeline(folder: Path) -> Path:
    """Write a pipeline folder with a mid-size VAE of random weights; only the network's config is used."""
    from diffusers import AutoencoderKL

    shutil.copytree(tiny_pipeline("sd_tiny"), folder)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(64, 128, 256),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        sample_size=SIDE,
    )
    for path in (folder / "vae").iterdir():
        path.unlink()
    vae.save_pretrained(folder / "vae")
    return folder


def now() -> np.ndarray:
    """Return wall time and this process's processor time, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def write_cache(output: Path, reader: PairReader, encoder: LatentSource, workers: int) -> np.ndarray:
    """Write a cache, and return wall and processor seconds from the first batch's fetch to the last file."""
    encoders, images = encoder.load(), ImageSettings(size=SIDE, resize="stretch")
    known = encoders.space, encoders.vae_fingerprint, encoders.text_spec
    ran = encoder.origin, encoder.vae_dtype, encoder.posterior, encoder.batch_size
    spec = CacheSpec(*known, *ran, images, "float16")
    output.mkdir()
    with SharedWork(None, "cpu", output / ".shards") as work:
        work.join({ENCODE: Encoding(output, reader, encoders, workers, work).task}, {})
        todo = prepare_cache(output, reader, spec, encoder, encoders, workers)
        begun = now()
        work.run(ENCODE, todo, lambda results: None)
        return now() - begun


def run_encode(pairs: int, workers: int, repeats: int) -> Iterator[list[Any]]:
    """Run the bare encode and caching in turn; yield a row in wall time and one in processor time."""
    reader = DrawnPairs(pairs)
    with tempfile.TemporaryDirectory() as folder:
        encoder = PipelineEncoders(str(write_pipeline(Path(folder) / "pipeline")), batch_size=BATCH)
        vae = encoder.load().vae
        assert vae is not None
        pixels = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1
        noise = torch.randn(BATCH, *vae.latent_shape(pixels))
        vae.encode(pixels, noise)
        bare, cached = [], []
        for repeat in range(repeats):
            begun = now()
            for _ in range(2 * pairs // BATCH):
                vae.encode(pixels, noise)
            bare.append(now() - begun)
            cached.append(write_cache(Path(folder) / f"cache{repeat}", reader, encoder, workers))
    for name, ours, theirs in zip(
        ("wall", "processor"), *(np.transpose(times).tolist() for times in (cached, bare)), strict=True
    ):
        found = ratio(ours, theirs)
        yield [name, Spread(theirs), Spread(ours), found, Goal(found.median, most=1.15)]


def run_scale(sizes: list[int]) -> Iterator[list[Any]]:
    """Yield a row for each number of pairs, measured in a process of its own."""
    for pairs in sizes:
        command = [sys.executable, __file__, "one", f"--pairs={pairs}"]
        yield json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def run_one(pairs: int) -> None:
    """Plan and write a cache of given latents, and print one row as JSON."""
    reader = ReadyLatents(pairs)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "cache"
        with PeakMemory() as memory:
            begun = time.perf_counter()
            write_cache(output, reader, PublishedLatents(SPACE, batch_size=64), workers=0)
            seconds = time.perf_counter() - begun
        written = sum(path.stat().st_size for path in output.rglob("*.safetensors")) / MIB
    peak = (memory.peak - memory.before) / MIB
    row = (f"{pairs:,}", f"{seconds:.1f}", f"{1000 * seconds / pairs:.2f}", f"{peak:.0f}", f"{written:.0f}")
    print(json.dumps(row), flush=True)


def main() -> None:
    """Parse the command line and run the chosen measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["encode", "scale"], help="'one' prints a row of 'scale'")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.parts == ["one"]:
        run_one(options.pairs)
    if "encode" in options.parts:
        title = f"{2 * options.pairs} JPEGs through a VAE, {options.workers} workers"
        columns = ("time", "bare encode, s", "`latentreward cache`, s", "ratio", "goal")
        table(title, columns, run_encode(options.pairs, options.workers, options.repeats))
    if "scale" in options.parts:
        columns = ("pairs", "seconds", "seconds per 1k pairs", "memory beyond the imports, MiB", "MiB written")
        table("Writing given latents of 4 KiB", columns, run_scale(options.sizes))


if __name__ == "__main__":
    main()
