"""Bring tokens of different grids onto one."""

from collections.abc import Sequence
from math import prod

from torch import Tensor
from torch.nn import functional as F

from latentreward.errors import InputError

_POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def resample_tokens(tokens: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Average ``tokens`` ``(B, prod(grid), D)``, row-major, into ``target``'s cells: ``(B, prod(target), D)``.

    Works for one to three axes (text, image, video), also from a coarse grid to a finer one, where cells repeat.
    """
    if grid == target:
        return tokens
    field = tokens.transpose(1, 2).unflatten(2, grid)
    return _POOL[len(grid)](field, target).flatten(2).transpose(1, 2)


def common_grid(grids: Sequence[tuple[int, ...]], choice: str | Sequence[int] = "smallest") -> tuple[int, ...]:
    """The grid on which taps are joined.

    Args:
        grids: One per tap.
        choice: ``smallest``, ``largest``, or the grid itself.

    Raises:
        InputError: If ``choice`` is none of these, or has another number of axes.
    """
    if choice == "smallest":
        return min(grids, key=prod)
    if choice == "largest":
        return max(grids, key=prod)
    if isinstance(choice, str) or len(choice) != len(grids[0]) or min(choice) < 1:
        raise InputError(f"grid={choice!r} must be 'smallest', 'largest' or {len(grids[0])} positive whole numbers")
    return tuple(choice)
