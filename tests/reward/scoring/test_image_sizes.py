"""Sizes that images are scored at are those that they are trained at."""

import numpy as np
import pytest

from latentreward.data.image_sizes import Bucket, ImageSizes, NearestBucket, OneSize
from latentreward.diffusion.cache.sources import ImageSettings

OWN = ((64, 64), (96, 64), (64, 96), (128, 192), (32, 32))


@pytest.mark.parametrize("buckets", [None, OWN])
def test_an_image_is_scored_in_the_bucket_that_the_cache_puts_it_into(
    buckets: tuple[tuple[int, int], ...] | None,
) -> None:
    cached = ImageSettings(buckets=buckets, min_pixels=0)
    scored = NearestBucket() if buckets is None else NearestBucket(buckets)
    sides = np.random.default_rng(0).integers(20, 2000, (400, 2)).tolist()
    sides += [(int(1000 * aspect), 1000) for aspect in np.linspace(0.4, 2.5, 400)]
    found = 0
    for height, width in sides:
        size, loader = Bucket(height, width), scored.loader(height, width)
        in_training = cached.sizes_of_pair(size, size)
        assert scored.fits(height, width) == (not isinstance(in_training, str))
        if not isinstance(in_training, str):
            assert in_training[0] == (loader.height, loader.width)
            found += 1
        assert loader.resize == cached.resize
    assert 50 < found < 700


def test_one_size_fits_all() -> None:
    sizes: ImageSizes = OneSize(24, 16)
    assert sizes.fits(1, 1000)


def test_a_bucket_named_twice_counts_once() -> None:
    loader = NearestBucket(((16, 16), (16, 32), (16, 16))).loader(50, 50)
    assert (loader.height, loader.width) == (16, 16)
