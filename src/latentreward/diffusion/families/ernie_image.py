"""ERNIE-Image: one stream of image and text tokens in FLUX.2's latents, Ministral as text encoder, static shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.prompts import LanguageModelEncoder, PromptEncoder, without_last_layer
from latentreward.diffusion.encoders.vae import PatchedLatentEncoder
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.flow import FlowFamily
from latentreward.diffusion.families.z_image import lengths_of

TEXT_LENGTH = 1024  # greatest number of tokens of a prompt; the pipeline's is that of the tokenizer, which has none


class ErnieImage(FlowFamily):
    """Family of ERNIE-Image: a transformer with one modulation for all blocks, which takes tokens before rows.

    The position of the image on the first axis is the number of the prompt's tokens.
    """

    name = "ernie_image"
    title = "ERNIE-Image"
    network_class = "ErnieImageTransformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    latent_encoder = PatchedLatentEncoder
    lists = ("layers",)
    tail = ("final_norm", "final_linear")
    packing = 1
    time_embedding = ("time_embedding",)
    text_field = "text_in_dim"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    lora_loader = "ErnieImageLoraLoaderMixin"
    text_input, modulation = ("text_proj",), ("adaLN_modulation",)
    default_guidance = 4.0

    def assumption(self) -> str | None:
        return (
            "ERNIE-Image and ERNIE-Image-Turbo have equal configs; taken for the former, which samples with guidance; "
            "for Turbo set guidance_scale to 1. Prompts are encoded as given, without the pipeline's prompt enhancer"
        )

    # Text

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import Mistral3Model

        model = without_last_layer(load(Mistral3Model, "text_encoder").get_submodule("language_model"))
        return ErnieImagePromptEncoder(model, self.pipeline.tokenizer("tokenizer"), TEXT_LENGTH)

    # Network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        dtype = network.x_embedder.proj.weight.dtype
        lengths = torch.tensor(lengths_of(conditioning), device=latents.device)
        text = conditioning.prompt_embeds.to(dtype)
        output: Tensor = network(latents.to(dtype), 1000 * sigma, text, lengths, return_dict=False)[0]
        return output

    # Features

    def split(self, number: int, found: Any, visual: int, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """See :meth:`FlowFamily.split`; blocks take the image and then the text, ``(tokens, B, D)``."""
        image, text = found.transpose(0, 1).tensor_split([visual], dim=1)
        return image, text

    @property
    def width(self) -> int:
        return self.entry(self.part, "hidden_size", int)


class ErnieImagePromptEncoder(LanguageModelEncoder):
    """Prompt encoder with Ministral, which gets each prompt as it is."""

    def text(self, prompt: str) -> str:
        return prompt


@register_backbone
def ernie_image(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of ERNIE-Image or ERNIE-Image-Turbo (Baidu, Apache-2.0), 8 billion parameters."""
    return load_family_backbone(source, "ernie_image", **options)
