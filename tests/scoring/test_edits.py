"""A reward of an editor scores results for an instruction and the pictures that were edited."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentreward.backbones import create_backbone
from latentreward.data.image_sizes import OneSize
from latentreward.errors import InputError
from latentreward.heads import GatedQFormerHead
from latentreward.scoring import RewardModel, edit_prompt
from tests.families.twins import TWINS


@pytest.fixture(scope="module")
def model() -> RewardModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("flux2_klein", source=TWINS["klein_base"].folder, visual_taps=(1, 2), text_taps=(1,))
        head = GatedQFormerHead(backbone.feature_spec, num_heads=2)
    found = RewardModel(backbone, head).eval()
    found.image_sizes = OneSize(32, 48)
    return found


RED, BLUE = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))


@torch.no_grad()
def test_scores_depend_on_the_pictures_that_were_edited(model: RewardModel, tmp_path: Path) -> None:
    BLUE.save(tmp_path / "blue.png")
    pictures = RED, [RED], BLUE, [RED, BLUE], [BLUE, RED]
    prompts = ["make it red", *(edit_prompt("make it red", given) for given in pictures)]
    prompts.append(edit_prompt("make it red", tmp_path / "blue.png"))
    scores = model.score(prompts, [RED] * len(prompts), batch_size=2)
    assert scores[1] == scores[2] and scores[3].item() == pytest.approx(scores[6].item(), abs=1e-5)
    assert len({*scores[[0, 1, 3, 4, 5]].tolist()}) == 5
    again = torch.cat([model.score(prompt, RED) for prompt in prompts])
    assert torch.allclose(scores, again, atol=2e-5)


@torch.no_grad()
def test_latents_and_images_score_alike(model: RewardModel) -> None:
    prompts = [edit_prompt("make it red", BLUE), edit_prompt("make it red", RED)]
    pixels = torch.from_numpy(np.array(RED.resize((48, 32)))).permute(2, 0, 1).float().repeat(2, 1, 1, 1) / 127.5 - 1
    by_pixels = model.score(prompts, pixels, value_range=(-1, 1))
    by_latents = model.score_latents(prompts, model.encode_images(pixels))
    assert torch.allclose(by_pixels, by_latents, atol=2e-5)


def test_a_reward_of_text_to_image_takes_no_edit() -> None:
    backbone = create_backbone("flux1", source=TWINS["flux1_dev"].folder, visual_taps=(1,), text_taps=())
    head = GatedQFormerHead(backbone.feature_spec, num_heads=2)
    with pytest.raises(InputError, match="'make it red' edits a picture, but the network makes"):
        RewardModel(backbone, head).eval().score(edit_prompt("make it red", BLUE), RED)
