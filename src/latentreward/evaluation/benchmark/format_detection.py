"""Detection of the benchmark that a folder or file holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentreward.data import readers
from latentreward.data.format_detection import Splits, recognise
from latentreward.errors import InputError
from latentreward.evaluation.benchmark import sets
from latentreward.evaluation.benchmark.base import Benchmark

EVALUATED = ("test_unique", "test", "validation_unique", "validation", "val")
"""Names of splits for evaluation, in order of preference; other splits are meant for training."""


def recognise_benchmark(data: str) -> Benchmark:
    """Return the benchmark for the data set in a folder or file.

    A published data set gets its own protocols. Pairs in any other known layout become a
    :class:`~latentreward.evaluation.benchmark.PairsBenchmark`. The first split of ``EVALUATED`` that exists is
    evaluated, else the first split found.

    Raises:
        InputError: If the layout is not recognised, or the data set holds latents instead of images.
    """
    splits = recognise(data)
    split = next((name for name in EVALUATED if name in splits), next(iter(splits)))
    build: Any = splits[split]
    if build.func is readers.DiffusionRMReader:
        raise InputError(f"data: {data} holds latents of images; benchmarks score images, give the data set itself")
    make = PUBLISHED.get(build.func)
    if make is None:
        path = Path(data)
        return sets.PairsBenchmark(build(on_error="skip"), name=path.stem if path.is_file() else path.resolve().name)
    return make(build.args[0], split, splits)


def _pick_a_pic(root: str, split: str, splits: Splits) -> Benchmark:
    fitting = "validation_unique" if "validation_unique" in splits and split != "validation_unique" else None
    return sets.PickAPicBenchmark(root, split, fitting_split=fitting)


PUBLISHED: dict[Any, Callable[[str, str, Splits], Benchmark]] = {
    readers.ImageRewardReader: lambda root, split, splits: sets.ImageRewardBenchmark(root),
    readers.ImageRewardDBReader: lambda root, split, splits: sets.ImageRewardDBBenchmark(root, split),
    readers.HPDv2Reader: lambda root, split, splits: sets.HPDv2Benchmark(root),
    readers.HPDv3Reader: lambda root, split, splits: sets.HPDv3Benchmark(root, split),
    readers.PickAPicReader: _pick_a_pic,
    readers.GenAIBenchReader: lambda root, split, splits: sets.GenAIBenchTigerBenchmark(
        root, [name for name in ("test", "test_v1") if name in splits]
    ),
    readers.GenAIBenchCMUReader: lambda root, split, splits: sets.GenAIBenchCMUBenchmark(root),
}
"""Reader class → function ``(root, split, splits)`` that builds the benchmark; ``splits`` are all splits found."""
