"""Measure the loading of cached latents, against other stores of the same pairs, and of images; prints Markdown tables.

Usage: ``python benchmarks/loading.py [compare] [scale] [wait] [tiny] [rows] [--repeats 5] [--folder DIR]``. By default
all parts run, which takes about ten minutes and 4 GB below the folder. ``compare``: pairs per second of this project's
cache, of ``datasets`` (Arrow, binary columns), and of DiNa-LRM's released loader (parquet, zstd, reopens a file for
each row), at 64 and 512 KiB per latent, with files in the page cache; the released loader is that of a clone in the
folder ``--released``, or a reader that is written here after it. ``scale``: 1 000 to 100 000
pairs of 4 KiB latents. ``wait``: share of a tiny model's training time that is spent waiting for data. ``tiny``: share
of data in the CPU time of a training step of ``configs/model/lrm_tiny.yaml`` on the tiny world's pictures. ``rows``:
CPU time and memory of opening JSON lines and of planning an epoch, at 100 000 and 1 000 000 pairs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import BytesIO, StringIO
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import disable_progress_bars
from measuring import MIB, Goal, Spread, ratio, table
from memory import PeakMemory, proportional
from pyarrow import parquet
from released import add_released, heading
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from latentreward.core.contracts import LatentSpace, PreferenceBatch
from latentreward.diffusion import CachedPreferenceDataModule, CachedSplit
from latentreward.diffusion.cache.sources import ImageSettings
from latentreward.diffusion.cache.store import IMAGES, PAIRS, PROMPTS, SPEC, CachePlan, CacheSpec
from latentreward.diffusion.cache.writing import SCHEMAS

SHAPES = {4: (16, 8, 16), 64: (16, 32, 64), 512: (16, 128, 128)}
"""Size of a float16 latent in KiB → its shape."""
PAIRS_OF = {64: 4000, 512: 500}
BATCH = 16
PER_SHARD = 256
ROW_GROUP = 100
SPACE = LatentSpace(channels=16, downscale=8, scaling_factor=1.5305, shift_factor=0.0609)


def latents_of(start: int, count: int, shape: Sequence[int]) -> np.ndarray:
    """Return random normal float16 latents of images ``start``, ``start`` + 1, …; each is a slice of one long array."""
    size = int(np.prod(shape))
    pool = np.random.default_rng(0).standard_normal(size + 65_537, dtype=np.float32).astype(np.float16)
    return np.stack([pool[n * 7919 % 65_537 :][:size].reshape(shape) for n in range(start, start + count)])


def write_cache(folder: Path, pairs: int, shape: Sequence[int], space: LatentSpace = SPACE) -> Path:
    """Write pairs in this project's cache layout; pair n has the images 2n and 2n + 1."""
    size, number = (shape[1] * space.downscale, shape[2] * space.downscale), np.arange(2 * pairs)
    images = ImageSettings(size=size)
    spec = CacheSpec(space, None, None, "vae", None, None, 8, images, "float16", images_per_shard=PER_SHARD)
    tables: dict[str, dict[str, Any]] = {
        PAIRS: {
            "pair_id": [f"pair{n:08d}" for n in range(pairs)],
            "prompt": np.zeros(pairs, int),
            "image_a": number[::2],
            "image_b": number[1::2],
            "label_a": np.ones(pairs),
            "weight": np.ones(pairs),
            "split": ["train"] * pairs,
            "source_images": [[]] * pairs,
        },
        IMAGES: {
            "image_key": [f"image{n:08d}" for n in number],
            "height": np.full(2 * pairs, size[0]),
            "width": np.full(2 * pairs, size[1]),
            "file": number // PER_SHARD,
        },
        PROMPTS: {"prompt": ["a red cube"]},
    }
    folder.mkdir(parents=True)
    hashes = {}
    for name, columns in tables.items():
        rows = len(next(iter(columns.values())))
        arrays = [pa.array(columns.get(column, [None] * rows), kind) for column, kind in SCHEMAS[name].items()]
        parquet.write_table(pa.table(arrays, [*SCHEMAS[name]]), folder / name)
        hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    plan = CachePlan(spec, {"reader": "benchmark", "rows": pairs}, hashes, pairs, 2 * pairs, 1)
    (folder / SPEC).write_text(plan.to_json())
    record = {"cache": json.dumps({"plan": plan.name, "unread": {}, "sha256": ""})}
    for file, start in enumerate(range(0, 2 * pairs, PER_SHARD)):
        latents = torch.from_numpy(latents_of(start, min(PER_SHARD, 2 * pairs - start), shape))
        save_file({"latents": latents}, folder / f"latents-{file:05d}.safetensors", record)
    return folder


def cache_loader(folder: Path, workers: int) -> DataLoader[Any]:
    """Return the training loader of a cache."""
    data = CachedPreferenceDataModule(train=CachedSplit(str(folder)), batch_size=BATCH, num_workers=workers)
    return data.train_dataloader()


