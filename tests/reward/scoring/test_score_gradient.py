"""Differentiable on request: latents and pixels get gradients, everything else no graph."""

import pytest
import torch

from latentreward.reward import ScoringNoise
from tests.marks import rotated_after
from tests.reward.scoring.models import pictures, scoring_model
from tests.tiny_pipelines import LATENTS, PIXELS

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


def test_gradients_in_bfloat16_point_the_same_way() -> None:
    latents, found = torch.randn(2, 4, LATENTS, LATENTS), []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = latents.clone().requires_grad_()
        score = scoring_model("sd35").set_precision(dtype).score_latents(PROMPTS, leaf)
        found += torch.autograd.grad(score.sum(), leaf)
    assert torch.nn.functional.cosine_similarity(*(gradient.flatten() for gradient in found), dim=0) > 0.99
