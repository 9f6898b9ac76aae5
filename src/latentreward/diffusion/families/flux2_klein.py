"""FLUX.2-klein: the base and distilled models of 4 and 9 billion parameters.

The latents are those of FLUX.2's VAE after its 2×2 patches and its batch norm: 128 channels at 1/16 of the size, of
which each position is one token. All blocks of a kind share their modulation. Classifier-free guidance takes a second
pass; the distilled models take none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.errors import InputError
from latentreward.core.registry import register_backbone
from latentreward.diffusion.backbones.tuning import ATTENTION
from latentreward.diffusion.encoders.prompts import PromptEncoder, first_layers, masked_ids
from latentreward.diffusion.encoders.vae import PatchedLatentEncoder, SourceSize
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.flow import FlowFamily
from latentreward.diffusion.families.flux1 import TEXT_OUTPUT, VISUAL_OUTPUT, picture_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

LAYERS = (9, 18, 27)  # numbers of the text encoder's layers whose outputs are joined
TOKENS = 512  # number of tokens per prompt


class Flux2KleinPromptEncoder(PromptEncoder):
    """Prompt encoder of FLUX.2-klein: the outputs of the layers :data:`LAYERS` of Qwen3, joined along the features.

    A prompt is one user turn of Qwen3's chat template with thinking switched off, padded to :data:`TOKENS` on the
    tokenizer's side. The text encoder ignores padding, but the network does not: it gets no mask. The pooled vector,
    which the network does not take, is the mean of the prompt's own tokens. Layers after the last one read are removed.
    Their norm goes with them, but stays in a text encoder that ends with the last one read, as the pipeline then reads
    it after the norm.
    """

    pools_tokens = True

    def __init__(self, text_encoder: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        model: Any = text_encoder.model
        first_layers(model, LAYERS[-1])
        text_encoder.lm_head = nn.Identity()  # type: ignore[assignment]
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.num_tokens = TOKENS
        self.token_dim = self.pooled_dim = len(LAYERS) * text_encoder.config.hidden_size

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        texts: Any = [self.tokenizer.apply_chat_template(turn, **template) for turn in turns]
        return masked_ids(self, self.tokenizer, texts, self.num_tokens)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        ids, mask = input_ids
        states = self.text_encoder.model(ids, mask, output_hidden_states=True, use_cache=False).hidden_states
        tokens = torch.cat([states[layer] for layer in LAYERS], dim=-1)
        return Conditioning(tokens, Conditioning(tokens, prompt_mask=mask.bool()).pooled())


class Flux2Klein(FlowFamily):
    """Family of FLUX.2-klein: dual and single blocks with shared modulation, Qwen3, normalised patches as latents."""

    name = "flux2_klein"
    title = "FLUX.2-klein"
    network_class = "Flux2Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    latent_encoder = PatchedLatentEncoder
    lists = ("transformer_blocks", "single_transformer_blocks")
    packing = 1
    sinusoids = ("time_guidance_embed.time_proj", 1000.0)
    time_embedding = ("time_guidance_embed",)
    # Those of diffusers' training script, and the text's projections. A bare `attn.to_out` would also name the dual
    # blocks' lists of an output layer and a dropout, which peft refuses.
    lora_targets = (
        *ATTENTION,
        "to_qkv_mlp_proj",
        *(f"single_transformer_blocks.{number}.attn.to_out" for number in range(48)),
    )
    lora_loader = "Flux2LoraLoaderMixin"
    sources = (0, None)
    text_input = ("context_embedder",)
    modulation = ("double_stream_modulation_img", "double_stream_modulation_txt")
    text_output, visual_output = TEXT_OUTPUT, VISUAL_OUTPUT

    @property
    def model(self) -> str:
        return f"{self.title} (distilled)" if self.distilled else f"{self.title} (base)"

    # Latents

    def source_size(self, height: int, width: int) -> SourceSize:
        """See :meth:`Family.source_size`; pictures of up to 1024² pixels keep their size, and all are cropped."""
        longer, shorter = max(height, width), min(height, width)
        if shorter < 64 or longer > 8 * shorter:
            told = "takes sides of at least 64 pixels, the longer at most 8 times the shorter; crop the picture"
            raise InputError(f"a source of {width} × {height} pixels: {self.title} {told}")
        scale = min(1.0, math.sqrt(1024 * 1024 / (width * height)))
        rows, columns = int(height * scale), int(width * scale)
        return SourceSize((rows, columns), (rows - rows % self.side_multiple, columns - columns % self.side_multiple))

    # Text

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import Qwen3ForCausalLM

        return Flux2KleinPromptEncoder(load(Qwen3ForCausalLM, "text_encoder"), self.chat_tokenizer())

    # Noise

    def mu(self, num_inference_steps: int, shape: Sequence[int]) -> float:
        """See :meth:`FlowFamily.mu`; linear in the number of tokens and, up to 4300 of them, in that of steps."""
        tokens = shape[-2] * shape[-1]
        of_200 = 0.00016927 * tokens + 0.45666666
        of_10 = 8.73809524e-05 * tokens + 1.89833333
        return of_200 if tokens > 4300 else of_200 + (of_200 - of_10) / 190 * (num_inference_steps - 200)

    # Guidance

    @property
    def default_guidance(self) -> float | None:
        return None if self.distilled else 4.0

    # Network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        dtype, text = network.x_embedder.weight.dtype, conditioning.prompt_embeds
        grids = self.grids(latents, conditioning)
        text_ids, image_ids = positions(text.shape[1], grids, latents.device)
        output = network(
            hidden_states=self.sequence(latents, conditioning).to(dtype),
            encoder_hidden_states=text.to(dtype),
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=None,
        ).sample
        return self.unpack(output, grids[0])

    # Features

    def unread_outside(self, number: int, visual: bool, text: bool) -> tuple[str, ...]:
        """See :meth:`FlowFamily.unread_outside`; the modulation of blocks that are not there."""
        single = ("single_stream_modulation",) if number <= self.dual_blocks else ()
        return *single, *super().unread_outside(number, visual, text)


def positions(length: int, grids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions ``(n, 4)`` of tokens: (0, 0, 0, j) for text, (10·k, row, column, 0) for picture k."""
    text = torch.arange(length, device=device).float()[:, None]
    return F.pad(text, (3, 0)), F.pad(picture_positions(grids, device, step=10), (0, 1))


@register_backbone
def flux2_klein(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of FLUX.2-klein: 4B (Apache-2.0) or 9B (FLUX Non-Commercial License)."""
    return load_family_backbone(source, "flux2_klein", **options)
