"""CLIP scorers against transformers' own forward pass, and preprocessing against the published formula."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel

from latentreward.core.errors import InputError
from latentreward.reward import AestheticScorer, CLIPScorer, PickScorer
from tests.reward.scorers.tiny_clip import PIXELS, WIDTHS, write_clip
from tests.tiny_pipelines import clip_tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a cat", "", "a cat", "naïve 🦊\n\nsecond", "word " * 400, "b"]


def preprocess(image: Image.Image) -> torch.Tensor:
    """What OpenAI's CLIP does: shortest edge bicubic, centre crop, [0, 1], mean and standard deviation."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(PIXELS * width / short), int(PIXELS * height / short)), Image.Resampling.BICUBIC)
    left, top = (image.width - PIXELS) // 2, (image.height - PIXELS) // 2
    levels = np.asarray(image.crop((left, top, left + PIXELS, top + PIXELS))).astype(np.float64) / 255
    return torch.from_numpy((levels - MEAN) / STD).permute(2, 0, 1)


def test_preprocessing_is_the_published_one(clip_folder: str, pictures) -> None:
    pixels = CLIPScorer(clip_folder, device="cpu").towers().pixels(pictures)
    expected = torch.stack([preprocess(picture) for picture in pictures])
    torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def reference(clip_folder: str, pictures) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Image and text embeddings of transformers' ``CLIPModel``, and its temperature."""
    model, words = CLIPModel.from_pretrained(clip_folder).eval(), clip_tokenizer()
    tokens = words(PROMPTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    pixels = torch.stack([preprocess(picture) for picture in pictures]).float()
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels)
    return output.image_embeds, output.text_embeds, model.logit_scale.exp().item()


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_scores_are_those_of_the_model(clip_folder: str, pictures, reference, batch_size: int) -> None:
    images, texts, temperature = reference
    cosine = (images * texts).sum(dim=-1)
    options = {"device": "cpu", "batch_size": batch_size}
    assert cosine.std() > 0.01
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(CLIPScorer(clip_folder, **options)(PROMPTS, pictures), cosine, **close)
    clip_score = CLIPScorer(clip_folder, scale="clip_score", **options)(PROMPTS, pictures)
    torch.testing.assert_close(clip_score, 100 * cosine.clamp(min=0), rtol=1e-5, atol=1e-3)
    pick = PickScorer(clip_folder, processor=None, **options)(PROMPTS, pictures)
    torch.testing.assert_close(pick, temperature * cosine, rtol=1e-5, atol=1e-3)


def aesthetic_layers(path: str) -> nn.Sequential:
    layers = nn.Sequential(*(nn.Linear(first, second) for first, second in pairwise(WIDTHS)))
    layers.load_state_dict(dict(zip(layers.state_dict(), torch.load(path, weights_only=True).values(), strict=True)))
    return layers


def test_aesthetic_score(clip_folder: str, aesthetic_file: str, pictures, reference, tmp_path: Path) -> None:
    expected = aesthetic_layers(aesthetic_file)(reference[0]).squeeze(-1).detach()
    scorer = AestheticScorer(aesthetic_file, clip_folder, device="cpu")
    scorer.prepare()
    torch.testing.assert_close(scorer(PROMPTS, pictures), expected, rtol=1e-4, atol=1e-4)
    save_file(torch.load(aesthetic_file, weights_only=True), tmp_path / "same.safetensors")
    same = AestheticScorer(tmp_path / "same.safetensors", clip_folder, device="cpu")
    assert same.identity() == scorer.identity()
    torch.testing.assert_close(same(PROMPTS, pictures), expected, rtol=1e-4, atol=1e-4)


def test_the_older_linear_predictor(clip_folder: str, pictures, reference, tmp_path: Path) -> None:
    layer = nn.Linear(WIDTHS[0], 1)
    torch.save(layer.state_dict(), tmp_path / "linear.pth")
    scores = AestheticScorer(tmp_path / "linear.pth", clip_folder, device="cpu")(PROMPTS, pictures)
    torch.testing.assert_close(scores, layer(reference[0]).squeeze(-1).detach(), rtol=1e-4, atol=1e-4)


def test_identities_differ_where_scores_do(clip_folder: str, aesthetic_file: str, tmp_path: Path) -> None:
    other = torch.load(aesthetic_file, weights_only=True)
    other["layers.0.bias"] += 1
    torch.save(other, tmp_path / "other.pth")
    scorers = [
        CLIPScorer(clip_folder),
        CLIPScorer(clip_folder, scale="clip_score"),
        CLIPScorer(clip_folder, dtype="bfloat16"),
        CLIPScorer(clip_folder, revision="other"),
        PickScorer(clip_folder, processor=None),
        AestheticScorer(aesthetic_file, clip_folder),
        AestheticScorer(tmp_path / "other.pth", clip_folder),
    ]
    assert len({scorer.identity() for scorer in scorers}) == len(scorers)
    assert CLIPScorer(clip_folder, batch_size=3).identity() == scorers[0].identity()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, path: CLIPScorer("/nowhere/clip").prepare(), "source='/nowhere/clip'"),
        (lambda folder, path: CLIPScorer(folder, device="gpu"), "device is 'gpu'"),
        (lambda folder, path: CLIPScorer(folder, batch_size=0), "clipscore.batch_size is 0"),
        (lambda folder, path: CLIPScorer(folder, name="a b"), "name of a scorer is 'a b'"),
        (lambda folder, path: AestheticScorer(path / "absent.pth", folder), "weights: no file"),
        (lambda folder, path: AestheticScorer(path / "code.pth", folder), "could run code"),
        (lambda folder, path: AestheticScorer(path / "list.pth", folder), "not named tensors"),
        (lambda folder, path: AestheticScorer(path / "two.pth", folder), "no chain of linear layers with one output"),
        (lambda folder, path: AestheticScorer(path / "gap.pth", folder), "does not follow the layer before it"),
    ],
)
def test_settings_that_are_refused_at_once(clip_folder: str, tmp_path: Path, make, message: str) -> None:
    torch.save(print, tmp_path / "code.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}, tmp_path / "two.pth")
    first = {"layers.0.weight": torch.zeros(4, 16), "layers.0.bias": torch.zeros(4)}
    torch.save({**first, "layers.2.weight": torch.zeros(1, 5), "layers.2.bias": torch.zeros(1)}, tmp_path / "gap.pth")
    with pytest.raises(InputError, match=message.replace("[", r"\[")) as error:
        make(clip_folder, tmp_path)
    assert "\n" not in str(error.value)


def test_models_that_are_not_whole(clip_folder: str, tmp_path: Path) -> None:
    folder = Path(write_clip(tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        CLIPScorer(str(folder), device="cpu").prepare()
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"source='.*model': cannot load") as error:
        CLIPScorer(str(folder), device="cpu").prepare()
    assert "\n" not in str(error.value)
