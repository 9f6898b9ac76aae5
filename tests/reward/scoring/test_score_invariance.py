"""A score depends on prompt and image alone: not on the batch, the order, the process, and little on the precision."""

import pytest
import torch
from torch import nn

from latentreward.core.errors import InputError
from latentreward.reward import RewardModel, ScoringNoise
from tests.marks import rotated_after, slow_after
from tests.reward.scoring.models import PROMPTS, pictures, scoring_model
from tests.tiny_pipelines import LATENTS

# Scores are sums of some thousand float32 products, whose order differs with the batch and the processor: an AMD EPYC
# showed 2.2e-5 at a score of 1.19.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
COUNT = 24


def prompts_of(count: int) -> list[str]:
    return [PROMPTS[row % len(PROMPTS)] for row in range(count)]


@pytest.fixture(scope="module", params=[*slow_after(1, ["sd15", "sd35"]), *rotated_after(0, ["sdxl"])])
def model(request: pytest.FixtureRequest) -> RewardModel:
    return scoring_model(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", rotated_after(1, [True, False]), ids=["mixed shapes", "one shape"])
def test_batch_size_does_not_matter(model: RewardModel, mixed: bool) -> None:
    images, prompts = pictures(COUNT, mixed), prompts_of(COUNT)
    expected = model.score(prompts, images, batch_size=8)
    for size in (1, 3, 7, 16, 64):
        torch.testing.assert_close(model.score(prompts, images, batch_size=size), expected, **CLOSE)


@pytest.mark.parametrize("size", rotated_after(2, [2, 3, 5, 8, 11, 24]))
def test_a_row_of_a_batch_is_like_any_other(model: RewardModel, size: int) -> None:
    """Batches that are no multiple of 4, too: the same image is scored alike wherever it stands."""
    latents = torch.randn(1, 4, LATENTS, LATENTS).repeat(size, 1, 1, 1)
    for noise in (model.noise, ScoringNoise(sigmas=(0.2, 0.5))):
        scores = model.score_latents("a cat", latents, noise=noise, batch_size=size)
        whole = scores[: size - size % 4]
        assert torch.equal(whole, scores[:1].expand_as(whole))
        rest = scores[size - size % 4 :]
        assert torch.equal(rest, scores[-1:].expand_as(rest))
        torch.testing.assert_close(scores[:1], scores[-1:], **CLOSE)


@pytest.mark.parametrize("mixed", rotated_after(1, [True, False]), ids=["mixed shapes", "one shape"])
def test_repeats_and_any_order_give_the_same_bits(model: RewardModel, mixed: bool) -> None:
    images, prompts = pictures(COUNT, mixed), prompts_of(COUNT)
    expected = model.score(prompts, images, batch_size=8)
    torch.manual_seed(99)
    assert torch.equal(model.score(prompts, images, batch_size=8), expected)
    for seed in range(3):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = model.score([prompts[i] for i in order], [images[i] for i in order], batch_size=8)
        assert torch.equal(shuffled, expected[order])


def test_bfloat16_keeps_head_vae_and_scores_in_float32(model: RewardModel) -> None:
    name = "sd15" if model.backbone.network_name == "unet" else "sd35"
    exact, half = scoring_model(name), scoring_model(name).set_precision(torch.bfloat16)
    images, prompts = pictures(COUNT), prompts_of(COUNT)
    levels = [exact.noise, ScoringNoise(sigmas=(0.2, 0.5, 0.7))]
    expected, found = (each.score_levels(prompts, images, levels) for each in (exact, half))
    assert found.dtype == torch.float32
    assert {p.dtype for part in (half.head, half.backbone.vae) for p in part.parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in half.backbone.parameters()}
    for of_float, of_half in zip(expected.T, found.T, strict=True):
        change = (of_half - of_float).abs() / of_float.std()
        assert 0 < change.max() < 0.15  # random weights spread the scores less than training does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_is_refused_and_changes_nothing(dtype: torch.dtype) -> None:
    """The identity would go on naming the old precision, and rounded weights would be saved."""
    model = scoring_model("sd15").set_precision(dtype)
    identity, before = model.identity, {name: weight.clone() for name, weight in model.state_dict().items()}
    casts = [
        lambda: model.to(torch.float64),
        lambda: model.to("cpu", torch.float16),
        model.half,
        model.double,
        lambda: nn.Sequential(model).double(),
        model.bfloat16 if dtype == torch.float32 else model.float,
    ]
    for cast in casts:
        with pytest.raises(InputError, match=r"is not cast .*dtype=torch.bfloat16 or torch.float32 in from_pretrained"):
            cast()
    assert model.identity == identity
    assert {name: weight.dtype for name, weight in model.state_dict().items()} == {
        name: weight.dtype for name, weight in before.items()
    }
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
