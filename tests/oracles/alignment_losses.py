"""Losses of alignment from their formulas in numpy, float64, one row at a time."""

import numpy as np


def log_sigmoid(x: float) -> float:
    return float(-np.logaddexp(0.0, -x))


def step_dpo(rows: np.ndarray, beta: float, clip_range: float) -> float:
    """Mean loss of rows (chosen, rejected, chosen under the reference, rejected under the reference)."""
    losses = []
    for chosen, rejected, ref_chosen, ref_rejected in rows:
        win = np.clip(np.exp(chosen - ref_chosen), 1 - clip_range, 1 + clip_range)
        lose = np.clip(np.exp(rejected - ref_rejected), 1 - clip_range, 1 + clip_range)
        losses.append(-log_sigmoid(beta * np.log(win) - beta * np.log(lose)))
    return float(np.mean(losses))


def diffusion_dpo(prediction: np.ndarray, reference: np.ndarray, target: np.ndarray, beta: float) -> float:
    """Rows ``(2B, …)``, the better images first."""
    error = [np.mean((f - y) ** 2) for f, y in zip(prediction, target, strict=True)]
    ref_error = [np.mean((f - y) ** 2) for f, y in zip(reference, target, strict=True)]
    pairs, losses = len(target) // 2, []
    for i in range(pairs):
        inside = -0.5 * beta * ((error[i] - error[pairs + i]) - (ref_error[i] - ref_error[pairs + i]))
        losses.append(-log_sigmoid(inside))
    return float(np.mean(losses))
