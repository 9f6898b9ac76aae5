"""Images in whatever form, each with its prompt, to one score each; what cannot be scored is named."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError
from latentreward.data.image_sizes import NearestBucket, OneSize
from latentreward.reward import RewardModel, ScoringNoise
from latentreward.reward.scoring.ensemble import pixel_batches
from tests.reward.scoring.models import picture, pictures, png, scoring_model
from tests.tiny_pipelines import PIXELS


@pytest.fixture(scope="module")
def lrm() -> RewardModel:
    return scoring_model("sd15")


@pytest.fixture(scope="module")
def dina() -> RewardModel:
    return scoring_model("sd35")


def grey16(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values.astype(np.uint32) * 257).astype(np.uint16))


MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
    **{mode: lambda image, mode=mode: image.convert(mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "F", "I")},
    "I;16": lambda image: grey16(np.asarray(image.convert("L"))),
    "transparent": lambda image: Image.merge("RGBA", (*image.split(), Image.new("L", image.size))),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_is_converted_as_a_file_is(lrm: RewardModel, mode: str, tmp_path: Path) -> None:
    image = MODES[mode](picture(2))
    scores = lrm.score("a cat", [image])
    if mode not in ("F", "I", "CMYK"):  # PNG has none of these
        image.save(tmp_path / "image.png")
        assert torch.equal(scores, lrm.score("a cat", [tmp_path / "image.png"]))
    if mode in ("L", "I;16"):
        assert torch.equal(scores, lrm.score("a cat", [picture(2).convert("L")]))
    if mode == "transparent":
        assert torch.equal(scores, lrm.score("a cat", [picture(2)]))


def test_sizes_follow_the_network(lrm: RewardModel, dina: RewardModel) -> None:
    assert lrm.image_sizes == OneSize(PIXELS, PIXELS)
    assert isinstance(dina.image_sizes, NearestBucket)
    multiple = dina.backbone.side_multiple
    assert multiple == 4  # VAE 2, patch 2
    assert all(side % multiple == 0 and side > 0 for size in dina.image_sizes.buckets for side in size)
    assert (PIXELS, PIXELS) in dina.image_sizes.buckets
    portrait, landscape = (dina.image_sizes.loader(*size) for size in ((480, 320), (320, 480)))
    assert (portrait.height, portrait.width) == (landscape.width, landscape.height)
    assert portrait.height > portrait.width


def test_results_keep_the_order_given_though_sizes_are_scored_together(dina: RewardModel) -> None:
    images = pictures(7, mixed=True)
    prompts = [f"prompt {number}" for number in range(7)]
    together = dina.score(prompts, images, batch_size=2)
    alone = torch.cat([dina.score([prompt], [image]) for prompt, image in zip(prompts, images, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    assert len(set(together.tolist())) == 7


@pytest.mark.parametrize("count", [1, 6])
def test_pairs_are_pairs(lrm: RewardModel, count: int) -> None:
    """Three images get three scores or a refusal; never scores of every prompt with every image."""
    prompts = [f"prompt {number}" for number in range(count)]
    with pytest.raises(InputError, match=f"prompts: {count} for 3 images"):
        lrm.score(prompts, pictures(3))
    with pytest.raises(InputError, match=f"prompts: {count} for 3 images"):
        lrm.score_latents(prompts, torch.zeros(3, 4, 8, 8))
    assert lrm.score(["a", "b", "c"], pictures(3)).shape == (3,)


def test_nothing_gives_nothing(lrm: RewardModel) -> None:
    noise = lrm.noise
    assert lrm.score([], []).shape == (0,)
    assert lrm.score_levels("a cat", [], [noise, noise]).shape == (0, 2)
    assert lrm.score_latents([], torch.zeros(0, 4, 8, 8)).shape == (0,)


def test_pixels_are_taken_as_they_are(lrm: RewardModel, dina: RewardModel) -> None:
    image = picture(3, PIXELS, PIXELS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(lrm.score("a cat", pixels), lrm.score("a cat", [image]))
    assert lrm.score("a cat", pixels.repeat(3, 1, 1, 2)).shape == (3,)
    with pytest.raises(InputError, match=r"images: 15 is no multiple of the 2 .*; make it 14 or 16"):
        lrm.score("a cat", pixels[..., :15])
    with pytest.raises(InputError, match=r"latents: 7 is no multiple of the 2 .*; make it 6 or 8"):
        dina.score_latents("a cat", torch.zeros(1, dina.backbone.latent_space.channels, 8, 7))
    with pytest.raises(InputError, match=r"pixel of magnitude 255, not in \[-1, 1\]; scale them"):
        lrm.score("a cat", torch.full((1, 3, PIXELS, PIXELS), 255.0))
    with pytest.raises(InputError, match=r"uint8 tensor of shape \(1, 3, 4, 4\); give floating point"):
        lrm.score("a cat", torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "empty image"),
        (b"no image at all", "unknown image format"),
        (png(picture(0))[:200], "image 'number 1': truncated or damaged"),
        (Path("there/is/none.png"), "image 'there/is/none.png': missing file"),
        ("a\0b.png", "missing file"),
        (None, "image number 1 is a NoneType"),
        (Image.new("F", (8, 8), 0.5), "image number 1 has mode F, of which 255 is white, and no value above"),
        (np.zeros((4, 4, 3)), "image number 1 is a float64 array"),
        (np.zeros((4, 4), np.uint8), "image number 1 is a uint8 array"),
        (torch.zeros(3, 4, 4), "image number 1 is a Tensor"),
        (ImageRef("key", data=b"x", holds="latents"), "holds latents"),
    ],
)
def test_what_is_no_image_is_named(lrm: RewardModel, image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        lrm.score("a cat", [picture(0), image, picture(1)])
    assert "\n" not in str(caught.value)


def test_a_single_image_gives_one_score(lrm: RewardModel, tmp_path: Path) -> None:
    image = picture(1, PIXELS, PIXELS)
    (tmp_path / "a.png").write_bytes(png(image))
    forms = [image, tmp_path / "a.png", str(tmp_path / "a.png"), png(image), ImageRef("x", png(image)), np.array(image)]
    expected = lrm.score("a cat", [image])
    for form in forms:
        assert torch.equal(lrm.score("a cat", form), expected)
        assert torch.equal(lrm.score(["a cat"], form), expected)
    together = lrm.score("a cat", [*forms, Image.open(tmp_path / "a.png")], batch_size=1)
    assert together.dtype == torch.float32 and not together.requires_grad
    assert torch.equal(together, expected.expand(7))
    assert lrm.score_levels("a cat", image, [lrm.noise] * 2).shape == (1, 2)
    torch.testing.assert_close(lrm.score("a cat", to_tensor(image)[0], value_range=(0, 1)), expected)


def fresh(model: RewardModel) -> RewardModel:
    """The same network, which has warned of nothing yet."""
    new = copy(model)
    new._warned = set()
    return new


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def test_the_range_of_a_tensor_can_be_given_and_is_doubted(lrm: RewardModel, caplog: Any) -> None:
    model = fresh(lrm)
    pixels = to_tensor(picture(3, PIXELS, PIXELS))
    expected = model.score("a cat", 2 * pixels - 1)
    for scale in (1, 255):
        given = model.score("a cat", scale * pixels, value_range=(0, scale))
        torch.testing.assert_close(given, expected)
    assert not caplog.records
    unscaled = model.score("a cat", pixels)
    assert (unscaled - expected).abs() > 1e-3
    assert torch.equal(model.score("a cat", pixels), unscaled)
    [record] = caplog.records
    assert "all values of the image tensor lie in [0, 1]" in record.message
    assert "value_range=(0, 1)" in record.message
    fresh(lrm).score("a cat", pixels, value_range=(-1, 1))
    assert len(caplog.records) == 1
    with pytest.raises(InputError, match=r"magnitude 255, not within value_range=\(0, 1\)"):
        model.score("a cat", 255 * torch.ones_like(pixels), value_range=(0, 1))


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_exif_orientation_is_as_the_model_has_it(lrm: RewardModel, exif: Any, tmp_path: Path) -> None:
    model = fresh(lrm)
    assert model.exif == "apply"
    model.exif = exif
    stored = picture(1, 24, 40)
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = 6
    stored.save(tmp_path / "a.png", exif=tag)
    seen = stored.transpose(Image.Transpose.ROTATE_270) if exif == "apply" else stored
    path = tmp_path / "a.png"
    forms = [path, path.read_bytes(), ImageRef("x", path=path), Image.open(path)]
    assert torch.equal(model.score("a cat", forms), model.score("a cat", [seen] * 4))


LATENTS = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda lrm: lrm.score("a cat", pictures(1), batch_size=0), "batch_size is 0"),
        (lambda lrm: lrm.score(["a cat", "\ud83d"], pictures(2)), "prompt number 1"),
        (lambda lrm: lrm.score("a", [Path("no.png")], noise=ScoringNoise(timesteps=(1000,))), "timestep 1000"),
        (lambda lrm: lrm.score_latents("a cat", LATENTS, draws=torch.zeros(1, 4, 8, 8)), "draws have shape"),
        (lambda lrm: lrm.score_latents("a", LATENTS, conditioning=lrm.encode_prompts(["a"])), "conditioning has 1"),
        (lambda lrm: lrm.score_latents("a cat", torch.zeros(2, dtype=torch.int64)), "latents are a torch.int64"),
        (lambda lrm: lrm.score(["a cat"] * 2, picture(0)), "prompts: 2 for 1 images"),
        (lambda lrm: lrm.score("a cat", torch.zeros(2, 3, 5, 16, 16)), "images have 5 frames"),
    ],
)
def test_wrong_arguments(lrm: RewardModel, call: Callable[[RewardModel], Any], key: str) -> None:
    with pytest.raises(InputError, match=key) as caught:
        call(lrm)
    assert "\n" not in str(caught.value)


def test_a_score_that_is_no_number_names_image_and_prompt(lrm: RewardModel) -> None:
    latents = torch.randn(5, 4, 8, 8)
    latents[3, 0, 2, 2] = torch.nan
    with pytest.raises(InputError, match="score of image number 3 for the prompt 'prompt 3' is not finite; look for"):
        lrm.score_latents([f"prompt {row}" for row in range(5)], latents, batch_size=2)
    broken = scoring_model("sd15")
    broken.head.logit_scale.fill_(200.0)  # exp overflows
    with pytest.raises(InputError, match=r"image number 0 for the prompt 'a cat' is not finite.*weights"):
        broken.score("a cat", pictures(2))


def test_images_are_loaded_as_they_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(picture(0)))
    asked: list[int] = []

    class Counted(list):
        def __iter__(self) -> Any:
            for row in range(10_000):
                asked.append(row)
                yield path

    batches = pixel_batches(Counted(), OneSize(16, 16), 4)
    assert next(batches)[0] == [0, 1, 2, 3]
    assert len(asked) < 20
    batches.close()


def test_identity_tells_models_apart(lrm: RewardModel) -> None:
    lrm.source = "runs/lrm"
    assert "runs/lrm" in lrm.identity
    assert "at t 1, images 16x16, exif apply, float32" in lrm.identity
    assert "\n" not in lrm.identity
    assert scoring_model("sd15").set_precision(torch.bfloat16).identity.endswith("bfloat16")
    lrm.source = str(Path(__file__).parent)
    assert lrm.identity.startswith("scoring, on ")  # no place of this machine
    lrm.source = ""


@pytest.mark.slow
def test_buckets_at_full_size_are_the_published_ones() -> None:
    import tempfile

    from latentreward.apps.estimate.pipelines import write_pipelines
    from latentreward.core.registry import create_backbone
    from latentreward.reward.scoring.reward_model import own_sizes

    with tempfile.TemporaryDirectory() as folder:
        folders = write_pipelines(Path(folder))
        with torch.device("meta"):
            sd35 = create_backbone("sd35_medium", source=folders["sd35"], load_t5=False)
            sd15 = create_backbone("sd15", source=folders["sd15"])
    assert own_sizes(sd35) == NearestBucket()
    assert sd35.side_multiple == 16
    assert own_sizes(sd15) == OneSize(512, 512)
