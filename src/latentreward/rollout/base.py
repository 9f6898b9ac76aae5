"""What rollouts ask of a sampler, whatever the noise process."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise.base import per_sample
from latentreward.rollout.transition import Transition

TIMESTEP_TOLERANCE = 1e-2
"""A timestep that lies this near to a sampler's is taken for it: rounding, never a neighbour."""


def make_scheduler(family: Any, config: Mapping[str, Any], num_inference_steps: int) -> Any:
    """A diffusers scheduler, on the CPU, whose timesteps are set.

    Args:
        family: Class of the scheduler.
        config: The pipeline's saved scheduler config, of this class or a related one.
        num_inference_steps: Number of steps.

    Raises:
        InputError: If it cannot make so many steps.
    """
    with torch.device("cpu"):
        scheduler = family.from_config({**config, "_class_name": family.__name__})
        levels = len(scheduler.timesteps)
        if not 1 <= num_inference_steps <= levels:
            raise InputError(
                f"num_inference_steps={num_inference_steps} must lie in 1..{levels}, the scheduler's levels"
            )
        scheduler.set_timesteps(num_inference_steps)
    return scheduler


class StepSampler(ABC):
    """A diffusers scheduler's timesteps, and the Gaussian step between neighbours among them.

    Every method takes rows at different timesteps in one batch; arithmetic is float32, also under autocast.

    Attributes:
        timesteps: ``(T,)`` float32 on the CPU, descending: what the network takes at each step.
        noise_std: ``(T,)`` float32: standard deviation of each step's noise; selection thresholds follow it.
        noise_setting: Setting that scales the noise and its value, for messages.
    """

    timesteps: Tensor
    noise_std: Tensor
    noise_setting: str

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.timesteps)

    @abstractmethod
    def transition(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Transition:
        """Distribution of the next states of ``latents`` ``(B, C, ...)`` at ``timesteps`` ``(B,)``.

        Args:
            latents: States x_t, any dtype.
            model_output: What the (guided) network predicted for them.
            timesteps: Members of :attr:`timesteps`; on the CPU they cost no wait for an accelerator.

        Raises:
            InputError: If a timestep is none of this sampler's.
        """

    @abstractmethod
    def clean(self, latents: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        """Predicted clean latents x̂_0 ``(B, C, ...)`` float32."""

    def next_timestep(self, index: int) -> float:
        """Timestep at which the states after step ``index`` lie; 0 after the last."""
        return float(self.timesteps[index + 1]) if index + 1 < len(self.timesteps) else 0.0

    def require_noise(self) -> None:
        """Refuse a sampler all of whose steps are deterministic.

        Raises:
            InputError: If no step adds noise, so that no log-probability exists and candidates would all be equal.
        """
        if not (self.noise_std > 0).any():
            raise InputError(
                f"with sampling.{self.noise_setting} none of the {len(self)} steps adds noise, and without noise there "
                "is no log-probability; raise it"
            )

    def step_index(self, timesteps: Tensor) -> Tensor:
        """Number of the step at each of ``timesteps`` ``(B,)``, int64 on the CPU.

        Raises:
            InputError: If a timestep is none of this sampler's.
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
        """Columns of a ``(T, n)`` table of constants at ``timesteps``, each shaped to broadcast over ``like``."""
        rows = table[self.step_index(timesteps)].to(like.device)
        return tuple(per_sample(column, like) for column in rows.unbind(dim=1))
