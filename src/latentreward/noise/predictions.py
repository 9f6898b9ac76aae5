"""Predicted clean latents and noise from a network's output, and the noise of a DDIM step, for every noise process.

A state is a·x_0 + s·ε. Flow matching has a = 1 − σ, s = σ; DDPM a = √ᾱ, s = √(1 − ᾱ); Euler's sampler a = 1, s = σ.
"""

from typing import TypeVar

from torch import Tensor

Level = TypeVar("Level", Tensor, float)


def predicted_clean(
    kind: str, states: Tensor, output: Tensor, signal: Tensor | float, spread: Tensor | float
) -> Tensor:
    """Compute the clean latents x̂_0 that a network predicts for ``states``.

    Args:
        kind: What the network predicts: ``epsilon``, ``v_prediction`` (arXiv:2202.00512) or ``flow``, the velocity
            ε − x_0.
        states: ``(B, C, ...)`` noisy latents.
        output: ``(B, C, ...)`` the network's output for ``states``.
        signal: Factor a of the state, broadcastable over ``states``.
        spread: Factor s of the state, broadcastable over ``states``.
    """
    if kind == "flow":
        return states - spread * output
    if kind == "v_prediction":
        return signal * states - spread * output
    return (states - spread * output) / signal


def predicted_noise(kind: str, states: Tensor, output: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """Compute the noise ε̂ that an ``epsilon`` or ``v_prediction`` network predicts; see :func:`predicted_clean`."""
    return output if kind == "epsilon" else signal * output + spread * states


def ancestral_variance(level: tuple[Level, Level], following: tuple[Level, Level], eta: float) -> Level:
    r"""Compute the variance τ² of the noise in DDIM's step from level (a², s²) to (a'², s'²).

    The step (arXiv:2010.02502, eq. 12 and 16), with standard normal noise ξ, is

    .. math:: x' = a'\hat x_0 + \sqrt{s'^2 - \tau^2}\,\hat\varepsilon + \tau\xi, \quad
        \tau^2 = \eta^2 \frac{s'^2}{s^2}\Bigl(s^2 - \frac{a^2 s'^2}{a'^2}\Bigr)

    The marginal of x' is the same for every η in [0, 1]. η = 1 gives the posterior q(x' | x, x̂_0) of the forward
    process, η = 0 the deterministic step. A step to a clean state (s' = 0) adds no noise: τ = 0.

    Args:
        level: (a², s²) before the step.
        following: (a'², s'²) after the step.
        eta: η.
    """
    (signal, spread), (next_signal, next_spread) = level, following
    return eta**2 * next_spread / spread * (spread - signal * next_spread / next_signal)
