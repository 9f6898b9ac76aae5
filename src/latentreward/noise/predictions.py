"""What a network's output says of a state a·x_0 + s·ε, and DDIM's step with noise, for every noise process.

Flow matching has a = 1 − σ, s = σ; DDPM a = √ᾱ, s = √(1 − ᾱ); Euler's sampler a = 1, s = σ.
"""

from typing import TypeVar

from torch import Tensor

Level = TypeVar("Level", Tensor, float)


def predicted_clean(
    kind: str, states: Tensor, output: Tensor, signal: Tensor | float, spread: Tensor | float
) -> Tensor:
    """Clean latents x̂_0 that a network sees in ``states``.

    Args:
        kind: What is predicted: ``epsilon``, ``v_prediction`` (arXiv:2202.00512) or ``flow``, the velocity ε − x_0.
        states: ``(B, C, ...)``.
        output: The network's for them.
        signal: a, broadcastable over ``states``.
        spread: s.
    """
    if kind == "flow":
        return states - spread * output
    if kind == "v_prediction":
        return signal * states - spread * output
    return (states - spread * output) / signal


def predicted_noise(kind: str, states: Tensor, output: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """Noise ε̂ that a network of ``epsilon`` or ``v_prediction`` sees; see :func:`predicted_clean`."""
    return output if kind == "epsilon" else signal * output + spread * states


def ancestral_variance(level: tuple[Level, Level], following: tuple[Level, Level], eta: float) -> Level:
    r"""Variance τ² of the noise in DDIM's step (arXiv:2010.02502, eq. 12 and 16) from level (a², s²) to (a'², s'²).

    .. math:: x' = a'\hat x_0 + \sqrt{s'^2 - \tau^2}\,\hat\varepsilon + \tau\xi, \quad
        \tau^2 = \eta^2 \frac{s'^2}{s^2}\Bigl(s^2 - \frac{a^2 s'^2}{a'^2}\Bigr)

    has the same marginal for every η in [0, 1]; η = 1 is the posterior q(x' | x, x̂_0) of the forward process, 0 the
    deterministic step. Nothing is added to a clean state: s' = 0 gives τ = 0.
    """
    (signal, spread), (next_signal, next_spread) = level, following
    return eta**2 * next_spread / spread * (spread - signal * next_spread / next_signal)
