"""Benchmarks of published data sets and of your own pairs, with readers, splits and protocols; and their detection."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentreward.apps.evaluation.benchmark.base import Benchmark, Evaluation
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_range
from latentreward.data import (
    DiffusionRMReader,
    EditPairReader,
    GenAIBenchCMUReader,
    GenAIBenchReader,
    HPDv2Reader,
    HPDv3Reader,
    ImageRewardDBReader,
    ImageRewardReader,
    OnError,
    PairReader,
    PickAPicReader,
)
from latentreward.data.format_detection import Splits, recognise


class ImageRewardBenchmark(Benchmark):
    """ImageReward's test set, 466 prompts of 4 to 9 ranked images, in ``test.json`` and ``test_images/``."""

    name, keys = "imagereward", ("imagereward/micro", "imagereward/macro")

    def open(self, split: str) -> PairReader:
        """Open the test set, the reader's only split."""
        return ImageRewardReader(self.root, on_error=self.on_error)


class ImageRewardDBBenchmark(Benchmark):
    """A split of ImageRewardDB, in ``images/{split}/{split}_{i}.zip``, by ImageReward's protocols."""

    name, keys, reader = "imagerewarddb", ImageRewardBenchmark.keys, ImageRewardDBReader


class HPDv2Benchmark(Benchmark):
    """HPDv2's test set, 400 groups of 9 or 10 ranked images, in ``test.json`` and ``test/``."""

    name, keys, reader = "hpdv2", ("hpdv2/macro", "hpdv2/micro"), HPDv2Reader


class HPDv3Benchmark(Benchmark):
    """HPDv3's test set, in ``test.json`` and ``images/``; the splits ``train`` and ``all`` have votes."""

    name, keys, reader = "hpdv3", ("hpdv3",), HPDv3Reader


class PickAPicBenchmark(Benchmark):
    """Pick-a-Pic v1 or v2, in ``test_unique-*.parquet`` and ``validation_unique-*.parquet``.

    Args:
        root: Folder of the files, or of their folder ``data``; or a hub id.
        split: Split on which the protocols are computed.
        fitting_split: Split on which PickScore's threshold is fitted; null leaves ``pickapic/pickscore`` out.
        temperatures: Name of a scorer → temperature of its softmax in PickScore's protocol; null fits the temperature
            on ``fitting_split``. The key ``others`` stands for all scorers that are not named. The default is 1, as
            published, which suits scores that are logits but not cosine similarities.
        on_error: See :class:`Benchmark`.
    """

    name, keys, reader = "pickapic", ("pickapic/lrm", "pickapic/strict"), PickAPicReader

    def __init__(
        self,
        root: PathText,
        split: str = "test_unique",
        *,
        fitting_split: str | None = "validation_unique",
        temperatures: dict[str, float | None] | None = None,
        on_error: OnError = "skip",
    ) -> None:
        super().__init__(root, split, on_error=on_error)
        self.fitting_split, self.temperatures = fitting_split, temperatures or {}
        for scorer, value in self.temperatures.items():
            check_range("(0, inf]", "null fits it", **{f"temperatures.{scorer}": value})

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All three protocols; without a fitting split, ``pickapic/lrm`` and ``pickapic/strict`` alone."""
        fitted = () if self.fitting_split is None else ("pickapic/pickscore",)
        return *(Evaluation(key, self.split, self.fitting_split) for key in fitted), *super().evaluations

    def temperature(self, scorer: str) -> float | None:
        """Return the temperature set for the scorer, else that set for ``others``, else 1."""
        return self.temperatures.get(scorer, self.temperatures.get("others", 1.0))


class GenAIBenchTigerBenchmark(Benchmark):
    """GenAI-Bench of TIGER-Lab without ties, in ``{split}-*.parquet``; papers report the split ``test``."""

    name, keys, reader = "genai_bench_tiger", ("genai_bench_tiger/no_tie",), GenAIBenchReader


class GenAIBenchCMUBenchmark(Benchmark):
    """GenAI-Bench of CMU, 1,600 prompts of six rated images, in ``train-*.parquet``, the only split."""

    name, keys, reader, split = "genai_bench_cmu", ("genai_bench_cmu",), GenAIBenchCMUReader, "train"


class EditRewardBenchmark(Benchmark):
    """EditReward-Bench of TIGER-Lab: groups of ranked edits, as a whole, by their number K, and as pairs.

    The set has the same name as another one, of EditScore's authors, which is evaluated as pairs of your own.
    """

    name, reader = "editreward_bench", EditPairReader
    keys = "editreward_bench/groups", *(f"editreward_bench/{one}" for one in (2, 3, 4, "pairs"))

    def groups(self, reader: Any) -> Sequence[str]:
        """See :meth:`Benchmark.groups`; a group are the results that were ranked together."""
        ids = reader.table.column("group_id").to_pylist()
        return [own or group for own, group in zip(ids, reader.groups(), strict=True)]


class PairsBenchmark(Benchmark):
    """Pairs of your own: ``pairs/strict`` is the accuracy without ties, ``pairs/soft`` that of all pairs.

    Args:
        reader: Any reader of pairs with images, e.g. of JSON lines or of ``chosen/`` and ``rejected/``.
        name: Name in reports.
    """

    keys = "pairs/strict", "pairs/soft"

    def __init__(self, reader: PairReader, name: str = "pairs") -> None:
        super().__init__("", getattr(reader, "split", "") or "all", on_error=reader.on_error)
        self.pair_reader, self.name = reader, name

    def open(self, split: str) -> PairReader:
        """Return the reader given to the constructor."""
        return self.pair_reader


FITTING = "validation_unique"
"""Split of Pick-a-Pic on which PickScore's threshold is fitted."""
EVALUATED = ("test_unique", "test", FITTING, "validation", "val")
"""Names of splits for evaluation, in order of preference; other splits are meant for training."""


