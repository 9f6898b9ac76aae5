"""Pixels of a decoder as pictures."""

import pytest
import torch
from PIL import Image

from latentreward.core.reports.drawing import PLAIN, draw_pair, to_image


def test_pixels_become_the_bytes_of_an_image() -> None:
    pixels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 7).repeat(3, 1, 1)
    pixels[2] = -1
    image = to_image(pixels)
    assert [image.getpixel((x, 0)) for x in range(7)] == [(v, v, 0) for v in (0, 0, 64, 128, 191, 255, 255)]


def drawn(prompt: str, caption: str = "") -> bytes:
    return draw_pair([Image.new("RGB", (128, 32))], [caption], prompt, PLAIN).tobytes()


@pytest.mark.parametrize("letter", "–—…é×−“ßЖλع")
def test_letters_of_prompts_and_captions_are_no_boxes(letter: str) -> None:
    box = "\uffff"
    assert drawn(letter) != drawn(box)
    assert drawn("", letter) != drawn("", box)
