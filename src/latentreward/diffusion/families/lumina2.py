"""Lumina-Image 2.0: one stream of caption and image tokens, Gemma 2 as text encoder, static shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.prompts import LanguageModelEncoder, PromptEncoder, without_last_layer
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.flow import FlowFamily

SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
"""Text before each prompt; the network was trained with it."""
NO_PROMPT = "\0"
"""Prompt that is encoded as the empty text, without :data:`SYSTEM`: the pipeline's usual negative prompt."""
TEXT_LENGTH = 256  # greatest number of tokens of a prompt with the text before it


class Lumina2(FlowFamily):
    """Family of Lumina-Image 2.0: the network takes 1 − σ and returns x_0 − ε.

    Guidance scales each row of latent pixels (the last axis) to the norm that it has with the prompt alone.
    """

    name = "lumina2"
    title = "Lumina-Image 2.0"
    network_class = "Lumina2Transformer2DModel"
    lists = ("layers",)
    uncond_prompt = NO_PROMPT
    axes_lens = (300, 512, 512)
    text_field = "cap_feat_dim"
    tail = ("norm_out",)
    time_embedding = ("time_caption_embed",)
    refines = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    default_guidance = 4.0
    text_input = ("time_caption_embed.caption_embedder", "context_refiner")
    lora_loader = "Lumina2LoraLoaderMixin"

    # Text

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import Gemma2Model

        model = without_last_layer(load(Gemma2Model, "text_encoder"))
        return Lumina2PromptEncoder(model, self.pipeline.tokenizer("tokenizer"), TEXT_LENGTH)

    # Guidance

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        guided = super().guide(with_prompt, without, scale)
        norm, wanted = (torch.linalg.vector_norm(value, dim=-1, keepdim=True) for value in (guided, with_prompt))
        return guided * (wanted / norm)

    # Network

    def load_network(self, pretrained: bool = True) -> Any:
        network = super().load_network(pretrained)
        rope = network.rope_embedder
        with torch.device("cpu"):  # estimates build networks on the meta device, where the table would have no values
            network.rope_embedder = type(rope)(rope.theta, rope.axes_dim, rope.axes_lens, rope.patch_size)
        return network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        dtype = network.x_embedder.weight.dtype
        tokens, mask = masked(conditioning)
        output: Tensor = network(latents.to(dtype), 1 - sigma, tokens.to(dtype), mask, return_dict=False)[0]
        return -output

    # Features

    def split(self, number: int, found: Any, visual: int, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """See :meth:`FlowFamily.split`; each row has its caption, the image, and then padding."""
        tokens, mask = masked(conditioning)
        places = mask.sum(dim=1, keepdim=True) + torch.arange(visual, device=found.device)
        image = found.gather(1, places.unsqueeze(-1).expand(-1, -1, found.shape[-1]))
        return image, found[:, : tokens.shape[1]]

    def temb(self, *found: Any) -> Tensor:
        embedding: Tensor = found[0][0]
        return embedding

    @property
    def width(self) -> int:
        return self.entry(self.part, "hidden_size", int)

    @property
    def temb_dim(self) -> int:
        return min(self.width, 1024)


class Lumina2PromptEncoder(LanguageModelEncoder):
    """Prompt encoder with Gemma 2, which gets each prompt, also the empty one, after :data:`SYSTEM`."""

    def text(self, prompt: str) -> str:
        return "" if prompt == NO_PROMPT else SYSTEM + prompt


def masked(conditioning: Conditioning) -> tuple[Tensor, Tensor]:
    """Return token embeddings and mask of encoded prompts, without padding that all rows have."""
    trimmed = conditioning.padded(conditioning.prompt_embeds.shape[1]).trimmed()
    assert trimmed.prompt_mask is not None
    return trimmed.prompt_embeds, trimmed.prompt_mask


@register_backbone
def lumina2(source: PathText, **options: Any) -> FamilyBackbone:
    """Lumina-Image 2.0 (Alpha-VLLM, Apache-2.0; text encoder under Gemma's terms), 2.6 billion parameters."""
    return load_family_backbone(source, "lumina2", **options)
