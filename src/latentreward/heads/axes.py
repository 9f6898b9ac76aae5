"""Two axes of a reward: how well an image follows its prompt, and how good it looks."""

import math
from collections.abc import Sequence

from latentreward.errors import InputError

AXES = ("fidelity", "aesthetics")
"""Names of the two scores of a head with axes, in the order of its outputs."""


def check_axes(axes: Sequence[float] | None) -> tuple[float, float] | None:
    """Check the weights of the two axes in the score, and return them; None for a head with one score.

    Raises:
        InputError: If there are not two finite weights of at least 0, one of them positive.
    """
    if axes is None:
        return None
    sound = len(axes) == len(AXES) and all(math.isfinite(weight) and weight >= 0 for weight in axes) and sum(axes) > 0
    if not sound:
        raise InputError(
            f"axes={list(axes)} must be two weights of at least 0, those of {' and '.join(AXES)}, such as [0.5, 0.5]; "
            "null gives one score"
        )
    first, second = (float(weight) for weight in axes)
    return first, second
