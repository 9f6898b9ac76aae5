"""Pretraining of the two tiny denoisers, each with its text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from latentreward.storage.progress import Progress

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

CAPTION_DROPOUT = 0.1
"""Share of captions replaced by the empty caption, which classifier-free guidance needs."""
MIN_SNR_GAMMA = 5.0
"""Gamma of the min-SNR weighting: the weight of a noise level is min(SNR, gamma) / SNR."""
TRAINING_SHIFT = 2.0
"""Timestep shift of the noise levels in the training of the rectified-flow network."""


def draw_batch(
    stored: dict[str, Tensor], empty: Tensor, batch_size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a batch of ``latents`` ``(B, 4, 8, 8)`` and ``tokens`` ``(B, 16)``, some of them of the empty caption."""
    rows = rng.integers(len(stored["latents"]), size=batch_size)
    dropped = torch.from_numpy(rng.random(batch_size) < CAPTION_DROPOUT)
    return stored["latents"][rows], torch.where(dropped[:, None], empty, stored["tokens"][rows])


def sd_loss(pipeline: StableDiffusionPipeline, latents: Tensor, tokens: Tensor) -> Tensor:
    """Compute the mean squared error of the predicted noise with min-SNR weights (arXiv:2303.09556).

    ``latents`` ``(B, 4, 8, 8)`` are scaled; ``tokens`` are ``(B, 16)``.
    """
    timesteps = (stratified_uniform(len(latents)) * pipeline.scheduler.config.num_train_timesteps).long()
    noise = torch.randn_like(latents)
    noisy_latents = pipeline.scheduler.add_noise(latents, noise, timesteps)
    prompt_embeds = pipeline.text_encoder(tokens)[0]
    noise_pred = pipeline.unet(noisy_latents, timesteps, prompt_embeds).sample
    alphas_cumprod = pipeline.scheduler.alphas_cumprod[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return ((noise_pred - noise).square().mean(dim=(1, 2, 3)) * (MIN_SNR_GAMMA / snr).clamp(max=1)).mean()


def sd35_loss(pipeline: StableDiffusion3Pipeline, latents: Tensor, tokens: Tensor) -> Tensor:
    """Compute the mean squared error of the predicted velocity.

    ``latents`` ``(B, 4, 8, 8)`` are scaled; ``tokens`` are ``(B, 16)``.
    """
    sigmas = stratified_uniform(len(latents))
    sigmas = TRAINING_SHIFT * sigmas / (1 + (TRAINING_SHIFT - 1) * sigmas)
    noise = torch.randn_like(latents)
    weight = sigmas[:, None, None, None]
    # The pipeline reads both text encoders before their last layer and pools their projections.
    texts = [e(tokens, output_hidden_states=True) for e in (pipeline.text_encoder, pipeline.text_encoder_2)]
    velocity = pipeline.transformer(
        hidden_states=(1 - weight) * latents + weight * noise,
        timestep=1000 * sigmas,
        encoder_hidden_states=torch.cat([text.hidden_states[-2] for text in texts], dim=-1),
        pooled_projections=torch.cat([text.text_embeds for text in texts], dim=-1),
    ).sample
    return (velocity - (noise - latents)).square().mean()


def stratified_uniform(number: int) -> Tensor:
    """Draw ``number`` values in [0, 1), one in each of ``number`` equal bins, in ascending order.

    The mean of a loss over these values has less variance than over independent values.
    """
    return (torch.arange(number) + torch.rand(number)) / number


def train_denoiser(
    pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline,
    stored: dict[str, Tensor],
    empty: Tensor,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    lr: float,
    name: str,
) -> None:
    """Train a pipeline's denoiser and text encoders in place, and set their averaged weights at the end.

    Training uses AdamW, 200 steps of warm-up to ``lr``, linear decay to zero, gradients clipped at norm 1, and an
    exponential moving average of the weights with decay 0.999. ``stored`` and ``empty`` are those of
    :func:`draw_batch`; ``name`` labels the progress lines.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    trained = nn.ModuleList(getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None)
    trained.train()
    loss_function = sd_loss if hasattr(pipeline, "unet") else sd35_loss
    losses = (loss_function(pipeline, *draw_batch(stored, empty, batch_size, rng)) for _ in range(steps))
    adamw = {"weight_decay": 0.01, "fused": True}
    train_averaged(trained, losses, steps=steps, lr=lr, name=name, warmup=200, decay=0.999, **adamw)
    trained.eval()


def train_averaged(
    model: nn.Module,
    losses: Iterator[Tensor],
    *,
    steps: int,
    lr: float,
    name: str,
    warmup: int,
    decay: float,
    **adamw: Any,
) -> None:
    """Train with AdamW, warm-up and linear decay to zero, and set the model's averaged weights at the end.

    Parameters that require gradients are trained in place, one step per loss, with the peak learning rate ``lr``.
    ``decay`` is that of the exponential moving average; ``name`` labels the progress lines; ``adamw`` holds further
    settings of the optimiser.
    """
    averaged = deepcopy(model).requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), **adamw)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    for step in updates(optimizer, schedule, losses, steps, name):
        current = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(list(averaged.parameters()), current, 1 - min(decay, (step + 1) / (step + 10)))
    model.load_state_dict(averaged.state_dict())


def updates(
    optimizer: Optimizer, schedule: LRScheduler, losses: Iterable[Tensor], steps: int, name: str
) -> Iterator[int]:
    """Update weights once per loss, with gradients clipped at norm 1; yield the number of each update, from 1."""
    (group,) = optimizer.param_groups
    progress = Progress(name, steps, "steps")
    for step, loss in zip(range(1, steps + 1), losses, strict=False):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        schedule.step()
        yield step
        progress.add(loss=loss.item())
