"""Interface of the samplers that rollouts use, for every noise process."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise.base import per_sample
from latentreward.rollout.transition import Transition

TIMESTEP_TOLERANCE = 1e-2
"""Largest difference, from rounding, at which two timesteps count as equal; neighbours lie further apart."""

_TOLD: ContextVar[Callable[[], None] | None] = ContextVar("told", default=None)


@contextmanager
def telling_steps(tell: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` after each step of all sampling inside the block, to show progress."""
    token = _TOLD.set(tell)
    try:
        yield
    finally:
        _TOLD.reset(token)


class StepSampler(ABC):
    """Sampler on a diffusers scheduler's timesteps, whose steps are Gaussian transitions with a log-probability.

    In every method the rows of a batch may be at different timesteps. Arithmetic is float32, also under autocast.

    Attributes:
        timesteps: ``(T,)`` float32 on the CPU, descending: the network's timestep at each step.
        noise_std: ``(T,)`` float32: standard deviation of each step's noise, on which selection thresholds depend.
        noise_setting: Name and value of the setting that scales the noise, for messages.
    """

    timesteps: Tensor
    noise_std: Tensor
    noise_setting: str

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.timesteps)

    def steps(self) -> Iterator[tuple[int, float]]:
        """Iterate over index and timestep of the steps of a sampling."""
        for step in enumerate(self.timesteps.tolist()):
            yield step
            if (tell := _TOLD.get()) is not None:
                tell()

    @abstractmethod
    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        """Return the distribution of the next states after ``latents`` ``(B, C, ...)`` at ``timesteps`` ``(B,)``.

        Args:
            latents: States x_t, any dtype.
            model_output: Output of the (guided) network for ``latents``.
            timesteps: Members of :attr:`timesteps`; tensors on the CPU avoid a wait for the accelerator.

        Raises:
            InputError: If a timestep is not one of this sampler's.
        """

    @abstractmethod
    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        """Predict clean latents x̂_0 ``(B, C, ...)``, float32; arguments as in :meth:`transition`."""

    def next_timestep(self, index: int) -> float:
        """Return the timestep of the states after step ``index``; 0 after the last step."""
        return float(self.timesteps[index + 1]) if index + 1 < len(self.timesteps) else 0.0

    def require_noise(self) -> None:
        """Check that at least one step adds noise.

        Raises:
            InputError: If all steps are deterministic: then there is no log-probability, and all candidates are equal.
        """
        if not (self.noise_std > 0).any():
            raise InputError(
                f"with sampling.{self.noise_setting} none of the {len(self)} steps adds noise, and without noise there "
                "is neither a log-probability nor a step to guide; raise it"
            )

    def step_index(self, timesteps: Tensor) -> Tensor:
        """Return the index of the step at each of ``timesteps`` ``(B,)``, int64 on the CPU.

        Raises:
            InputError: If a timestep is not one of this sampler's.
        """
        values = timesteps.detach().to("cpu", torch.float32)
        distance, index = (self.timesteps - values[:, None]).abs().min(dim=1)
        foreign = values[distance > TIMESTEP_TOLERANCE]
        if foreign.numel():
            raise InputError(
                f"timestep {foreign[0].item():g} is none of the {len(self)} steps of this sampler; use the sampling "
                "settings that the states were drawn with"
            )
        return index

    def _columns(self, table: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """Look up the rows of a ``(T, n)`` table, one row per step, at ``timesteps`` ``(B,)``.

        Returns:
            n columns, each shaped to broadcast over ``like`` ``(B, ...)``.
        """
        rows = table[self.step_index(timesteps)].to(like.device)
        return tuple(per_sample(column, like) for column in rows.unbind(dim=1))
