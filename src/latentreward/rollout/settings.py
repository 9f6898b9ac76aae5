"""Sampler settings."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from latentreward.errors import InputError
from latentreward.families import Family
from latentreward.rollout.base import StepSampler
from latentreward.rollout.ddim import DDIMSampler
from latentreward.rollout.flow_sde import FlowSDESampler


@dataclass
class Sampling:
    """Number of steps, noise and size of samples.

    ``eta`` applies to DDIM, ``noise_level`` to flow matching. None means deterministic steps when images are generated
    (the command ``generate``), and the noise of LPO and Flow-GRPO in training's rollouts.

    Attributes:
        num_inference_steps: Steps from noise to image.
        eta: Noise of a DDIM step (SD1.5, SD2.1, SDXL), in [0, 1]: 0 deterministic, 1 ancestral. None gives 0, and 1 in
            rollouts.
        noise_level: Noise of a flow-matching step, at least 0: 0 deterministic. None gives 0, and 0.7 in
            rollouts.
        height: Image height in pixels; None for the network's native height.
        width: Image width in pixels; None for the network's native width.
        frames: Number of frames of a clip; 1 for an image.
    """

    num_inference_steps: int = 20
    eta: float | None = None
    noise_level: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int = 1

    def __post_init__(self) -> None:
        """Raise InputError for settings that are out of range."""
        if self.num_inference_steps < 1:
            raise InputError(f"num_inference_steps={self.num_inference_steps} must be at least 1")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise InputError(f"eta={self.eta:g} must lie in [0, 1]: 0 is deterministic, 1 ancestral sampling")
        if self.noise_level is not None and not 0 <= self.noise_level < float("inf"):
            raise InputError(f"noise_level={self.noise_level:g} must be 0 or above; Flow-GRPO takes 0.7")

    def with_noise(self) -> Self:
        """Return a copy for rollouts, with ``eta`` 1 (LPO) and ``noise_level`` 0.7 (Flow-GRPO) in place of None."""
        eta, noise_level = self.eta, self.noise_level
        return replace(self, eta=1.0 if eta is None else eta, noise_level=0.7 if noise_level is None else noise_level)

    def record(self) -> dict[str, Any]:
        """Return the fields as plain values, without ``frames`` if 1: records of earlier versions stay equal."""
        return {name: value for name, value in asdict(self).items() if name != "frames" or value != 1}

    def latent_shape(self, family: Family) -> tuple[int, ...]:
        """Return the shape of one sample's latents; see :meth:`Family.latent_shape`."""
        return family.latent_shape(self.height, self.width, self.frames)

    def require_images(self, reader: str) -> None:
        """Raise InputError if samples are clips, which ``reader`` does not take."""
        if self.frames != 1:
            raise InputError(f"sampling.frames={self.frames}: {reader} takes images, not clips; set it to 1")

    def sampler(self, family: Family) -> StepSampler:
        """Make the sampler for a family's pipeline: a flow's SDE at the family's levels, or DDIM.

        Raises:
            InputError: If the scheduler cannot make these steps, or the size does not suit the family.
        """
        shape = self.latent_shape(family)
        if family.flow:
            return FlowSDESampler(*family.levels(self.num_inference_steps, shape), self.noise_level or 0.0)
        return DDIMSampler(family.pipeline.config("scheduler"), self.num_inference_steps, self.eta or 0.0)
