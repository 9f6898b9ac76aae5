"""Sampler settings."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from latentreward.alignment.rollout.samplers import (
    DDIMSampler,
    FlowNoise,
    FlowSDESampler,
    StepSampler,
    check_noise_level,
)
from latentreward.core.errors import InputError, check_range
from latentreward.diffusion import Family

ROLLOUT_NOISE: dict[FlowNoise, float] = {"flow": 0.7, "dance": 0.3, "cps": 0.8}
"""Noise of a flow's step in rollouts, as Flow-GRPO, DanceGRPO and Flow-GRPO's CPS configurations set it."""


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
            rollouts (``dance`` 0.3, ``cps`` 0.8).
        height: Image height in pixels; None for the network's native height.
        width: Image width in pixels; None for the network's native width.
        frames: Number of frames of a clip; 1 for an image.
        flow_noise: How a flow-matching step adds noise: ``flow`` (Flow-GRPO), ``dance`` (DanceGRPO) or ``cps``
            (coefficients-preserving sampling); see :class:`FlowSDESampler`.
    """

    num_inference_steps: int = 20
    eta: float | None = None
    noise_level: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int = 1
    flow_noise: FlowNoise = "flow"

    def __post_init__(self) -> None:
        check_range("[1, inf)", num_inference_steps=self.num_inference_steps)
        check_range("[0, 1]", "0 is deterministic, 1 ancestral sampling", eta=self.eta)
        check_noise_level(self.flow_noise, self.noise_level or 0.0)

    def with_noise(self) -> Self:
        """Return a copy for rollouts, with ``eta`` 1 (LPO) and the noise of :data:`ROLLOUT_NOISE` in place of None."""
        noise_level = ROLLOUT_NOISE[self.flow_noise] if self.noise_level is None else self.noise_level
        return replace(self, eta=1.0 if self.eta is None else self.eta, noise_level=noise_level)

    def latent_shape(self, family: Family) -> tuple[int, ...]:
        """Return the shape of one sample's latents; see :meth:`Family.latent_shape`."""
        return family.latent_shape(self.height, self.width, self.frames)

    def follows_flow(self, family: Family, guidance_scale: float | None) -> bool:
        """Tell whether samples lie on paths of the network itself: those of a flow, without noise and guidance."""
        return family.flow and not self.noise_level and not family.needs_uncond(guidance_scale)

    def require_images(self, reader: str) -> None:
        """Raise InputError if samples are clips, which ``reader`` does not take."""
        if self.frames != 1:
            raise InputError(f"sampling.frames={self.frames}: {reader} takes images, not clips; set it to 1")

    def require_own_noise(self, family: Family) -> None:
        """Raise InputError for noise of DDIM's steps if the family is a flow, and the reverse: it has no effect."""
        own, other = ("noise_level", "eta") if family.flow else ("eta", "noise_level")
        if value := getattr(self, other):
            raise InputError(
                f"sampling.{other}={value:g} has no effect on {family.title}; leave it out, or set sampling.{own}"
            )

    def sampler(self, family: Family) -> StepSampler:
        """Make the sampler for a family's pipeline: a flow's SDE at the family's levels, or DDIM.

        Raises:
            InputError: If the scheduler cannot make these steps, or the size does not suit the family.
        """
        shape = self.latent_shape(family)
        if family.flow:
            with torch.device("cpu"):  # an estimate builds modules on the meta device, whose levels have no values
                levels = family.levels(self.num_inference_steps, shape)
            # Flows sample at the levels of their own pipeline, whose shift may depend on the size.
            return FlowSDESampler(*levels, self.noise_level or 0.0, self.flow_noise)
        if self.flow_noise != "flow":
            raise InputError(
                f"sampling.flow_noise={self.flow_noise}: {family.title} is no flow; leave it out, for DDIM's steps"
            )
        return DDIMSampler(family.scheduler_config, self.num_inference_steps, self.eta or 0.0)