def recognise_benchmark(data: str) -> Benchmark:
    """Return the benchmark for the data set in a folder or file.

    A published data set gets its own protocols; pairs in any other known layout become a :class:`PairsBenchmark`. The
    first split of ``EVALUATED`` that exists is evaluated, else the first split found.
    """
    try:
        splits = recognise(data)
    except InputError as error:  # its remedies are flags of `latentreward inspect`
        text = str(error).replace("--reader ", f"--benchmarks+={PairsBenchmark.__name__} --reader ")
        raise InputError(text.replace("--reader", "--benchmarks.reader")) from error
    split = next((name for name in EVALUATED if name in splits), next(iter(splits)))
    build: Any = splits[split]
    if build.func is DiffusionRMReader:
        raise InputError(f"data: {data} holds latents of images; benchmarks score images, give the data set itself")
    if build.func is EditPairReader:
        reader = build(on_error="skip")
        if reader.source.startswith("editreward_bench"):
            return EditRewardBenchmark(build.args[0], split)
        return PairsBenchmark(reader, name=reader.source)
    make = PUBLISHED.get(build.func)
    if make is None:
        path = Path(data)
        return PairsBenchmark(build(on_error="skip"), name=path.stem if path.is_file() else path.resolve().name)
    return make(build.args[0], split, splits)


PUBLISHED: dict[Any, Callable[[str, str, Splits], Benchmark]] = {
    ImageRewardReader: lambda root, split, splits: ImageRewardBenchmark(root),
    ImageRewardDBReader: lambda root, split, splits: ImageRewardDBBenchmark(root, split),
    HPDv2Reader: lambda root, split, splits: HPDv2Benchmark(root),
    HPDv3Reader: lambda root, split, splits: HPDv3Benchmark(root, split),
    PickAPicReader: lambda root, split, splits: PickAPicBenchmark(
        root, split, fitting_split=FITTING if FITTING in splits and split != FITTING else None
    ),
    GenAIBenchReader: lambda root, split, splits: GenAIBenchTigerBenchmark(root, split),
    GenAIBenchCMUReader: lambda root, split, splits: GenAIBenchCMUBenchmark(root),
}
"""Reader class → function ``(root, split, splits)`` that builds the benchmark; ``splits`` are all splits found."""
