"""Twins of Wan 2.1: one frame, with the scheduler of the published pipelines and with Euler's."""

from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from tests.diffusion.families.made_wan21 import wan21
from tests.diffusion.families.twins import Twin


class EulerAtUniPCLevels(UniPCMultistepScheduler):
    """UniPC's levels and timesteps, but Euler's step: the sampler that is aligned has no memory of earlier steps."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **options: Any
    ) -> tuple[Tensor]:
        if self.step_index is None:
            self._init_step_index(timestep)
        distance = self.sigmas[self.step_index + 1] - self.sigmas[self.step_index]
        self._step_index += 1
        return (sample + distance * model_output,)


@dataclass(frozen=True)
class WanTwin(Twin):
    """The pipeline's own scheduler takes steps of higher order, so that tests replace it."""

    def pipeline(self) -> DiffusionPipeline:
        pipeline = super().pipeline()
        if isinstance(pipeline.scheduler, UniPCMultistepScheduler):
            pipeline.scheduler = EulerAtUniPCLevels.from_config(pipeline.scheduler.config)
        return pipeline


CALL = {"num_frames": 1, "guidance_scale": 5.0}
TWINS = [
    WanTwin("wan21", "wan21", wan21, call=CALL, backbone="wan21"),
    WanTwin(
        "wan21_euler", "wan21", lambda: wan21(FlowMatchEulerDiscreteScheduler(shift=5.0)),
        call={**CALL, "guidance_scale": 1.0}, guidance=1.0, backbone="wan21", same_network=True,
    ),
]  # fmt: skip
