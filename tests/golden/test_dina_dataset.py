"""Preprocessed pairs: aspect buckets, and the released cache with and without its index."""

import pytest

from latentreward.data.buckets import PUBLISHED_BUCKETS, Bucket, assign_bucket, dynamic_batch_size, sort_buckets
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


@dataset
def test_dynamic_batch_size(case: Case) -> None:
    for name, size in case.options["dynamic_bsz_base4"].items():
        assert dynamic_batch_size(bucket_of(name), 4) == size, name
