"""Resampling of tokens between grids of one to three axes."""

from math import prod

import pytest
import torch

from latentreward.reward.heads.gated_qformer import common_grid, resample_tokens


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
