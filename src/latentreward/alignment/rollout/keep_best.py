"""Halving in a running diffusers pipeline, by its ``callback_on_step_end``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment.rewards.look_ahead import RECORD, warn_of_other_states
from latentreward.alignment.rollout.halving import best, rows_of_choice
from latentreward.core.errors import InputError
from latentreward.reward.scoring.reward_model import RewardModel

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
"""Pipelines that hand over all tensors of a step; others keep some, such as FLUX's pooled embeddings."""
TENSORS = (
    "latents", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "add_text_embeds", "add_time_ids"
)  # fmt: skip
"""Names of the tensors with a row for each picture, or two under guidance."""


class KeepBest:
    """Callback of a diffusers pipeline that goes on with the best pictures of each prompt alone.

    Works with the pipelines of SD1.5, SD2.1, SDXL and SD3, and their schedulers of one pass a step, but not with what
    these keep to themselves: pictures of an IP-Adapter, SD3's skip-layer guidance, latent consistency models.

    Args:
        reward: Reward of noisy latents of the pipeline's latent space, best one that looks ahead.
        prompts: Prompt, or prompts, of the pictures.
        keep: How many candidates of each prompt are kept, by the number of finished steps; 0 is the noise. Of several
            that are left the pictures are in the order in which they were drawn.
        batch_size: Most states that are scored at once; None takes all.

    Example:
        .. code-block:: python

            keep = KeepBest(RewardModel.from_pretrained("runs/look_ahead"), prompt, {0: 4, 8: 1})
            image = pipe(**keep.options(pipe, 16, num_inference_steps=20, guidance_scale=5.0)).images[0]
    """

    def __init__(
        self, reward: RewardModel, prompts: str | Sequence[str], keep: Mapping[int, int], batch_size: int | None = None
    ) -> None:
        self.reward, self.keep, self.batch_size = reward, dict(sorted(keep.items())), batch_size
        self.prompts = [prompts] if isinstance(prompts, str) else [*prompts]
        counts = [*self.keep.values()]
        if min((*self.keep, 0)) < 0 or min((*counts, 1)) < 1 or counts != sorted(counts, reverse=True):
            raise InputError(f"keep={self.keep} must map numbers of finished steps to ever fewer pictures, at least 1")

    @torch.no_grad()
    def options(
        self,
        pipe: Any,
        number: int,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Draw ``number`` noises for each prompt and return the options of the pipeline's call, best noises included.

        Steps, guidance, size in pixels and generator are those of the call. One line is logged if the reward looks
        ahead for other steps or another guidance.

        Raises:
            InputError: If the pipeline, its latents or the schedule do not fit.
        """
        self._check(pipe)
        pipe.scheduler.set_timesteps(num_inference_steps)
        times = pipe.scheduler.timesteps
        if (last := max(self.keep, default=0)) >= len(times):
            raise InputError(f"keep={self.keep}: the scheduler has {len(times)} steps, none of which follows {last}")
        record = self.reward.recipe.training.get(RECORD) if self.reward.recipe else None
        warn_of_other_states(record, {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale})
        network = getattr(pipe, "unet", None) or pipe.transformer
        side = network.config.sample_size * pipe.vae_scale_factor
        places = [(height or side) // pipe.vae_scale_factor, (width or side) // pipe.vae_scale_factor]
        shape = (number * len(self.prompts), network.config.in_channels, *places)
        noise = torch.randn(shape, generator=generator).to(network.device)
        if 0 in self.keep:
            noise = noise[self._best(noise, times[0], self.keep[0])]
        named = [name for name in TENSORS if name in pipe._callback_tensor_inputs]
        return {
            "prompt": self.prompts,
            "num_images_per_prompt": len(noise) // len(self.prompts),
            "latents": noise.to(network.dtype),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "generator": generator,
            "callback_on_step_end": self,
            "callback_on_step_end_tensor_inputs": named,
        }

    @torch.no_grad()
    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Keep the best pictures after ``step`` + 1 finished steps, in all tensors of pipeline and scheduler."""
        if (count := self.keep.get(step + 1)) is None:
            return tensors
        latents, following = tensors["latents"], pipe.scheduler.timesteps[step + 1]
        if hasattr(pipe.scheduler, "scale_model_input"):  # states of Euler's and others' schedulers are x + σ·ε
            states = pipe.scheduler.scale_model_input(latents, following)
        else:
            states = latents
        rows, number = self._best(states, following, count), len(latents)
        for name, value in vars(pipe.scheduler).items():  # what schedulers of several steps remember
            if isinstance(value, list):
                value[:] = [kept(one, rows, number) for one in value]
            else:
                setattr(pipe.scheduler, name, kept(value, rows, number))
        return {name: kept(value, rows, number) for name, value in tensors.items()}

    def _best(self, states: Tensor, timestep: Tensor, count: int) -> Tensor:
        """Return the rows of the best ``count`` states of each prompt, in order, on the states' device."""
        number = len(states) // len(self.prompts)
        if count > number:
            raise InputError(f"keep={self.keep}: there are {number} pictures of each prompt, of which {count} are kept")
        texts = [prompt for prompt in self.prompts for _ in range(number)]
        process, device = self.reward.backbone.noise_process, self.reward.device
        levels = process.snap(timestep.reshape(1).float().cpu())
        scores = self.reward.score_states(texts, states[:, None].float().to(device), levels, batch_size=self.batch_size)
        rows = best(count, scores.view(len(self.prompts), number).cpu()).sort(dim=1).values
        return rows_of_choice(rows, number).to(states.device)

    def _check(self, pipe: Any) -> None:
        if not {*PIPELINES} & {one.__name__ for one in type(pipe).__mro__}:
            told = f"KeepBest knows {', '.join(PIPELINES)}, not {type(pipe).__name__}"
            raise InputError(f"{told}, which keeps tensors of a step to itself; use latentreward generate --keep")
        config, space = pipe.vae.config, self.reward.backbone.latent_space
        theirs = config.latent_channels, config.scaling_factor, config.get("shift_factor") or 0.0
        ours = space.channels, space.scaling_factor, space.shift_factor or 0.0
        if theirs != ours:
            told = f"the pipeline makes latents (channels, scale, shift) {theirs}, and the reward takes {ours}"
            raise InputError(f"reward: {told}; use one that was trained on the pipeline's VAE")


def kept(value: Any, rows: Tensor, number: int) -> Any:
    """Return ``rows`` of a tensor with a row for each of ``number`` pictures, or several blocks of such rows."""
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) % number or not len(value):
        return value
    return value.unflatten(0, (-1, number))[:, rows.to(value.device)].flatten(0, 1)
