"""DiNa-LRM's head on any spec: shapes, what it starts as, ensembles, precision, and tokens on other grids."""

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import nn

from latentreward.reward import GatedQFormerHead, LogisticSquash
from latentreward.reward.heads.gated_qformer import common_grid, resample_tokens
from tests.reward.heads.features import DIT_SPEC, SPECS, UNET_SPEC, random_features


def randomised(head: nn.Module) -> nn.Module:
    """Zero-initialised layers would hide what they multiply."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


@pytest.mark.parametrize("out_dim", [1, 3])
@pytest.mark.parametrize("name", SPECS)
def test_shape_and_gradient(name: str, out_dim: int) -> None:
    head = GatedQFormerHead(SPECS[name], num_heads=4, out_dim=out_dim)
    scores = head(random_features(SPECS[name]))
    assert scores.shape == ((3,) if out_dim == 1 else (3, out_dim))
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_every_feature_matters(name: str) -> None:
    spec = SPECS[name]
    head = randomised(GatedQFormerHead(spec, num_heads=4))
    features = random_features(spec)
    score = head(features)
    for index in range(len(spec.visual)):
        visual = tuple(v + (i == index) for i, v in enumerate(features.visual))
        assert not torch.allclose(head(replace(features, visual=visual)), score)
    for index in range(len(spec.text)):
        text = tuple(t + (i == index) for i, t in enumerate(features.text))
        assert not torch.allclose(head(replace(features, text=text)), score)
    assert not torch.allclose(head(replace(features, temb=features.temb + 1)), score)
    torch.testing.assert_close(head(replace(features, pooled_text=features.pooled_text + 1)), score, rtol=0, atol=0)


def test_time_has_no_say_at_the_start() -> None:
    head = GatedQFormerHead(DIT_SPEC, num_heads=4)
    features = random_features(DIT_SPEC)
    torch.testing.assert_close(head(replace(features, temb=features.temb + 1)), head(features), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("grid", "tokens"), [("smallest", 4), ("largest", 64), ((4, 4), 16), ([1, 1], 1), ((3, 5), 15)]
)
def test_grid_on_which_taps_meet(grid: object, tokens: int) -> None:
    head = GatedQFormerHead(UNET_SPEC, num_heads=4, grid=grid)
    visual, text = head.tokens(random_features(UNET_SPEC))
    assert visual.shape == (3, tokens, 24)
    assert text.shape == (3, 5, 24)


def test_ensemble_of_one_level_is_the_score() -> None:
    head = randomised(GatedQFormerHead(UNET_SPEC, num_heads=4))
    features = random_features(UNET_SPEC)
    torch.testing.assert_close(head.score_ensemble([features]), head(features), rtol=0, atol=0)
    torch.testing.assert_close(head.score_ensemble([features] * 3), head(features), rtol=1e-4, atol=1e-5)


def test_ensemble_joins_tokens_and_differs_from_the_mean() -> None:
    head = randomised(GatedQFormerHead(DIT_SPEC, num_heads=4))
    levels = [random_features(DIT_SPEC) for _ in range(3)]
    score = head.score_ensemble(levels)
    visual, text = zip(*(head.tokens(level) for level in levels), strict=True)
    torch.testing.assert_close(score, head.pool(torch.cat(visual, 1), torch.cat(text, 1)).squeeze(-1), rtol=0, atol=0)
    torch.testing.assert_close(head.score_ensemble(levels[::-1]), score, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score, sum(head(level) for level in levels) / 3)


def test_an_ensemble_does_not_read_padding() -> None:
    head, mask = randomised(GatedQFormerHead(DIT_SPEC, num_heads=4)), (torch.arange(7) < 4).expand(3, 7)
    levels = [replace(random_features(DIT_SPEC), text_mask=mask) for _ in range(2)]
    others = [replace(one, text=tuple(text + 9.0 * ~mask[..., None] for text in one.text)) for one in levels]
    torch.testing.assert_close(head.score_ensemble(others), head.score_ensemble(levels))


@pytest.mark.parametrize(("x", "expected"), [(0.0, 0.0), (0.15, 0.92423), (-0.15, -0.92423), (1e9, 2.0), (-1e9, -2.0)])
def test_logistic_hand_values(x: float, expected: float) -> None:
    squash, value = LogisticSquash(), torch.tensor([x], requires_grad=True)
    score = squash(value)
    assert score.item() == pytest.approx(expected, abs=1e-4)
    score.sum().backward()
    assert value.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_meet_float32_parameters(dtype: torch.dtype) -> None:
    head = randomised(GatedQFormerHead(UNET_SPEC, num_heads=4))
    features = random_features(UNET_SPEC, dtype=dtype)
    expected = head(features.to(torch.float32))
    torch.testing.assert_close(head(features), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert (head(features).float() - expected).abs().max() < 0.1 * expected.abs().max()
    whole = head.to(torch.bfloat16)
    assert whole(features.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("grid", "target"),
    [((6,), (3,)), ((8, 8), (2, 2)), ((4, 6), (2, 3)), ((4, 4, 4), (2, 2, 2)), ((3, 4, 4), (3, 2, 2))],
)
def test_downsampling_averages_cells(grid: tuple[int, ...], target: tuple[int, ...]) -> None:
    tokens = torch.randn(2, prod(grid), 5)
    expected = tokens.unflatten(1, grid)
    for axis, (size, cells) in enumerate(zip(grid, target, strict=True), start=1):
        expected = expected.unflatten(axis, (cells, size // cells)).mean(dim=axis + 1)
    torch.testing.assert_close(resample_tokens(tokens, grid, target), expected.flatten(1, -2))


@pytest.mark.parametrize(("grid", "target"), [((2, 2), (4, 4)), ((2,), (6,)), ((1, 2, 2), (3, 4, 4))])
def test_upsampling_repeats_cells(grid: tuple[int, ...], target: tuple[int, ...]) -> None:
    tokens = torch.randn(2, prod(grid), 5)
    expected = tokens.unflatten(1, grid)
    for axis, (size, cells) in enumerate(zip(grid, target, strict=True), start=1):
        expected = expected.repeat_interleave(cells // size, dim=axis)
    torch.testing.assert_close(resample_tokens(tokens, grid, target), expected.flatten(1, -2))


def test_constant_stays_constant_on_grids_that_do_not_divide() -> None:
    assert resample_tokens(torch.ones(1, 35, 3), (5, 7), (3, 4)).allclose(torch.ones(1, 12, 3))


def test_choice() -> None:
    grids = [(8, 4), (4, 2), (2, 8)]
    assert common_grid(grids) == (4, 2)
    assert common_grid(grids, "largest") == (8, 4)
    assert common_grid(grids, [3, 3]) == (3, 3)
