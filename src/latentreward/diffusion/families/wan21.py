"""Wan 2.1, text to video; an image is a clip of one frame.

Conventions follow diffusers' ``WanPipeline``. The names of layers in the programs that read kohya's format are those of
Wan's own code (``wan/modules/model.py``), which musubi-tuner and ComfyUI use.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.errors import InputError
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.prompts import PromptEncoder, masked_ids
from latentreward.diffusion.encoders.vae import ChannelLatentEncoder
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.base import Pair
from latentreward.diffusion.families.flow import FlowFamily
from latentreward.diffusion.noise.schedules import unipc_clock, unipc_levels

LAYERS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}
"""Name of a layer outside the blocks in diffusers → its name in Wan's own code."""
PARTS = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""Part of the name of a block's layer in diffusers → the part in Wan's own code."""


class Wan21(FlowFamily):
    """Family of Wan 2.1: latents with a time axis, UMT5, cross-attention to text that is the same in all blocks.

    With ``UniPCMultistepScheduler``, which the released pipelines hold, the network receives whole timesteps;
    its levels are sampled with Euler's steps.
    """

    name = "wan21"
    title = "Wan 2.1"
    clips = True
    network_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    latent_encoder = ChannelLatentEncoder
    lists = ("blocks",)
    tail = ("norm_out", "proj_out", "scale_shift_table")
    pixels = (480, 832)
    constant_text = True
    time_embedding = ("condition_embedder.time_embedder",)
    text_field = "text_dim"
    float32_parts = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    lora_loader = "WanLoraLoaderMixin"
    text_input, modulation = ("condition_embedder.text_embedder",), ("condition_embedder.time_proj",)
    kohya_module = "networks.lora_wan"
    t5_tokens = (512, 4096)
    default_guidance = 5.0

    def check(self) -> None:
        index, source = self.pipeline.index, self.pipeline.source
        reason = None
        if self.pipeline.has("transformer_2") or index.get("boundary_ratio") is not None:
            reason = "Wan 2.2 with two networks (A14B)"
        elif index.get("expand_timesteps"):
            reason = "Wan 2.2 TI2V 5B, whose tokens have timesteps of their own"
        if reason is not None:
            raise InputError(f"source={source!r} is {reason}, which is not supported; use Wan 2.1 text-to-video")
        super().check()

    # Latents

    @property
    def max_side(self) -> int:
        return self.packing * self.entry(self.part, "rope_max_seq_len", int, 1024)

    # Text

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import UMT5EncoderModel

        return WanPromptEncoder(load(UMT5EncoderModel, "text_encoder"), self.pipeline.tokenizer("tokenizer"), length)

    # Noise

    def levels(self, num_inference_steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        return unipc_levels(self.scheduler_config, num_inference_steps)

    def clock(self, sigma: Tensor) -> Tensor:
        """Return the numbers that the network receives for noise levels: 1000·σ, rounded down with UniPC."""
        return unipc_clock(self.scheduler_config, sigma)

    # Network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        dtype = network.patch_embedding.weight.dtype
        output: Tensor = network(
            hidden_states=latents.to(dtype),
            timestep=self.clock(sigma),
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
        ).sample
        return output

    # Adapters

    def kohya_layers(self, layers: Mapping[str, Pair]) -> dict[str, Pair]:
        return {own_name(layer): pair for layer, pair in layers.items()}


def own_name(layer: str) -> str:
    """Return the name in Wan's own code of a layer of diffusers' transformer."""
    if not layer.startswith("blocks."):
        return LAYERS.get(layer, layer)
    _, number, rest = layer.split(".", 2)
    for theirs, own in PARTS.items():
        rest = rest.replace(theirs, own)
    return f"blocks.{number}.{rest}"


class WanPromptEncoder(PromptEncoder):
    """Prompt encoder of Wan: the last hidden state of UMT5, and zeros after a prompt's tokens.

    The number of tokens is fixed and there is no mask: the network attends to the zeros too.
    """

    pooled_dim = 0

    def __init__(self, text_encoder: Any, tokenizer: Any, length: int = 512) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.num_tokens, self.token_dim = length, text_encoder.config.d_model

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return masked_ids(self, self.tokenizer, [cleaned(prompt) for prompt in prompts], self.num_tokens)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        ids, mask = input_ids
        states = self.text_encoder(ids, mask).last_hidden_state
        return Conditioning(states.masked_fill(mask.unsqueeze(-1) == 0, 0.0))


def cleaned(prompt: str) -> str:
    """Return a prompt without HTML entities and repeated whitespace, and repaired by ftfy where it is installed."""
    if find_spec("ftfy"):  # no requirement: WanPipeline too does without
        prompt = import_module("ftfy").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


@register_backbone
def wan21(source: PathText, **options: Any) -> FamilyBackbone:
    """Load Wan 2.1 text-to-video (Apache-2.0): 30 blocks (1.3B) or 40 (14B)."""
    return load_family_backbone(source, "wan21", **options)
