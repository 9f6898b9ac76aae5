"""Sampling with a diffusers pipeline, and scores of a ``latentreward serve``, without decoding what is not kept.

For pipelines whose latents are ``(B, C, h, w)``: SD1.5, SD2.1, SDXL, SD3 and SD3.5. The pipeline's VAE is the reward's.
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from latentreward_client import RewardClient
from PIL import Image
from torch import Tensor


def best_of(
    pipeline: DiffusionPipeline, client: RewardClient, prompt: str, count: int, seed: int = 0, **options: Any
) -> tuple[Image.Image, Tensor]:
    """Sample ``count`` images of a prompt, and decode the one with the highest score.

    Args:
        pipeline: Pipeline.
        client: Client of the server.
        prompt: Prompt.
        count: Number of images.
        seed: Image i is sampled from the seed ``seed`` + i.
        options: Further settings of the pipeline, such as ``num_inference_steps``.

    Returns:
        The best image, and the scores ``(count,)``.
    """
    seeds = [torch.Generator().manual_seed(seed + number) for number in range(count)]
    made = pipeline(prompt, num_images_per_prompt=count, generator=seeds, output_type="latent", **options)
    scores = client.score_latents(prompt, made.images)
    best = made.images[int(scores.argmax())][None]
    config = pipeline.vae.config
    with torch.no_grad():
        decoded = pipeline.vae.decode(best / config.scaling_factor + (config.shift_factor or 0.0)).sample
    return pipeline.image_processor.postprocess(decoded)[0], scores


def scored_steps(
    pipeline: DiffusionPipeline, client: RewardClient, prompt: str, seed: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Sample an image, and score the states between the steps.

    Args:
        pipeline: Pipeline with the noise process of the reward. The scheduler must keep states as the reward's network
            takes them, as DDIM and the flow matching schedulers do; Euler for SD and SDXL scales them by sigma.
        client: Client of the server.
        prompt: Prompt.
        seed: Seed of the sample.
        options: Further settings of the pipeline.

    Returns:
        Timesteps ``(S - 1,)`` of the states after each step but the last, and their scores.

    Raises:
        ValueError: If the scheduler scales states otherwise.
    """
    if float(getattr(pipeline.scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise ValueError(f"{type(pipeline.scheduler).__name__} scales states by sigma; take DDIMScheduler")
    states: list[Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        states.append(values["latents"].clone())
        return values

    generator = torch.Generator().manual_seed(seed)
    pipeline(prompt, generator=generator, output_type="latent", callback_on_step_end=keep, **options)
    # the state after step i is the input of step i + 1, at its timestep
    timesteps = pipeline.scheduler.timesteps[1:].float().cpu()
    scores = client.score_states(prompt, torch.stack(states[:-1], dim=1), timesteps)
    return timesteps, scores[0]
