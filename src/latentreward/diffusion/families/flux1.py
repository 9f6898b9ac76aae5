"""FLUX.1: FLUX.1-dev, FLUX.1-schnell and checkpoints with the same networks, such as FLUX.1-Krea-dev.

The network takes 2×2 patches of the latents as tokens. Its blocks first keep image and text apart and then join them.
FLUX.1-dev was distilled from classifier-free guidance: it takes ``guidance_scale`` as an input and runs once per step.
FLUX.1-schnell was distilled further and takes none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.errors import InputError
from latentreward.core.registry import register_backbone
from latentreward.diffusion.backbones.tuning import ATTENTION
from latentreward.diffusion.encoders.prompts import PromptEncoder, masked_ids, token_ids
from latentreward.diffusion.encoders.vae import SourceSize
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.base import PipelineConfigs
from latentreward.diffusion.families.flow import FlowFamily

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

EDITOR = "FluxKontextPipeline"  # class of FLUX.1-Kontext's pipeline
TEXT_OUTPUT = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context")
VISUAL_OUTPUT = ("attn.to_q", "attn.norm_q", "attn.to_out", "ff")
"""Submodules of a dual block of FLUX.1 or FLUX.2 that only its text output, or only its visual output, depends on."""
SOURCE_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    (1024, 1024),
    *((1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)),
)
"""(width, height) in pixels of the sources that FLUX.1-Kontext was trained on."""
MOST_TOKENS = 512  # largest number of T5 tokens per prompt that FLUX.1's pipeline takes


class Flux1PromptEncoder(PromptEncoder):
    """Prompt encoder of FLUX.1: the last hidden states of T5, and CLIP-L's EOS feature without projection as pooled.

    Prompts are padded to ``t5_length`` tokens. T5 gets no attention mask, and the network no mask: padding tokens take
    part, as in FLUX.1's pipeline.
    """

    tokens_only = ("text_encoder_2",)

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        text_encoder_2: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        *,
        t5_length: int = MOST_TOKENS,
    ) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.clip_length = text_encoder.config.max_position_embeddings
        self.num_tokens = t5_length
        self.token_dim = text_encoder_2.config.d_model
        self.pooled_dim = text_encoder.config.hidden_size

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        tokens, _ = masked_ids(self, self.tokenizer_2, prompts, self.num_tokens)
        return token_ids(self.tokenizer, prompts, self.clip_length), tokens

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        pooled = self.text_encoder(input_ids[0]).pooler_output
        return Conditioning(self.text_encoder_2(input_ids[1]).last_hidden_state, pooled)


class Flux1(FlowFamily):
    """Family of FLUX.1: dual and single blocks, T5 and a pooled CLIP vector, guidance as an input or none."""

    name = "flux1"
    title = "FLUX.1"
    network_class = "FluxTransformer2DModel"
    lists = ("transformer_blocks", "single_transformer_blocks")
    positions = 4
    text_input = ("context_embedder",)
    text_output, visual_output = TEXT_OUTPUT, VISUAL_OUTPUT
    sinusoids = ("time_text_embed.time_proj", 1000.0)
    time_embedding = ("time_text_embed",)
    # Those of diffusers' training script and of Flow-GRPO for FLUX.1.
    lora_targets = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    lora_loader = "FluxLoraLoaderMixin"

    @classmethod
    def recognises(cls, pipeline: PipelineConfigs) -> bool:
        """See :meth:`Family.recognises`; FLUX.1-Kontext has the same network, and another class of pipeline."""
        return super().recognises(pipeline) and (pipeline.index.get("_class_name") == EDITOR) == bool(cls.sources[1])

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes ``guidance_scale`` as an input (FLUX.1-dev)."""
        return bool(self.config.get("guidance_embeds"))

    @property
    def model(self) -> str:
        return "FLUX.1-dev" if self.takes_guidance else "FLUX.1-schnell"

    # Text

    @property
    def t5_tokens(self) -> tuple[int, int]:  # type: ignore[override]
        """See :attr:`FlowFamily.t5_tokens`; FLUX.1-schnell was trained with 256."""
        return 512 if self.takes_guidance else 256, MOST_TOKENS

    @property
    def pooled_dim(self) -> int:
        return self.entry(self.part, "pooled_projection_dim", int)

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import CLIPTextModel, T5EncoderModel

        models = load(CLIPTextModel, "text_encoder"), load(T5EncoderModel, "text_encoder_2")
        tokenizers = self.pipeline.tokenizer("tokenizer"), self.pipeline.tokenizer("tokenizer_2")
        return Flux1PromptEncoder(*models, *tokenizers, t5_length=length)

    # Guidance

    @property
    def default_guidance(self) -> float | None:
        return 3.5 if self.takes_guidance else None

    def guidance(self, scale: float | None) -> float | None:
        """See :meth:`Family.guidance`; any number from 0 is an input that FLUX.1-dev's network takes."""
        if scale is None or not self.takes_guidance:
            return super().guidance(scale)
        if not 0 <= scale < math.inf:
            raise InputError(
                f"guidance_scale={scale:g} must be at least 0 and finite; {self.model} was made for about 3.5"
            )
        return scale

    def needs_uncond(self, scale: float | None) -> bool:
        return False

    # Network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        assert conditioning.pooled_prompt_embeds is not None
        dtype, grids = network.x_embedder.weight.dtype, self.grids(latents, conditioning)
        text = conditioning.prompt_embeds.to(dtype)
        text_ids, image_ids = positions(text.shape[1], grids, latents.device)
        scale = self.default_guidance if guidance is None else guidance
        output = network(
            hidden_states=self.sequence(latents, conditioning).to(dtype),
            encoder_hidden_states=text,
            pooled_projections=conditioning.pooled_prompt_embeds.to(dtype),
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=torch.full_like(sigma, scale) if self.takes_guidance and scale is not None else None,
        ).sample
        return self.unpack(output, grids[0])


