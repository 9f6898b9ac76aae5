"""Preprocessed pairs: aspect buckets, and the released cache with and without its index."""

import csv
from hashlib import sha256
from typing import Any

import numpy as np
import pytest

from latentreward.core.errors import InputError
from latentreward.data import DiffusionRMReader
from latentreward.data.image_sizes import PUBLISHED_BUCKETS, Bucket, assign_bucket, sort_buckets
from latentreward.data.images import decode_latents
from tests.golden.catalogue import Case, cases

dataset = pytest.mark.parametrize("case", cases("dina/dataset"), ids=lambda case: case.name)


def bucket_of(name: str) -> Bucket:
    height, width = map(int, name.split("x"))
    return Bucket(height, width)


@dataset
def test_buckets(case: Case) -> None:
    expected = case.options
    buckets = sort_buckets([tuple(size) for size in expected["buckets_hw_sorted"]])
    assert buckets == PUBLISHED_BUCKETS
    for name, size in expected["assign_hw"].items():
        image = bucket_of(name)
        assert assign_bucket(image.height, image.width) == (None if size is None else Bucket(*size)), name


def dynamic_batch_size(bucket: Bucket, base: int) -> int:
    """Pairs per batch of the reference, which keep the pixels of a batch about equal: 1 above 1024 × 1024."""
    return max(1, 1024 * 1024 // bucket.area * base)


def sizes_of(reader: DiffusionRMReader) -> dict[str, tuple[int, ...]]:
    """Shape of the chosen latents by ``global_id``."""
    return {
        reader[n].pair_id.partition(":")[2]: decode_latents(reader[n].image_a).shape
        for n in range(len(reader))
        if reader[n].label_a is not None
    }


def open_reader(case: Case, index: str | None = "bucket_index.csv", **options: Any) -> DiffusionRMReader:
    for name in {pair["file"] for pair in case.options["pairs"].values()}:
        case.file(name)
    return DiffusionRMReader(str(case.file(index or "expected.json").parent), index, randomise_sides=False, **options)


@dataset
def test_latents(case: Case) -> None:
    reader, expected = open_reader(case), case.options["pairs"]
    names = [pair_id.partition(":")[2] for pair_id in reader.pair_ids()]
    assert sorted(names) == sorted(expected)
    for number, name in enumerate(names):
        pair, wanted = reader[number], expected[name]
        assert (pair.prompt, pair.label_a) == (wanted["prompt"], 1.0)
        for image, side in ((pair.image_a, wanted["chosen"]), (pair.image_b, wanted["reject"])):
            array = decode_latents(image)
            assert list(array.shape) == wanted["latent_shape"] == [16, wanted["height"] // 8, wanted["width"] // 8]
            assert str(array.dtype) == wanted["dtype"]
            assert sha256(array.tobytes()).hexdigest() == side["sha256"]
            assert array[:2, :2, :2].flatten().tolist() == side["corner"]
            values = array.astype(np.float64)
            assert values.sum() == pytest.approx(side["sum"])
            assert (values**2).sum() == pytest.approx(side["sumsq"])


@dataset
def test_pairs_of_the_reference_reader(case: Case) -> None:
    """Every pair it delivers is offered, in the same shape; what it drops, to fill its batches, is offered too."""
    for run in case.options["reader_runs"]:
        sizes = sizes_of(open_reader(case, run["csv"], on_error="skip"))
        assert set(sizes) == set(case.options["pairs"])
        for batch in (batch for epoch in run["epochs"] for batch in epoch):
            assert [list(sizes[str(name)]) for name in batch["ids"]] == [batch["latent_shape"][1:]] * len(batch["ids"])
            bucket = Bucket(8 * batch["latent_shape"][2], 8 * batch["latent_shape"][3])
            base = run["base_batch_size"]
            size = dynamic_batch_size(bucket, base) if run["use_dynamic_bsz"] else base
            assert batch["latent_shape"][0] == len(batch["ids"]) == size


@dataset
def test_rows_that_match_no_bucket(case: Case) -> None:
    with pytest.raises(InputError, match="is not a bucket"):
        open_reader(case, "bucket_index_unmatched.csv")
    reader = open_reader(case, "bucket_index_unmatched.csv", on_error="skip")
    with case.file("bucket_index_unmatched.csv").open(newline="") as stream:
        extra = {row["global_id"] for row in csv.DictReader(stream)} - set(case.options["pairs"])
    assert dict(reader.skipped) == {"size is no bucket": len(extra)}
    assert not extra & set(sizes_of(reader))


@dataset
def test_rows_without_an_index(case: Case) -> None:
    reader = DiffusionRMReader(str(case.file("eval_sample.parquet")), None, randomise_sides=False)
    by_prompt = {pair["prompt"]: pair for pair in case.options["pairs"].values()}
    assert len(reader) > 0
    for number, prompt in enumerate(reader.prompts()):
        wanted = by_prompt[prompt]
        assert sha256(decode_latents(reader[number].image_a).tobytes()).hexdigest() == wanted["chosen"]["sha256"]
        assert sha256(decode_latents(reader[number].image_b).tobytes()).hexdigest() == wanted["reject"]["sha256"]
