"""Krea 2: one stream of text and image tokens in the latents of Wan 2.1, which reads many layers of Qwen3-VL.

Conventions follow diffusers' ``Krea2Pipeline``. The network joins the layers' states of each text token itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.registry import register_backbone
from latentreward.core.storage.json_files import entries
from latentreward.diffusion.encoders.prompts import PromptEncoder, first_layers
from latentreward.diffusion.encoders.vae import ChannelLatentEncoder
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.flow import FlowFamily
from latentreward.diffusion.families.flux1 import positions
from latentreward.diffusion.families.qwen_image import TEMPLATE, needed_mask, padded_rows, prefix_length

LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Numbers of the text encoder's layers whose outputs are read where ``model_index.json`` names none."""
DISTILLED_MU = 1.15  # logarithm of the shift of a distilled model, for all sizes
TEXT_LENGTH = 512  # greatest number of tokens of a prompt with the end of its template


class Krea2(FlowFamily):
    """Family of Krea 2: one modulation for all blocks, and layers of Qwen3-VL that the network fuses.

    Guidance is p + s·(p − n) of the predictions with (p) and without (n) the prompt, so that a scale of 0 switches it
    off.
    """

    name = "krea2"
    title = "Krea 2"
    network_class = "Krea2Transformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    latent_encoder = ChannelLatentEncoder
    lists = ("transformer_blocks",)
    tail = ("final_layer",)
    positions = 4
    time_embedding = ("time_embed",)
    text_field = "text_hidden_dim"
    no_guidance = 0.0
    float32_parts = ("norm", "norm1", "norm2", "norm_q", "norm_k")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    lora_loader = "Krea2LoraLoaderMixin"
    text_input, modulation = ("text_fusion", "txt_in"), ("time_mod_proj",)

    @property
    def model(self) -> str:
        return f"{self.title} Turbo" if self.distilled else f"{self.title} Raw"

    # Text

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the text encoder's layers whose outputs are read, from 1 on."""
        given = self.pipeline.index if self.pipeline.index.get("text_encoder_select_layers") else {}
        return entries(given, "text_encoder_select_layers", int, self.named("model_index.json"), LAYERS)

    @property
    def text_dim(self) -> int:
        """See :attr:`FlowFamily.text_dim`; a token has the features of all layers that are read, one after another."""
        return super().text_dim * self.entry(self.part, "num_text_layers", int)

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import Qwen2Tokenizer, Qwen3VLModel

        model = load(Qwen3VLModel, "text_encoder").get_submodule("language_model")
        tokenizer = self.pipeline.tokenizer("tokenizer", Qwen2Tokenizer)
        return Krea2PromptEncoder(first_layers(model, max(self.layers)), tokenizer, self.layers)

    # Noise

    def mu(self, num_inference_steps: int, shape: Sequence[int]) -> float:
        return DISTILLED_MU if self.distilled else self.linear_mu(shape[-2] // 2 * (shape[-1] // 2))

    # Guidance

    @property
    def default_guidance(self) -> float | None:
        return None if self.distilled else 4.5

    # Network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        dtype, grid = network.img_in.weight.dtype, self.token_grid(latents)
        output = network(
            hidden_states=self.pack(latents).to(dtype),
            encoder_hidden_states=self.stacked(conditioning).to(dtype),
            timestep=sigma,
            position_ids=torch.cat(positions(conditioning.prompt_embeds.shape[1], [grid[1:]], latents.device)),
            encoder_attention_mask=needed_mask(conditioning),
        ).sample
        return self.unpack(output, grid)

    def stacked(self, conditioning: Conditioning) -> Tensor:
        """Return the states of text tokens by layer: ``(B, L, layers, D)``."""
        return conditioning.prompt_embeds.unflatten(-1, (self.entry(self.part, "num_text_layers", int), -1))

    # Features

    def temb(self, *found: Any) -> Tensor:
        return super().temb(*found).squeeze(1)


class Krea2PromptEncoder(PromptEncoder):
    """Prompt encoder of Krea 2: outputs of several layers of Qwen3-VL, one after another, with a mask.

    Prompts have the template of Qwen-Image, whose end stays where a long prompt is cut. The pipeline pads between the
    prompt and this end, gives padding no position and masks it; here padding follows instead, which changes no state.
    """

    num_tokens = TEXT_LENGTH
    pooled_dim = 0
    masked = True

    def __init__(self, text_encoder: Any, tokenizer: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer, self.layers = text_encoder, tokenizer, layers
        self.token_dim = len(layers) * text_encoder.config.hidden_size
        self.dropped_tokens = prefix_length(tokenizer)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        texts, most = [TEMPLATE.format(prompt) for prompt in prompts], self.dropped_tokens + self.num_tokens
        end = self.tokenizer(TEMPLATE.partition("{}")[2]).input_ids
        rows = self.tokenizer(texts).input_ids
        self.tell_cut(self.tokenizer, texts, [len(row) for row in rows], most)
        rows = [row if len(row) <= most else [*row[: most - len(end)], *end] for row in rows]
        return padded_rows(rows, self.tokenizer.pad_token_id)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        ids, mask = input_ids
        states = self.text_encoder(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        tokens = torch.cat([states[layer] for layer in self.layers], dim=-1)[:, self.dropped_tokens :]
        return Conditioning(tokens, prompt_mask=mask[:, self.dropped_tokens :] != 0)


@register_backbone
def krea2(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of Krea 2 Raw or Turbo (Krea 2 Community License), 12.9 billion parameters in 28 blocks."""
    return load_family_backbone(source, "krea2", **options)
