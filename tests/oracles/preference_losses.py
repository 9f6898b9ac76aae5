"""Preference losses from their formulas: one pair at a time in 50 digits (mpmath), the batch criterion in numpy."""

from collections.abc import Callable

import mpmath
import numpy as np
from mpmath import mpf

mpmath.mp.dps = 50


def ndtr(z: mpf) -> mpf:
    return mpmath.erfc(-z / mpmath.sqrt(2)) / 2


def z_of(margin: mpf, chosen_sigma: float, rejected_sigma: float, k: float, sigma_u: float) -> mpf:
    """Margin in units of the comparison's standard deviation."""
    variance = k * (mpf(chosen_sigma) ** 2 + mpf(rejected_sigma) ** 2) + 2 * mpf(sigma_u) ** 2
    return mpf(margin) / mpmath.sqrt(variance)


def mixture(z: mpf, y: float) -> mpf:
    return 1 - mpmath.sqrt(y * ndtr(z) + (1 - mpf(y)) * ndtr(-z))


def bhattacharyya(z: mpf, y: float) -> mpf:
    return 1 - mpmath.sqrt(y * ndtr(z)) - mpmath.sqrt((1 - mpf(y)) * ndtr(-z))


def thurstone_nll(z: mpf, y: float) -> mpf:
    return -y * mpmath.log(ndtr(z)) - (1 - mpf(y)) * mpmath.log(ndtr(-z))


def bradley_terry(d: mpf, y: float) -> mpf:
    return y * mpmath.log1p(mpmath.exp(-d)) + (1 - mpf(y)) * mpmath.log1p(mpmath.exp(d))


def slope(function: Callable[[mpf], mpf], at: mpf) -> mpf:
    """Derivative by central difference in 120 digits."""
    with mpmath.workdps(120):
        h = mpf(10) ** -40
        return (function(at + h) - function(at - h)) / (2 * h)


def cross_entropy(logits: np.ndarray, target: int) -> float:
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()) - logits[target])


def lrm_criterion(
    image_0: np.ndarray,
    image_1: np.ndarray,
    text: np.ndarray,
    *,
    log_scale: float,
    label_0: np.ndarray,
    weight: np.ndarray,
    differ: np.ndarray,
    mode: str,
    batch_coeff: float,
    aux_loss_coeff: float,
) -> float:
    """LRM's criterion on L2-normalised features ``(N, D)`` in float64, row by row."""
    scale, rows = np.exp(log_scale), len(text)
    images = np.concatenate([image_0, image_1])
    total = 0.0
    for i in range(rows):
        y, tie = label_0[i], np.log(0.5) if label_0[i] == 0.5 else 0.0
        z = scale * np.array([text[i] @ image_0[i], text[i] @ image_1[i]])
        pair = y * cross_entropy(z, 0) + (1 - y) * cross_entropy(z, 1) + tie
        to_text = y * cross_entropy(scale * text @ image_0[i], i) + (1 - y) * cross_entropy(
            scale * text @ image_1[i], i
        )
        over_images = scale * images @ text[i]
        to_image = y * cross_entropy(over_images, i) + (1 - y) * cross_entropy(over_images, rows + i) + tie
        batch = (to_text + to_image) / 2
        loss = {"pair": pair, "batch": batch, "both": pair + batch_coeff * batch}[mode]
        total += weight[i] * (aux_loss_coeff if differ[i] else 1.0) * loss
    return float(total / weight.sum())
