"""Latents of pictures that prompts edit: whose they are, and what is kept."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from latentreward.core.contracts import EditPrompt, ImageRef
from latentreward.data import PixelLoader
from latentreward.data.images import png
from latentreward.diffusion.encoders.vae import SourceEncoder
from tests.diffusion.families.twins import TWINS


@pytest.fixture(scope="module")
def encoder() -> SourceEncoder:
    found = TWINS["klein_base"].source().load().source_encoder
    assert found is not None
    found.resize_to(32, 48)
    return found


def picture(colour: str) -> bytes:
    return png(Image.new("RGB", (96, 64), colour))


def test_pictures_of_one_name_in_two_tables_have_latents_of_their_own(encoder: SourceEncoder) -> None:
    red, blue = (EditPrompt("turn it", [ImageRef("1.png", picture(colour))]) for colour in ("red", "blue"))
    (both,) = encoder([red, blue, red])
    assert torch.equal(both[0], both[2]) and not torch.equal(both[0], both[1])


def test_a_file_that_is_written_again_is_read_again(encoder: SourceEncoder, tmp_path: Path) -> None:
    ref, found = ImageRef("a", path=tmp_path / "a.png"), []
    for shade in ("red", "blue"):
        Image.new("RGB", (32, 32), shade).save(tmp_path / "a.png")
        found.append(encoder.latents(ref))
        assert encoder.latents(ref) is found[-1]
    assert not torch.equal(*found)


def test_pixels_are_encoded_as_they_were_resized(encoder: SourceEncoder, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((96, 96)).convert("RGB").save(tmp_path / "1.png")
    image = ImageRef("1.png", path=tmp_path / "1.png")
    prompt, ways = EditPrompt("turn it", [image]), ("stretch", "center_crop")
    stretched, cropped = (encoder([prompt], [PixelLoader(32, 48, way)(image)[None]])[0] for way in ways)
    assert not torch.equal(stretched, cropped)
    assert torch.equal(cropped, encoder([prompt])[0])
