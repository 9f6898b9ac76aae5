"""Pixels of a decoder as pictures."""

import pytest
import torch

from latentreward.reports.drawing import to_image


def test_pixels_become_the_bytes_of_an_image() -> None:
    pixels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 7).repeat(3, 1, 1)
    pixels[2] = -1
    image = to_image(pixels)
    assert [image.getpixel((x, 0)) for x in range(7)] == [(v, v, 0) for v in (0, 0, 64, 128, 191, 255, 255)]


@pytest.mark.parametrize(("size", "expected"), [(None, (6, 3)), (4, (4, 2)), (12, (12, 6))])
def test_the_longer_side_has_the_size_that_is_asked_for(size: int | None, expected: tuple[int, int]) -> None:
    assert to_image(torch.zeros(3, 3, 6), size).size == expected
