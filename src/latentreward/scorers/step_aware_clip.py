"""SPO's step-aware preference model: CLIP whose vision tower knows from which timestep an image was predicted.

Architecture: arXiv:2406.04314 and its released code. Each vision block, and the pooled feature, is modulated by the
timestep as in DiT (adaLN, arXiv:2212.09748); at the start nothing is changed, so any CLIP checkpoint can be continued.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torch.utils.checkpoint import checkpoint

from latentreward.errors import InputError

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

STEP_FILE = "step_aware.safetensors"
"""File beside a CLIP model's own that holds what this class adds to it."""
FREQUENCIES = 256
"""Numbers that a timestep is spread over before the first linear layer."""
PUBLISHED_NAMES = (
    (r"(?:model\.)?t_embedder\.mlp\.", "time_embedder."),
    (r"(?:model\.)?vision_model\.encoder\.layers\.(\d+)\.adaLN_modulation\.", r"layer_modulation.\1."),
    (r"(?:model\.)?vision_model\.adaLN_modulation\.", "final_modulation."),
    (r"(?:model\.)?((?:text_|vision_)model\.|(?:text|visual)_projection\.|logit_scale)", r"clip.\1"),
)
"""Beginning of a tensor's name in the released checkpoint -> in :class:`StepAwareCLIP`."""


class StepAwareCLIP(nn.Module):
    """CLIP with a timestep in its vision tower.

    Args:
        clip: CLIP model of any size.
        tokenizer: Its tokenizer.
        mean: ``(3,)`` of its image preprocessing.
        std: ``(3,)``.

    Attributes:
        gradient_checkpointing: Recompute vision blocks in the backward pass.
    """

    gradient_checkpointing: bool = False
    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        width = clip.config.vision_config.hidden_size
        self.time_embedder = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.layer_modulation = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) for _ in clip.vision_model.encoder.layers
        )
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.reset_modulation()

    @torch.no_grad()
    def reset_modulation(self) -> None:
        """Start as no change: shifts and scales 0, gates 1, whatever the timestep."""
        for linear in (self.time_embedder[0], self.time_embedder[2]):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        linears = [modulation.get_submodule("1") for modulation in (*self.layer_modulation, self.final_modulation)]
        for linear in linears:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in linears[:-1]:
            _, _, gate, _, _, mlp_gate = linear.bias.chunk(6)
            gate.fill_(1.0)
            mlp_gate.fill_(1.0)

    def embed_images(self, pixels: Tensor, timesteps: Tensor) -> Tensor:
        """Image embeddings ``(B, width)`` float32 of norm 1.

        Args:
            pixels: ``(B, 3, H, W)``, about [-1, 1].
            timesteps: ``(B,)`` at which they were predicted; 0 for finished images.
        """
        vision = self.clip.vision_model
        pixels = prepare_pixels(pixels, vision.config.image_size, self.mean, self.std)
        time = self.time_embedder(embed_timesteps(timesteps).to(self.time_embedder[0].weight.dtype))
        hidden = vision.pre_layrnorm(vision.embeddings(pixels.to(vision.pre_layrnorm.weight.dtype)))
        for layer, modulation in zip(vision.encoder.layers, self.layer_modulation, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(modulated_layer, layer, hidden, modulation(time), use_reentrant=False)
            else:
                hidden = modulated_layer(layer, hidden, modulation(time))
        shift, scale = self.final_modulation(time).chunk(2, dim=-1)
        pooled = vision.post_layernorm(hidden[:, 0]) * (1 + scale) + shift
        return normalize(self.clip.visual_projection(pooled).float(), dim=-1)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids ``(B, length)`` on the CPU; long prompts are cut."""
        length = self.clip.config.text_config.max_position_embeddings
        return self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Prompt embeddings ``(B, width)`` float32 of norm 1, of what :meth:`tokenize` gives.

        Attention is causal and the prompt's end is read, so that padding plays no part.
        """
        pooled = self.clip.text_model(input_ids=input_ids.to(self.mean.device)).pooler_output
        return normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def similarity(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Scores ``(B,)`` float32 of embeddings of norm 1, row by row: ``exp(logit_scale) · cos``."""
        return self.clip.logit_scale.float().exp() * (image_embeds * text_embeds).sum(dim=-1)

    def save(self, folder: Path) -> None:
        """Save as a CLIP folder, which any program can read without the timestep, and :data:`STEP_FILE`."""
        from transformers import CLIPImageProcessorPil

        self.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        size = self.clip.config.vision_config.image_size
        CLIPImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=self.mean.tolist(),
            image_std=self.std.tolist(),
        ).save_pretrained(folder)
        step = {name: value.contiguous() for name, value in self.state_dict().items() if not name.startswith("clip.")}
        save_file(step, folder / STEP_FILE)


def modulated_layer(layer: nn.Module, hidden: Tensor, modulation: Tensor) -> Tensor:
    """A CLIP block on ``hidden`` ``(B, N, width)`` with shifts, scales and gates ``(B, 6·width)``."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unsqueeze(1).chunk(6, dim=-1)
    attended, _ = layer.self_attn(hidden_states=layer.layer_norm1(hidden) * (1 + scale) + shift, attention_mask=None)
    hidden = hidden + gate * attended
    return hidden + mlp_gate * layer.mlp(layer.layer_norm2(hidden) * (1 + mlp_scale) + mlp_shift)


def embed_timesteps(timesteps: Tensor) -> Tensor:
    """Cosines, then sines, of ``timesteps`` ``(B,)`` at frequencies 1 to 1/10000: ``(B, 256)`` float32."""
    return get_timestep_embedding(timesteps, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)


def prepare_pixels(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """What the vision tower takes, from pixels that a VAE decoded; differentiable.

    The shorter side becomes ``size`` (bicubic without antialiasing), then the centre is cut out.

    Args:
        images: ``(B, 3, H, W)``, about [-1, 1].
        size: Side of the square.
        mean: ``(3,)`` of CLIP's preprocessing.
        std: ``(3,)``.

    Note:
        As SPO scores. Its training of the scorer squeezes both sides to ``size`` and clamps before resizing too; the
        two agree on square images but for the clamp.
    """
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    resized = (int(height * scale + 0.5), int(width * scale + 0.5))
    images = interpolate(images.float(), resized, mode="bicubic", align_corners=False)
    top, left = (round((side - size) / 2) for side in resized)
    images = (images[..., top : top + size, left : left + size] / 2 + 0.5).clamp(0, 1)
    return (images - mean.to(images)[:, None, None]) / std.to(images)[:, None, None]


def rename_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the released checkpoint (or of its model alone) under the names of :class:`StepAwareCLIP`.

    Raises:
        InputError: If a name is none of a step-aware CLIP.
    """
    renamed = {}
    for name, value in tensors.items():
        matches = ((re.match(pattern, name), new) for pattern, new in PUBLISHED_NAMES)
        match, new = next((found for found in matches if found[0]), (None, ""))
        if match is None:
            raise InputError(f"weights: tensor {name!r} is none of a step-aware CLIP; give the file that SPO released")
        renamed[match.expand(new) + name[match.end() :]] = value
    return {name: value for name, value in renamed.items() if not name.endswith(".position_ids")}
