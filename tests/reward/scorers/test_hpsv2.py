"""HPSv2 on plain transformers gives the numbers of OpenCLIP."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from latentreward.core.errors import InputError
from latentreward.reward import HPSv2Scorer
from latentreward.reward.scorers.hpsv2 import HEADS, MEAN, STD, clip_model, padded_pixels
from tests.tiny_pipelines import clip_tokenizer

GOLDEN = load_file(Path(__file__).parent / "data" / "hpsv2_open_clip.safetensors")
WEIGHTS = {name.removeprefix("state_dict."): value for name, value in GOLDEN.items() if name.startswith("state_dict.")}
SIDE = 28


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in WEIGHTS.items()}}, tmp_path / "h")
    return tmp_path / "h"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    clip_tokenizer().save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def test_converted_weights_give_open_clips_embeddings_and_score() -> None:
    model = clip_model(WEIGHTS, "golden", HEADS, torch.float32)
    seen = model.visual_projection(model.vision_model(pixel_values=GOLDEN["pixels"]).pooler_output)
    said = model.text_projection(model.text_model(input_ids=GOLDEN["ids"]).pooler_output)
    seen, said = normalize(seen, dim=-1), normalize(said, dim=-1)
    torch.testing.assert_close(seen, GOLDEN["image_features"], rtol=0, atol=2e-6)
    torch.testing.assert_close(said, GOLDEN["text_features"], rtol=0, atol=2e-6)
    torch.testing.assert_close((seen * said).sum(dim=-1), GOLDEN["score"], rtol=0, atol=2e-6)


def test_a_score_is_the_cosine_whatever_the_batch(weights: Path, tokenizer: str, pictures: list[Image.Image]) -> None:
    prompts = ["a cat", "two cats", "a cat", "", "a dog", "x" * 300]
    scorer = HPSv2Scorer(str(weights), tokenizer=tokenizer, device="cpu")
    scores = scorer(prompts, pictures)
    one_by_one = torch.cat([scorer([prompt], [picture]) for prompt, picture in zip(prompts, pictures, strict=True)])
    torch.testing.assert_close(scores, one_by_one, rtol=0, atol=2e-6)
    assert scores.abs().max() <= 1
    assert len(set(scores.tolist())) == 6
    percent = HPSv2Scorer(str(weights), tokenizer=tokenizer, device="cpu", scale="percent")
    torch.testing.assert_close(percent(prompts, pictures), 100 * scores)
    assert percent.identity() != scorer.identity()


@pytest.mark.parametrize("size", [(56, 56), (56, 14), (10, 90), (28, 28), (28, 7), (1, 500)])
def test_a_picture_keeps_its_proportions_on_black(size: tuple[int, int]) -> None:
    pixels = padded_pixels(Image.new("RGB", size, (255, 255, 255)), SIDE)
    levels = pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.shape == (3, SIDE, SIDE)
    white = levels.mean(dim=0) > 0.5
    height, width = int(white.any(dim=1).sum()), int(white.any(dim=0).sum())
    assert (width, height) == tuple(max(1, round(length * SIDE / max(size))) for length in size)
    assert int(white.sum()) == height * width
    top, left = np.argwhere(white.numpy()).min(axis=0)
    assert (top, left) == ((SIDE - height) // 2, (SIDE - width) // 2)


def test_wrong_weights_are_one_line(tmp_path: Path, weights: Path, tokenizer: str) -> None:
    (tmp_path / "broken").write_bytes(b"PK\x03\x04 rubbish")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    missing = {name: value for name, value in WEIGHTS.items() if name != "visual.ln_post.bias"}
    torch.save(missing, tmp_path / "missing")
    torch.save(WEIGHTS | {"visual.attn_pool.q": torch.zeros(2)}, tmp_path / "extra")
    for name, message in {
        "broken": "is damaged",
        "other.safetensors": "not those of an OpenCLIP model",
        "missing": "post_layernorm.bias",
        "extra": "attn_pool",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            HPSv2Scorer(str(tmp_path / name), tokenizer=tokenizer, device="cpu").prepare()
        assert "\n" not in str(caught.value)
