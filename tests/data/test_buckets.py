"""Aspect buckets against the released rule: equal aspect ratio first, then nearest area."""

import pytest

from latentreward.core.errors import InputError
from latentreward.data.image_sizes import PUBLISHED_BUCKETS, Bucket, assign_bucket, nearest_bucket, sort_buckets


def test_published_buckets_ascend_by_area_and_keep_their_order_within_one() -> None:
    areas = [bucket.area for bucket in PUBLISHED_BUCKETS]
    assert areas == sorted(areas)
    assert len(PUBLISHED_BUCKETS) == 13
    assert PUBLISHED_BUCKETS[2:4] == (Bucket(1024, 768), Bucket(768, 1024))


@pytest.mark.parametrize("bucket", PUBLISHED_BUCKETS, ids=str)
def test_a_bucket_is_its_own(bucket: Bucket) -> None:
    assert assign_bucket(bucket.height, bucket.width) == bucket


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (300, 300, Bucket(256, 256)),
        (363, 363, Bucket(512, 512)),  # log area: 363 lies above the geometric mean of 256 and 512, 362.04
        (362, 362, Bucket(256, 256)),
        (5000, 5000, Bucket(1024, 1024)),
        (1600, 900, Bucket(1472, 832)),
        (1000, 900, None),  # no such aspect ratio
        (1030, 1000, Bucket(1024, 1024)),  # log(1.03) = 0.0296
        (1031, 1000, None),  # 0.0305
        (255, 256, None),  # below 65,536 pixels
        (1, 1, None),
        (0, 512, None),
        (24, 1, None),
    ],
)
def test_assignment(height: int, width: int, expected: Bucket | None) -> None:
    assert assign_bucket(height, width) == expected


def test_custom_buckets_and_smallest_size() -> None:
    buckets = sort_buckets([(64, 96), (32, 32)])
    assert buckets == (Bucket(32, 32), Bucket(64, 96))
    assert assign_bucket(40, 40, buckets) is None
    assert assign_bucket(40, 40, buckets, min_pixels=0) == Bucket(32, 32)
    assert assign_bucket(40, 60, buckets, min_pixels=0) == Bucket(64, 96)
    assert assign_bucket(40, 50, buckets, min_pixels=0) is None
    assert assign_bucket(40, 59, buckets, min_pixels=0) == Bucket(64, 96)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([], "none given"), ([(64, 0)], r"\[64, 0\] is not a size"), ([(64, 32), (64, 32)], "twice")],
)
def test_bad_bucket_lists_are_refused(sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sort_buckets(sizes)


def test_an_image_that_must_have_a_bucket_gets_its_own_or_the_nearest_in_aspect() -> None:
    for bucket in PUBLISHED_BUCKETS:
        assert nearest_bucket(bucket.height, bucket.width) == bucket
    assert assign_bucket(1000, 1358) == nearest_bucket(1000, 1358) == Bucket(832, 1152)  # 4:3 is nearer in aspect
    assert assign_bucket(1000, 3000) is None
    assert nearest_bucket(1000, 3000) == Bucket(832, 1472)
    assert assign_bucket(1000, 1600) is None
    assert nearest_bucket(1000, 1600) == Bucket(896, 1344)  # of two 3:2 the one nearer in area
    assert nearest_bucket(200, 273) == Bucket(768, 1024)  # of the two, the one nearer in area; too small for training
    assert nearest_bucket(20, 32) == Bucket(832, 1248)
    assert nearest_bucket(1, 1) == Bucket(256, 256)
