"""A backbone and a head as one model: noising, ensembles, repeatability, refusals."""

import pytest
import torch

from latentreward.reward import CLIPProjectionHead, GatedQFormerHead, RewardModel, ScoringNoise, normalise_score
from tests.diffusion.backbones.networks import tiny_backbone
from tests.tiny_pipelines import LATENTS

PROMPTS = ["a cat", "", "a dog"]
CASES = [("sd15", "lrm"), ("sdxl", "dina"), ("sd35", "dina"), ("sd3", "lrm")]


def model_of(name: str, head: str) -> RewardModel:
    backbone = tiny_backbone(name)
    spec = backbone.feature_spec
    made = CLIPProjectionHead(spec) if head == "lrm" else GatedQFormerHead(spec, num_heads=2)
    return RewardModel(backbone, made).eval().requires_grad_(False)


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, len(PROMPTS), 4, LATENTS, LATENTS).unbind()


@pytest.mark.parametrize(("name", "head"), CASES)
def test_one_level_is_noising_reading_and_scoring(name: str, head: str) -> None:
    model = model_of(name, head)
    latents, noise = latents_and_noise()
    timestep = model.backbone.noise_process.timesteps_at(torch.tensor([0.4]))
    conditioning, uncond = model.encode_prompts(PROMPTS)
    assert (uncond is None) == (head == "dina")
    noisy = model.backbone.noise_process.add_noise(latents, noise, timestep.repeat(3))
    expected = model.head(model.backbone(noisy, timestep.repeat(3), conditioning, uncond))
    scores = model.score_latents(PROMPTS, latents, noise=ScoringNoise(sigmas=(0.4,)), draws=noise)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(model(noisy, timestep.repeat(3), conditioning, uncond), expected)


def test_lrm_ensemble_is_the_mean() -> None:
    model = model_of("sd15", "lrm")
    latents, noise = latents_and_noise()
    one, other, both = (
        model.score_latents(PROMPTS, latents, noise=ScoringNoise(timesteps=timesteps), draws=noise)
        for timesteps in ((1.0,), (501.0,), (1.0, 501.0))
    )
    torch.testing.assert_close(both, (one + other) / 2)


def test_normalised_scale() -> None:
    torch.testing.assert_close(normalise_score(torch.tensor([-10.0, 0.0, 5.0])), torch.tensor([0.0, 1.0, 1.5]))
    assert normalise_score(2.0).item() == pytest.approx(1.2)