class Flux1Kontext(Flux1):
    """Family of FLUX.1-Kontext-dev: as FLUX.1-dev, trained to edit, with one source or none.

    The source's tokens follow those of the picture that is made. They are clean at every noise level, and told apart by
    the first coordinate of their positions. Without a source the network makes pictures from text.
    """

    name = "flux1_kontext"
    title = "FLUX.1-Kontext"
    sources = (0, 1)

    @property
    def model(self) -> str:
        return "FLUX.1-Kontext-dev"

    def source_size(self, height: int, width: int) -> SourceSize:
        """See :meth:`Family.source_size`; that of :data:`SOURCE_SIZES` with the nearest aspect, which is not kept."""
        aspect = (width // self.side_multiple) / (height // self.side_multiple)
        columns, rows = min(SOURCE_SIZES, key=lambda size: (abs(aspect - size[0] / size[1]), size))
        return SourceSize((rows, columns))

    @property
    def default_guidance(self) -> float | None:
        """See :attr:`Family.default_guidance`; that of the model's card."""
        return 2.5


def positions(length: int, grids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions ``(n, 3)`` of tokens: all 0 for text, (k, row, column) for picture k; 0 is the one made."""
    return torch.zeros(length, 3, device=device), picture_positions(grids, device)


def picture_positions(grids: Sequence[Sequence[int]], device: torch.device, step: int = 1) -> Tensor:
    """Return the positions ``(n, 3)`` of the tokens of pictures k: (step·k, row, column)."""
    pictures = [
        torch.cartesian_prod(*(torch.arange(first, last, device=device) for first, last in axes)).float()
        for axes in (((step * k, step * k + 1), *((0, side) for side in grid)) for k, grid in enumerate(grids))
    ]
    return torch.cat(pictures) if len(pictures) > 1 else pictures[0]


@register_backbone
def flux1(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of FLUX.1-dev (FLUX.1 [dev] Non-Commercial License) or FLUX.1-schnell (Apache-2.0)."""
    return load_family_backbone(source, "flux1", **options)


@register_backbone
def flux1_kontext(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of FLUX.1-Kontext-dev (FLUX.1 [dev] Non-Commercial License)."""
    return load_family_backbone(source, "flux1_kontext", **options)