def write_arrow(folder: Path, pairs: int, shape: Sequence[int]) -> Path:
    """Write pairs in the Arrow files of ``datasets``: one row per pair, latents as bytes."""
    from datasets import Dataset as ArrowDataset

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, pairs, 128):
            count = min(128, pairs - start)
            latents = latents_of(2 * start, 2 * count, shape)
            for n in range(count):
                chosen, rejected = latents[2 * n].tobytes(), latents[2 * n + 1].tobytes()
                names = {"pair_id": f"pair{start + n:08d}", "prompt": "a red cube", "label": 1.0}
                yield {**names, "chosen": chosen, "rejected": rejected}

    ArrowDataset.from_generator(rows, cache_dir=str(folder) + "_cache").save_to_disk(str(folder))
    shutil.rmtree(str(folder) + "_cache")
    return folder


class ArrowPairs(Dataset[Any]):
    """Dataset on Arrow files that reads a batch of rows at once, and stacks views of the latents' bytes."""

    def __init__(self, folder: Path, shape: Sequence[int]) -> None:
        from datasets import load_from_disk

        self.rows, self.shape = load_from_disk(str(folder)), shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = self.rows[list(indices)]
        columns: dict[str, Any] = {"pair_id": rows["pair_id"], "prompt": rows["prompt"]}
        columns["label"] = torch.tensor(rows["label"])
        for side in ("chosen", "rejected"):
            latents = [np.frombuffer(value, np.float16).reshape(self.shape) for value in rows[side]]
            columns[side] = torch.from_numpy(np.stack(latents))
        return columns


def write_diffusion_rm(folder: Path, pairs: int, shape: Sequence[int]) -> Path:
    """Write pairs like the released cache: parquet, float32 bytes of ``np.save``, row groups of 100 rows, zstd."""
    folder.mkdir()
    schema = pa.schema({"prompt": pa.string(), "latent1": pa.binary(), "latent2": pa.binary()})
    with parquet.ParquetWriter(folder / "part_rank00.parquet", schema, compression="zstd") as writer:
        for start in range(0, pairs, ROW_GROUP):
            count = min(ROW_GROUP, pairs - start)
            latents = [saved(latent.astype(np.float32)) for latent in latents_of(2 * start, 2 * count, shape)]
            columns = {"prompt": ["a red cube"] * count, "latent1": latents[::2], "latent2": latents[1::2]}
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)
    return folder


def saved(array: np.ndarray) -> bytes:
    """Return the bytes that ``np.save`` writes for an array."""
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


class ReopenedParquet(Dataset[Any]):
    """Dataset that opens a file and reads a row group for each row, like the released reader."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self.path, self.pairs = folder / "part_rank00.parquet", pairs

    def __len__(self) -> int:
        return self.pairs

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, row = divmod(index, ROW_GROUP)
        rows = parquet.ParquetFile(self.path).read_row_group(group).slice(row, 1).to_pylist()[0]
        sides = {"chosen": "latent1", "rejected": "latent2"}
        latents = {side: torch.from_numpy(np.load(BytesIO(rows[name]))) for side, name in sides.items()}
        return {"prompt": rows["prompt"], **latents}


def pairs_per_second(loader: DataLoader[Any], most: float = 20.0) -> float:
    """Measure pairs per second from the first batch on, over an epoch or at most ``most`` seconds.

    Every memory page of the latents is read.
    """
    pairs, started = 0, 0.0
    for batch in loader:
        sides = (batch.chosen, batch.rejected) if isinstance(batch, PreferenceBatch) else sides_of(batch)
        for side in sides:
            side.view(torch.int16).view(-1)[::2048].sum()
        if not started:
            started = time.perf_counter()
            continue
        pairs += len(sides[0])
        if time.perf_counter() - started > most:
            break
    return pairs / (time.perf_counter() - started)


def sides_of(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return both sides of a batch of another loader than ours."""
    chosen, rejected = (value for name, value in batch.items() if "chosen" in name or "reject" in name)
    return chosen, rejected


def released_loader(folder: Path, pairs: int, workers: int) -> DataLoader[Any]:
    """Return the loader of DiNa-LRM's released code; its index says that all pairs have one size."""
    from diffusion_rm.data.bucket_dataset import BucketDataLoader

    (file,), index = folder.glob("*.parquet"), folder / "bucket_index.csv"
    rows = (f"{n},{file},{n // ROW_GROUP},{n % ROW_GROUP},1024,1024,0" for n in range(pairs))
    index.write_text("\n".join(["global_id,parquet_path,row_group,row_index,width,height,bucket_id", *rows]))
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return BucketDataLoader(
            [str(file)], str(index), bsz=BATCH, num_workers=workers, use_dynamic_bsz=False
        ).dataloader


