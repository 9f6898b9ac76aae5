"""Chroma: FLUX.1-schnell's blocks without its modulation layers, T5 alone, trained for classifier-free guidance.

One network, the approximator, makes the modulation of all blocks from the timestep. Text tokens have a mask: the
prompt's own and one token of padding take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.prompts import PromptEncoder, masked_ids
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.flow import FlowFamily
from latentreward.diffusion.families.flux1 import TEXT_OUTPUT, VISUAL_OUTPUT, Flux1, positions
from latentreward.diffusion.families.qwen_image import needed_mask


class Chroma(FlowFamily):
    """Family of Chroma: dual and single blocks, T5 with a mask, modulation from one network for all blocks."""

    name = "chroma"
    title = "Chroma"
    network_class = "ChromaTransformer2DModel"
    lists = ("transformer_blocks", "single_transformer_blocks")
    positions = 4
    text_input = ("context_embedder",)
    text_output, visual_output = TEXT_OUTPUT, VISUAL_OUTPUT
    sinusoids = ("time_text_embed.time_proj", 1000.0)
    time_embedding = ("distilled_guidance_layer",)
    lora_targets = Flux1.lora_targets
    lora_loader = "FluxLoraLoaderMixin"
    t5_tokens = (512, 512)
    default_guidance = 5.0

    # Text

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import T5EncoderModel

        return ChromaPromptEncoder(load(T5EncoderModel, "text_encoder"), self.pipeline.tokenizer("tokenizer"), length)

    # Network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        dtype, grid = network.x_embedder.weight.dtype, self.token_grid(latents)
        text, mask = conditioning.prompt_embeds.to(dtype), joint_mask(conditioning, grid)
        text_ids, image_ids = positions(text.shape[1], [grid], latents.device)
        with masked_checkpoints(network, mask):
            output = network(
                hidden_states=self.pack(latents).to(dtype),
                encoder_hidden_states=text,
                timestep=sigma,
                img_ids=image_ids,
                txt_ids=text_ids,
                attention_mask=mask,
            ).sample
        return self.unpack(output, grid)

    # Features

    def temb(self, *found: Any) -> Tensor:
        return found[0][:, -2:].flatten(1)

    @property
    def temb_dim(self) -> int:
        return 2 * self.width


class ChromaPromptEncoder(PromptEncoder):
    """Prompt encoder of Chroma: the last hidden states of T5, with a mask of the prompt's tokens and one of padding.

    T5 sees the prompt's own tokens. The pipeline pads to ``length`` and masks the padding after its first token; here
    no such padding is made.
    """

    pooled_dim = 0
    masked = True

    def __init__(self, text_encoder: Any, tokenizer: Any, length: int) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.num_tokens, self.token_dim = length, text_encoder.config.d_model

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        ids, mask = masked_ids(self, self.tokenizer, prompts, self.num_tokens)
        counts = mask.sum(dim=1)
        length = min(int(counts.max()) + 1, self.num_tokens)
        kept = torch.arange(length, device="cpu") <= counts[:, None]
        return ids[:, :length], mask[:, :length], kept

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        ids, mask, kept = input_ids
        return Conditioning(self.text_encoder(ids, mask).last_hidden_state, prompt_mask=kept)


def joint_mask(conditioning: Conditioning, grid: Sequence[int]) -> Tensor | None:
    """Return the mask of text and image tokens ``(B, L + N)``; None if all take part.

    It is boolean, as Chroma was trained. The pipeline of diffusers 0.42 gives numbers, which PyTorch adds to the
    logits, so that padding is weakened by a factor of e instead of left out (diffusers issue 12116).
    """
    mask = needed_mask(conditioning)
    return None if mask is None else nn.functional.pad(mask, (0, grid[0] * grid[1]), value=True)


@contextmanager
def masked_checkpoints(network: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Give ``mask`` to single blocks with gradient checkpointing, where diffusers' network leaves it out."""
    name = "_gradient_checkpointing_func"
    core = next((module for module in network.modules() if name in vars(module)), None)
    if core is None or mask is None:
        yield
        return
    plain = getattr(core, name)

    def masked(block: nn.Module, *inputs: Any) -> Any:
        return plain(block, *inputs, *([mask] if len(inputs) == 3 else []))

    setattr(core, name, masked)
    try:
        yield
    finally:
        setattr(core, name, plain)


@register_backbone
def chroma(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of Chroma (lodestones, Apache-2.0): 19 blocks with image and text apart, 38 with both."""
    return load_family_backbone(source, "chroma", **options)
