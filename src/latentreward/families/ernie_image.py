"""ERNIE-Image: one stream of image and text tokens in FLUX.2's latents, Ministral as text encoder, static shift."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from latentreward.backbones.registry import register_backbone
from latentreward.backbones.weights import part_of
from latentreward.contracts import Conditioning, LatentSpace, PathText
from latentreward.encoders.language_model import LanguageModelEncoder, without_last_layer
from latentreward.encoders.prompts import PromptEncoder
from latentreward.encoders.vae import PatchedLatentEncoder
from latentreward.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.families.flow import FlowFamily, Tokens
from latentreward.families.flux2_klein import normalised_space
from latentreward.families.qwen_image import needed_mask
from latentreward.families.z_image import lengths_of

TEXT_LENGTH = 1024  # greatest number of tokens of a prompt; the pipeline's is that of the tokenizer, which has none


class ErnieImage(FlowFamily):
    """Family of ERNIE-Image: a transformer with one modulation for all blocks, which takes tokens before rows.

    The position of the image on the first axis is the number of the prompt's tokens.
    """

    name = "ernie_image"
    title = "ERNIE-Image"
    network_class = "ErnieImageTransformer2DModel"
    block_classes = ("ErnieImageSharedAdaLNBlock",)
    text_layers = ("MistralDecoderLayer", "Ministral3DecoderLayer")
    vae_class = "AutoencoderKLFlux2"
    latent_encoder = PatchedLatentEncoder
    lists = ("layers",)
    tail = ("final_norm", "final_linear")
    packing = 1
    time_embedding = ("time_embedding",)
    text_field = "text_in_dim"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    lora_loader = "ErnieImageLoraLoaderMixin"
    default_guidance = 4.0

    @cached_property
    def latent_space(self) -> LatentSpace:
        """See :attr:`Family.latent_space`; equal to FLUX.2's where the VAE's statistics are."""
        return normalised_space(self)

    def assumption(self) -> str | None:
        """See :meth:`Family.assumption`."""
        return (
            "ERNIE-Image and ERNIE-Image-Turbo have equal configs; taken for the former, which samples with guidance; "
            "for Turbo set guidance_scale to 1. Prompts are encoded as given, without the pipeline's prompt enhancer"
        )

    # Text

    def load_prompt_encoder(
        self, t5_length: int | None = None, load_t5: bool = True, pretrained: bool = True
    ) -> PromptEncoder:
        """See :meth:`Family.load_prompt_encoder`; of Mistral 3 only the language model is kept."""
        from transformers import Mistral3Model

        whole = self.pipeline.load(Mistral3Model, "text_encoder", pretrained)
        model = without_last_layer(part_of(whole, "language_model"))
        return self.fitting(ErnieImagePromptEncoder(model, self.pipeline.tokenizer("tokenizer"), TEXT_LENGTH))

    # Network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        """See :meth:`FlowFamily.velocity`."""
        dtype = network.x_embedder.proj.weight.dtype
        lengths = torch.tensor(lengths_of(conditioning), device=latents.device)
        text = conditioning.prompt_embeds.to(dtype)
        output: Tensor = network(latents.to(dtype), 1000 * sigma, text, lengths, return_dict=False)[0]
        return output

    # Features

    def begin(self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tokens:
        """See :meth:`FlowFamily.begin`; the image's positions are (number of text tokens, row, column)."""
        dtype, device, grid = network.x_embedder.proj.weight.dtype, latents.device, self.token_grid(latents)
        visual, text = network.x_embedder(latents.to(dtype)), conditioning.prompt_embeds.to(dtype)
        text = text if network.text_proj is None else network.text_proj(text)
        temb = network.time_embedding(network.time_proj(1000 * sigma).to(dtype))
        lengths = torch.tensor(lengths_of(conditioning), device=device)
        places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid)).expand(len(latents), -1, 2)
        starts = lengths[:, None, None].expand(-1, places.shape[1], 1)
        words = nn.functional.pad(torch.arange(text.shape[1], device=device)[:, None], (0, 2))
        ids = torch.cat([torch.cat([starts, places], dim=-1), words.expand(len(latents), -1, 3)], dim=1)
        mask = needed_mask(conditioning)
        joint = None if mask is None else nn.functional.pad(mask, (visual.shape[1], 0), value=True)[:, None, None]
        modulation = [rows.unsqueeze(0) for rows in network.adaLN_modulation(temb).chunk(6, dim=-1)]
        others = {"rope": network.pos_embed(ids.float()), "modulation": modulation, "mask": joint}
        return Tokens(visual, text, temb, grid, conditioning.prompt_mask, others)

    def step(self, block: nn.Module, tokens: Tokens, number: int) -> tuple[Tensor, Tensor]:
        """See :meth:`FlowFamily.step`; blocks take the image and then the text, ``(tokens, B, D)``."""
        joint, others = torch.cat([tokens.visual, tokens.text], dim=1).transpose(0, 1), tokens.others
        joint = block(joint, others["rope"], others["modulation"], others["mask"]).transpose(0, 1)
        visual, text = joint.split([tokens.visual.shape[1], tokens.text.shape[1]], dim=1)
        return visual, text

    def output(self, network: Any, tokens: Tokens) -> Tensor:
        """See :meth:`FlowFamily.output`."""
        normed = network.final_norm(tokens.visual.transpose(0, 1), tokens.temb).type_as(tokens.visual)
        return self.unpack(network.final_linear(normed).transpose(0, 1), tokens.grid)

    @property
    def width(self) -> int:
        """See :attr:`FlowFamily.width`."""
        return self.entry(self.part, "hidden_size", int)

    def unread_outside(self, number: int, visual: bool, text: bool) -> tuple[str, ...]:
        """See :meth:`FlowFamily.unread_outside`; the modulation of blocks that are not there."""
        return () if number else ("adaLN_modulation", *(() if text else ("text_proj",)))


class ErnieImagePromptEncoder(LanguageModelEncoder):
    """Prompt encoder with Ministral, which gets each prompt as it is."""

    def text(self, prompt: str) -> str:
        """See :meth:`LanguageModelEncoder.text`."""
        return prompt


@register_backbone
def ernie_image(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of ERNIE-Image or ERNIE-Image-Turbo (Baidu, Apache-2.0), 8 billion parameters in 36 blocks.

    Args:
        source: Diffusers pipeline folder, or hub id.
        options: See :func:`~latentreward.families.backbone.load_family_backbone`.
    """
    return load_family_backbone(source, "ernie_image", **options)