def compare(folder: Path, kib: int, repeats: int, most: float, released: bool) -> Iterator[list[Any]]:
    """Yield pairs per second of each store and the ratios to the others; stores run in turn."""
    shape, pairs = SHAPES[kib], PAIRS_OF[kib]
    cache = write_cache(folder / f"cache{kib}", pairs, shape)
    arrow = ArrowPairs(write_arrow(folder / f"arrow{kib}", pairs, shape), shape)
    published = write_diffusion_rm(folder / f"published{kib}", pairs, shape)
    rewritten = ReopenedParquet(published, pairs)

    def plain(dataset: Dataset[Any], workers: int, collate: Callable[[Any], Any]) -> DataLoader[Any]:
        options = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
        return DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, collate_fn=collate, **options)

    for workers in (0, 1):
        loaders = {
            "this cache": cache_loader(cache, workers),
            "Arrow": plain(arrow, workers, lambda batch: batch),
            "diffusion-rm": released_loader(published, pairs, workers)
            if released
            else plain(rewritten, workers, default_collate),
        }
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for repeat in range(repeats + 1):
            for name, loader in loaders.items():
                if name == "diffusion-rm" and repeat > 1:
                    continue
                rate = pairs_per_second(loader, most / 4 if name == "diffusion-rm" else most)
                if repeat or name == "diffusion-rm":  # the first round fills the page cache
                    rates[name].append(rate)
        gain, slow = ratio(rates["this cache"], rates["Arrow"]), median(rates["diffusion-rm"])
        goal = Goal(gain.median, least=1.5 if workers else 1.4)
        found = (Spread(rates[name], digits) for name, digits in zip(loaders, (",.0f", ",.0f", ",.1f"), strict=True))
        yield [f"{kib} KiB", workers, *found, gain, goal, f"{median(rates['this cache']) / slow:,.0f}"]
        del loaders


def scale(folder: Path) -> Iterator[list[Any]]:
    """Yield the time of an epoch and the memory of trainer and worker, by number of pairs."""
    for pairs in (1_000, 3_000, 10_000, 30_000, 100_000):
        cache = write_cache(folder / f"scale{pairs}", pairs, SHAPES[4])
        started = time.perf_counter()
        loader = cache_loader(cache, workers=1)
        opened = time.perf_counter() - started
        pairs_per_second(loader)
        rate = median(pairs_per_second(loader) for _ in range(3))
        worker = loader._iterator._workers[0].pid  # type: ignore[union-attr]
        sizes = [f"{proportional(pid) / MIB:.0f}" for pid in (os.getpid(), worker)]
        yield [f"{pairs:,}", f"{opened:.2f}", f"{pairs / rate:.2f}", f"{1e6 / rate:.1f}", *sizes]
        del loader
        shutil.rmtree(cache)


def wait(folder: Path) -> Iterator[list[Any]]:
    """Yield the share of its training time that the tiny DiNa-LRM waits for data, on a cache of the tiny world."""
    from latentreward.callbacks import Throughput
    from lightning.pytorch import Trainer, seed_everything

    from latentreward.diffusion import LoRA, sd35_tiny
    from latentreward.reward import DiNaLRMModule, GatedQFormerHead, ThurstoneLoss

    seed_everything(0, verbose=False)
    for workers in (0, 1):
        backbone = sd35_tiny(tuning="lora", lora=LoRA(16, 32))
        space = backbone.latent_space
        cache = write_cache(folder / f"wait{workers}", 4_000, (space.channels, 8, 8), space)
        module = DiNaLRMModule(backbone, GatedQFormerHead, ThurstoneLoss(), eval_sigmas=[0.5])
        data = CachedPreferenceDataModule(train=CachedSplit(str(cache)), batch_size=32, num_workers=workers)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=120,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Throughput(every_n_batches=100)],
        )
        trainer.fit(module, data)
        figures = trainer.callback_metrics
        yield [workers, 32, f"{figures['train/pairs_per_second']:,.0f}", f"{figures['train/data_wait']:.2%}"]


