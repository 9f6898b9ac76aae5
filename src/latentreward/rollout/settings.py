"""How a policy is sampled from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from latentreward.errors import InputError
from latentreward.rollout.base import StepSampler
from latentreward.rollout.ddim import DDIMSampler
from latentreward.rollout.flow_sde import FlowSDESampler


@dataclass
class Sampling:
    """Steps, noise and size of samples.

    Where no noise is given, pictures are sampled without, as ``generate`` does, and the rollouts of training with LPO's
    and Flow-GRPO's.

    Attributes:
        num_inference_steps: Steps from noise to image.
        eta: Noise of a DDIM step (SD1.5, SD2.1, SDXL): 0 deterministic, 1 ancestral. None: 0, in rollouts 1.
        noise_level: Noise of a flow-matching step (SD3): 0 deterministic. None: 0, in rollouts 0.7.
        height: Image height in pixels; None for the network's native one.
        width: Image width in pixels; None for the network's native one.
    """

    num_inference_steps: int = 20
    eta: float | None = None
    noise_level: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.num_inference_steps < 1:
            raise InputError(f"num_inference_steps={self.num_inference_steps} must be at least 1")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise InputError(f"eta={self.eta:g} must lie in [0, 1]: 0 is deterministic, 1 ancestral sampling")
        if self.noise_level is not None and not 0 <= self.noise_level < float("inf"):
            raise InputError(f"noise_level={self.noise_level:g} must be 0 or above; Flow-GRPO takes 0.7")

    def with_noise(self) -> Self:
        """A copy for rollouts: eta 1 (LPO) and noise level 0.7 (Flow-GRPO) where none is given."""
        eta, noise_level = self.eta, self.noise_level
        return replace(self, eta=1.0 if eta is None else eta, noise_level=0.7 if noise_level is None else noise_level)

    def sampler(self, scheduler_config: Mapping[str, Any]) -> StepSampler:
        """The sampler for a pipeline with this saved scheduler config: flow matching by its class name, else DDIM.

        Raises:
            InputError: If the scheduler cannot make these steps.
        """
        if "FlowMatch" in scheduler_config.get("_class_name", ""):
            return FlowSDESampler(scheduler_config, self.num_inference_steps, self.noise_level or 0.0)
        return DDIMSampler(scheduler_config, self.num_inference_steps, self.eta or 0.0)
