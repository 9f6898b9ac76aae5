"""Noise levels and draws are named by prompt, seed, level and shape alone; scores by hand, and their gradients."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from latentreward.core.running import scoring_generator
from latentreward.diffusion import DDPM, FlowMatching
from latentreward.reward import CLIPProjectionHead, GatedQFormerHead, RewardModel, ScoringNoise, normalise_score
from latentreward.reward.scoring.scoring_noise import draw_noise, timesteps_of
from tests.diffusion.backbones.networks import tiny_backbone
from tests.marks import rotated_after
from tests.reward.scoring.models import pictures, scoring_model
from tests.tiny_pipelines import LATENTS, PIXELS

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


THREE = ["a cat", "", "a dog"]
CASES = [("sd15", "lrm"), ("sd35", "dina")]


def model_of(name: str, head: str) -> RewardModel:
    backbone = tiny_backbone(name)
    spec = backbone.feature_spec
    made = CLIPProjectionHead(spec) if head == "lrm" else GatedQFormerHead(spec, num_heads=2)
    return RewardModel(backbone, made).eval().requires_grad_(False)


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, len(THREE), 4, LATENTS, LATENTS).unbind()


@pytest.mark.parametrize(("name", "head"), CASES)
def test_one_level_is_noising_reading_and_scoring(name: str, head: str) -> None:
    model = model_of(name, head)
    latents, noise = latents_and_noise()
    timestep = model.backbone.noise_process.timesteps_at(torch.tensor([0.4]))
    conditioning, uncond = model.encode_prompts(THREE)
    assert (uncond is None) == (head == "dina")
    noisy = model.backbone.noise_process.add_noise(latents, noise, timestep.repeat(3))
    expected = model.head(model.backbone(noisy, timestep.repeat(3), conditioning, uncond))
    scores = model.score_latents(THREE, latents, noise=ScoringNoise(sigmas=(0.4,)), draws=noise)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(model(noisy, timestep.repeat(3), conditioning, uncond), expected)


def test_normalised_scale() -> None:
    torch.testing.assert_close(normalise_score(torch.tensor([-10.0, 0.0, 5.0])), torch.tensor([0.0, 1.0, 1.5]))
    assert normalise_score(2.0).item() == pytest.approx(1.2)


PROMPTS = ["a cat", "a dog"]


@pytest.mark.parametrize("sigmas", [(0.5,), (0.2, 0.7)])
@pytest.mark.parametrize("of", ["latents", "pixels"])
@pytest.mark.parametrize("name", rotated_after(2, ["sd15", "sd35"]))
def test_gradients_equal_finite_differences(name: str, of: str, sigmas: tuple[float, ...]) -> None:
    """Along a random direction, in float64; heads compute norms and means in float32."""
    model, noise = scoring_model(name), ScoringNoise(sigmas=sigmas)
    for part in model.children():  # the whole model refuses to be cast
        part.double()
    shape = (2, 4, LATENTS, LATENTS) if of == "latents" else (2, 3, PIXELS, PIXELS)
    start, direction = 0.8 * torch.rand(2, *shape, dtype=torch.float64) - 0.4
    start.requires_grad_()

    def scores(values: torch.Tensor) -> torch.Tensor:
        score = model.score_latents if of == "latents" else model.score
        return score(PROMPTS, values, noise=noise)

    (gradient,) = torch.autograd.grad(scores(start).sum(), start)
    step = 3e-3
    with torch.no_grad():
        slope = (scores(start + step * direction) - scores(start - step * direction)).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-3, atol=1e-3 * gradient.norm().item())


def test_a_row_gets_the_gradient_of_its_own_score() -> None:
    model, latents = scoring_model("sd35"), torch.randn(4, 4, LATENTS, LATENTS, requires_grad=True)
    scores = model.score_latents(["a", "b", "a", "b"], latents, batch_size=3)
    (gradient,) = torch.autograd.grad(scores[1], latents)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2, 3]].abs().sum() == 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("trains", [False, True])
def test_no_graph_unless_asked_for(trains: bool) -> None:
    model = scoring_model("sd15").requires_grad_(trains)
    latents, pixels = torch.randn(2, 4, LATENTS, LATENTS), torch.zeros(2, 3, PIXELS, PIXELS)
    assert not model.score_latents(PROMPTS, latents).requires_grad
    assert not model.score(PROMPTS, pixels).requires_grad
    assert not model.score(PROMPTS, pictures(2)).requires_grad
    for values, score in ((latents, model.score_latents), (pixels, model.score)):
        values.requires_grad_()
        assert score(PROMPTS, values).requires_grad
        with torch.no_grad():
            assert not score(PROMPTS, values).requires_grad
        with torch.inference_mode():
            assert not score(PROMPTS, values).requires_grad


def test_half_precision_latents_are_noised_in_float32(dina: RewardModel) -> None:
    latents = torch.randn(2, *SHAPE).half()
    assert torch.equal(dina.score_latents("a cat", latents), dina.score_latents("a cat", latents.float()))


def test_the_score_of_several_timesteps_of_lrm_is_the_mean_of_theirs(lrm: RewardModel) -> None:
    latents, noise = torch.randn(2, 2, *SHAPE)
    one, other, both = (
        lrm.score_latents("a cat", latents, noise=ScoringNoise(timesteps=timesteps), draws=noise)
        for timesteps in ((1.0,), (501.0,), (1.0, 501.0))
    )
    torch.testing.assert_close(both, (one + other) / 2)