def tiny(folder: Path, repeats: int) -> Iterator[list[Any]]:
    """Yield the share of data in the CPU time of the tiny LRM's training steps, by layout of the tiny world's files."""
    from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

    from latentreward.diffusion import sd_tiny
    from latentreward.reward import CLIPProjectionHead, LRMLoss, LRMModule
    from latentreward.tinyworld import TinyWorldDataModule

    class Clock(Callback):
        """Callback that sums CPU seconds between batches and inside them."""

        def __init__(self) -> None:
            self.seconds, self.now = [0.0, 0.0], time.process_time()

        def lap(self, kind: int) -> None:
            """Count the time since the last call as data (0) or as work (1)."""
            self.now, last = time.process_time(), self.now
            self.seconds[kind] += self.now - last

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            """Count data, but for the first batches, while caches fill."""
            self.lap(0)
            if batch_idx == 10:
                self.seconds = [0.0, 0.0]

        def on_train_batch_end(self, *_: Any) -> None:
            """Count work."""
            self.lap(1)

    for layout in ("pickapic", "hpdv3"):
        found = []
        for _ in range(repeats):
            seed_everything(0, verbose=False)
            data = TinyWorldDataModule(str(folder / layout), layout, 1500, 32, batch_size=32, num_workers=0)
            backbone, clock = sd_tiny(), Clock()
            module = LRMModule(backbone, partial(CLIPProjectionHead, guidance=7.5), LRMLoss())
            trainer = Trainer(
                accelerator="cpu",
                max_steps=60,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[clock],
            )
            trainer.fit(module, data)
            found.append(clock.seconds)
        share = Spread([data / (data + work) for data, work in found], ".1%")
        of_data = Spread([20 * data for data, _ in found], ".1f")  # ms per step, of 50
        of_steps = Spread([20 * sum(parts) for parts in found], ".1f")
        yield [layout, of_data, of_steps, share, Goal(share.median, most=0.15)]


def rows(folder: Path) -> Iterator[list[Any]]:
    """Yield CPU time and memory of a reader of JSON lines and of the bucket sampler, by number of pairs."""
    for pairs in (100_000, 1_000_000):
        file = folder / f"{pairs}.jsonl"
        with file.open("w") as stream:
            for number in range(pairs):
                images = f'"chosen": "images/{number}_a.jpg", "rejected": "images/{number}_b.jpg"'
                stream.write(f'{{"prompt": "a photograph of thing number {number // 3} on a table", {images}}}\n')
        printed = subprocess.run(
            [sys.executable, __file__, "--file", str(file)], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        yield [f"{pairs:,}", *printed.split()]


def measure_rows(file: Path) -> None:
    """Print the figures of :func:`rows` for one file; in a process of its own, whose peak of memory counts."""
    from latentreward.data import JSONLPairReader
    from latentreward.data.size_sampling import BucketBatchSampler, Sizing

    def cpu(work: Callable[[], Any]) -> tuple[Any, str]:
        began = time.process_time()
        return work(), f"{time.process_time() - began:.2f}"

    with PeakMemory() as memory:
        reader, opened = cpu(lambda: JSONLPairReader(str(file)))
    peak = (memory.peak - memory.before) / MIB
    first, again = (cpu(reader.labels)[1] for _ in range(2))
    sizes = np.random.default_rng(0).integers(8, 13, (len(reader), 2))
    planned = cpu(lambda: sum(1 for _ in BucketBatchSampler(sizes, Sizing(4))))[1]
    print(opened, f"{peak:.0f}", first, again, planned)


def measurements(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Sequence[str], Iterator[list[Any]]]]:
    """Yield title, columns and rows of each table that the options ask for."""
    if "compare" in options.parts:
        released = bool(options.released and add_released(options.released, "diffusion-rm"))
        columns = ["latent", "workers", "this cache, pairs/s", "Arrow", f"diffusion-rm ({heading(released)})"]
        ratios = ("ratio to Arrow", "goal", "to diffusion-rm")
        rows_of = (compare(folder, kib, options.repeats, options.most, released) for kib in options.kib)
        yield "Pairs per second", (*columns, *ratios), chain.from_iterable(rows_of)
    if "scale" in options.parts:
        columns = ["pairs", "open s", "epoch s", "µs per pair", "trainer MiB", "worker MiB"]
        yield "Epochs over latents of 4 KiB, one worker", columns, scale(folder)
    if "wait" in options.parts:
        yield "Waiting for cached data", ("workers", "batch", "pairs/s", "share of time waiting"), wait(folder)
    if "tiny" in options.parts:
        columns = ["layout", "data, ms per step", "whole step, ms", "share of data", "goal"]
        yield "Processor time of training a tiny LRM on pictures", columns, tiny(folder, options.repeats)
    if "rows" in options.parts:
        columns = ["pairs", "open, s", "its peak, MiB", "labels(), s", "again, s", "an epoch in batches of 4, s"]
        yield "Many rows", columns, rows(folder)


def main() -> None:
    """Run the chosen parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["compare", "scale", "wait", "tiny", "rows"], metavar="PART")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kib", type=int, nargs="+", choices=PAIRS_OF, default=[*PAIRS_OF], help="size of a latent")
    parser.add_argument("--most", type=float, default=20.0, help="seconds of reading a store in one round")
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one by default")
    parser.add_argument("--released", type=Path, help="folder with the clone diffusion-rm")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        measure_rows(options.file)
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for title, columns, part in measurements(folder, options):
            table(title, columns, part)


if __name__ == "__main__":
    main()
