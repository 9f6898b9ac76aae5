"""Resampling of tokens from one grid to another."""

from collections.abc import Sequence
from math import prod

from torch import Tensor
from torch.nn import functional as F

from latentreward.errors import InputError

_POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def resample_tokens(tokens: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Resample tokens from ``grid`` to the grid ``target`` by adaptive average pooling.

    A finer ``target`` is possible too; tokens then repeat.

    Args:
        tokens: ``(B, prod(grid), D)``, in row-major order.
        grid: Present number of tokens along each of one to three axes (text, image, video).
        target: New number of tokens along each axis.

    Returns:
        ``(B, prod(target), D)``.
    """
    if grid == target:
        return tokens
    field = tokens.transpose(1, 2).unflatten(2, grid)
    return _POOL[len(grid)](field, target).flatten(2).transpose(1, 2)


def common_grid(grids: Sequence[tuple[int, ...]], choice: str | Sequence[int] = "smallest") -> tuple[int, ...]:
    """Return the grid to which all taps are resampled.

    Raises:
        InputError: If ``choice`` is another text, or a grid with the wrong number of axes or a side below 1.
    """
    if choice == "smallest":
        return min(grids, key=prod)
    if choice == "largest":
        return max(grids, key=prod)
    if isinstance(choice, str) or len(choice) != len(grids[0]) or min(choice) < 1:
        raise InputError(f"grid={choice!r} must be 'smallest', 'largest' or {len(grids[0])} positive whole numbers")
    return tuple(choice)
