"""Noise levels and draws: named by prompt, seed, level and shape, and nothing else."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from latentreward.core.running import scoring_generator
from latentreward.diffusion import DDPM, FlowMatching
from latentreward.reward import RewardModel, ScoringNoise
from latentreward.reward.scoring.scoring_noise import draw_noise, timesteps_of
from tests.reward.scoring.models import pictures, scoring_model
from tests.tiny_pipelines import LATENTS

SHAPE = (4, LATENTS, LATENTS)


@pytest.fixture(scope="module")
def dina() -> RewardModel:
    return scoring_model("sd35")


@pytest.fixture(scope="module")
def lrm() -> RewardModel:
    return scoring_model("sd15")


def draw(prompts: Sequence[str], seed: int = 0, sigma: float = 0.4) -> Tensor:
    return draw_noise(prompts, seed, sigma, SHAPE)


def test_images_of_a_prompt_share_their_noise() -> None:
    both = draw(["a cat", "a dog", "a cat"])
    assert torch.equal(both[0], both[2])
    assert not torch.equal(both[0], both[1])
    assert both.dtype == torch.float32


def test_every_part_of_the_name_counts_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = draw(["a cat"])
    torch.manual_seed(2)
    assert torch.equal(draw(["a dog", "a cat"])[1:], first)
    others = [draw(["a cat "]), draw(["a cat"], seed=1), draw(["a cat"], sigma=0.41)]
    assert all(not torch.equal(other, first) for other in others)
    wider = draw_noise(["a cat"], 0, 0.4, (4, LATENTS, 2 * LATENTS))
    assert not torch.equal(wider.flatten()[:64], first.flatten()[:64])


def test_the_draw_is_the_same_on_every_machine() -> None:
    """Recorded with torch 2.13; a change would silently change every published score."""
    values = torch.randn(3, generator=scoring_generator("a cat", 0, 0.4, SHAPE))
    torch.testing.assert_close(values, torch.tensor(RECORDED))


RECORDED = [-0.5710318088531494, -1.3747307062149048, -0.28207162022590637]


def test_levels_are_those_of_the_models_process() -> None:
    flow, ddpm = FlowMatching(), DDPM(torch.linspace(0.999, 0.005, 1000))
    assert timesteps_of(ScoringNoise(sigmas=(0.0,)), flow).item() == pytest.approx(2.994, abs=1e-3)
    torch.testing.assert_close(timesteps_of(ScoringNoise(timesteps=(1, 951)), ddpm), torch.tensor([1.0, 951.0]))
    named = flow.sigma(timesteps_of(ScoringNoise(timesteps=(400.0,)), flow))
    torch.testing.assert_close(named, flow.sigma(timesteps_of(ScoringNoise(sigmas=(0.4,)), flow)))


def test_defaults_are_timestep_1_and_sigma_04(lrm: RewardModel, dina: RewardModel) -> None:
    images = pictures(2)
    for model, noise in ((lrm, ScoringNoise(timesteps=(1,))), (dina, ScoringNoise(sigmas=(0.4,)))):
        assert model.noise == noise
        assert torch.equal(model.score("a cat", images), model.score("a cat", images, noise=noise))


@pytest.mark.parametrize("name", ["lrm", "dina"])
def test_k_settings_are_k_scores_with_one_encoding(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    levels = [
        model.noise,
        ScoringNoise(sigmas=(0.2, 0.5, 0.7)),
        ScoringNoise(sigmas=(0.7,), seeds=(3, 4)),
    ]
    prompts, images = ["a cat", "a dog", "a cat", ""], pictures(4)
    calls: list[int] = []
    handle = model.backbone.vae.vae.encoder.register_forward_hook(lambda module, inputs, output: calls.append(1))
    together = model.score_levels(prompts, images, levels)
    assert len(calls) == 1
    handle.remove()
    each = [model.score(prompts, images, noise=noise) for noise in levels]
    assert torch.equal(together, torch.stack(each, dim=1))


def test_each_level_of_an_ensemble_has_its_own_draw(dina: RewardModel) -> None:
    latents = torch.randn(1, *SHAPE)
    sigmas = (0.2, 0.5, 0.7)
    process, (conditioning, _) = dina.backbone.noise_process, dina.encode_prompts(["a cat"])
    features = []
    for timestep in process.timesteps_at(torch.tensor(sigmas)):
        (sigma,) = process.sigma(timestep[None]).tolist()
        noisy = process.add_noise(latents, draw(["a cat"], sigma=sigma), timestep[None])
        features.append(dina.backbone(noisy, timestep[None], conditioning))
    expected = dina.head.score_ensemble(features)
    torch.testing.assert_close(dina.score_latents(["a cat"], latents, noise=ScoringNoise(sigmas=sigmas)), expected)


def test_given_conditioning_stands_for_the_prompts(lrm: RewardModel) -> None:
    latents = torch.randn(2, *SHAPE)
    conditioning, uncond = lrm.encode_prompts(["a cat", "a dog"])
    expected = lrm.score_latents(["a cat", "a dog"], latents)
    for empty in (uncond, None):
        given = lrm.score_latents(["a cat", "a dog"], latents, conditioning=(conditioning, empty))
        torch.testing.assert_close(given, expected)


def test_several_seeds_are_averaged(dina: RewardModel) -> None:
    images = pictures(2)
    each = [dina.score("a cat", images, noise=ScoringNoise(sigmas=(0.6,), seeds=(seed,))) for seed in (0, 1, 7)]
    mean = dina.score("a cat", images, noise=ScoringNoise(sigmas=(0.6,), seeds=(0, 1, 7)))
    torch.testing.assert_close(mean, torch.stack(each).mean(dim=0))
    assert not torch.equal(each[0], each[1])


def test_half_precision_latents_are_noised_in_float32(dina: RewardModel) -> None:
    latents = torch.randn(2, *SHAPE).half()
    assert torch.equal(dina.score_latents("a cat", latents), dina.score_latents("a cat", latents.float()))
