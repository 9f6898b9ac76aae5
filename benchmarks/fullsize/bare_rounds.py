"""Callback that times training steps against bare calls of diffusers and transformers that do the same passes.

DiNa-LRM's head, a network of 139 million parameters, is part of both sides.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from latentreward.alignment import LPOModule
from latentreward.core.contracts import Features, PreferenceBatch, StepPairs
from latentreward.reward import DiNaLRMModule, LRMModule


def bare_latents(module: Any, batch: PreferenceBatch) -> Tensor:
    """Sample the latents of a batch's images, chosen first, and add noise."""
    vae = module.model.backbone.vae.vae
    images = torch.cat([batch.chosen, batch.rejected]).to(vae.dtype)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        latents = vae.encode(images).latent_dist.sample().float() * vae.config.scaling_factor
    return 0.5 * latents + 0.5 * torch.randn_like(latents)


def bare_ids(tokenizer: Any, prompts: list[str], length: int, device: torch.device) -> Tensor:
    """Return token ids padded to ``length``."""
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return tokenizer(prompts, **options).input_ids.to(device)


def bare_lrm(module: LRMModule, batch: PreferenceBatch) -> Tensor:
    """Run VAE, text encoder, and the U-Net's down path and mid block with the prompts and with the empty prompt."""
    noisy, count, device = bare_latents(module, batch), len(batch), module.device
    text, unet = module.model.backbone.text_encoder, module.model.backbone.unet
    ids = bare_ids(text.tokenizer, [*batch.prompts, ""], text.num_tokens, device)
    tokens = text.text_encoder(ids).last_hidden_state
    rows = [*range(count), *range(count), *[count] * (2 * count)]
    timesteps = torch.full((len(rows),), 501, device=device)
    return unet(torch.cat([noisy, noisy]), timesteps, tokens[rows]).sample.float().mean()


def bare_dina(module: DiNaLRMModule, batch: PreferenceBatch) -> Tensor:
    """Run VAE, text encoders, the transformer's blocks, and the head, which no library has."""
    noisy, device = bare_latents(module, batch), module.device
    backbone, head = module.model.backbone, module.model.head
    text, dit = backbone.text_encoder, backbone.transformer
    prompts = list(batch.prompts)
    with torch.no_grad():
        clip_l, clip_g = (
            encoder(bare_ids(tokenizer, prompts, text.clip_length, device), output_hidden_states=True)
            for encoder, tokenizer in ((text.text_encoder, text.tokenizer), (text.text_encoder_2, text.tokenizer_2))
        )
        t5 = text.text_encoder_3(bare_ids(text.tokenizer_3, prompts, text.t5_length, device)).last_hidden_state
    clip = torch.cat([clip_l.hidden_states[-2], clip_g.hidden_states[-2]], dim=-1)
    tokens = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5.to(clip.dtype)], dim=1).repeat(2, 1, 1)
    pooled = torch.cat([clip_l.text_embeds, clip_g.text_embeds], dim=-1).repeat(2, 1)
    dtype = dit.pos_embed.proj.weight.dtype
    visual, context = dit.pos_embed(noisy.to(dtype)), dit.context_embedder(tokens.to(dtype))
    temb = dit.time_text_embed(torch.full((len(noisy),), 501, device=device), pooled.to(dtype))
    found = [(visual, context)]
    for block in dit.transformer_blocks:
        context, visual = block(hidden_states=visual, encoder_hidden_states=context, temb=temb)
        found.append((visual, context))
    patch = dit.config.patch_size
    features = Features(
        visual=tuple(found[tap][0] for tap in backbone.visual_taps),
        visual_grids=(tuple(side // patch for side in noisy.shape[2:]),) * len(backbone.visual_taps),
        text=tuple(found[tap][1] for tap in backbone.text_taps),
        pooled_text=pooled,
        temb=temb,
    )
    return head(features).mean()


def bare_lpo(module: LPOModule, batch: StepPairs) -> Tensor:
    """Run the policy's U-Net with and without the prompts, once with the adapter and once without."""
    network = module.policy.network
    conditioning, uncond = module.conditioning(batch.prompts)
    tokens = torch.cat([uncond.prompt_embeds.expand_as(conditioning.prompt_embeds), conditioning.prompt_embeds])
    dtype = network.conv_in.weight.dtype
    latents, timesteps = torch.cat([batch.latents] * 2).to(dtype), torch.cat([batch.timesteps] * 2)
    with torch.no_grad(), module.policy.reference():
        reference = network(latents, timesteps, tokens.to(dtype)).sample
    return (network(latents, timesteps, tokens.to(dtype)).sample - reference).float().square().mean()


BARE: dict[type, Callable[[Any, Any], Tensor]] = {LRMModule: bare_lrm, DiNaLRMModule: bare_dina, LPOModule: bare_lpo}
"""Module → the passes of its training step."""


class BareRounds(Callback):
    """Callback that times each training step, from the batch to the gradients, and then the same passes by bare calls.

    Data loading, rollouts, clipping and the optimiser's update count in neither time.

    Args:
        path: File to write: a list of rounds, each the seconds of the step and of the bare calls.
    """

    def __init__(self, path: str = "rounds.json") -> None:
        self.path, self.rounds, self.began, self.step = Path(path), list[tuple[float, float]](), 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self.began = now(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.step = now(pl_module) - self.began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the bare calls, and write the round."""
        optimizer = trainer.optimizers[0]
        optimizer.zero_grad()
        random = torch.get_rng_state()
        began = now(pl_module)
        with trainer.precision_plugin.train_step_context():
            loss = BARE[type(pl_module)](pl_module, batch)
        loss.backward()
        self.rounds.append((self.step, now(pl_module) - began))
        optimizer.zero_grad()
        torch.set_rng_state(random)
        self.path.write_text(json.dumps(self.rounds))


def now(module: LightningModule) -> float:
    """Return the time, after the device has finished."""
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
