"""Qwen-Image; conventions follow diffusers' ``QwenImagePipeline``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.encoders.vae import ChannelLatentEncoder
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.base import PipelineConfigs
from latentreward.diffusion.families.flow import FlowFamily

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""Text that is encoded for a prompt; the tokens before the prompt are dropped afterwards."""
EDITORS = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")  # classes of pipelines of Qwen-Image-Edit


class QwenImage(FlowFamily):
    """Family of Qwen-Image and Qwen-Image-2512: two streams, Qwen2.5-VL with a mask, guidance that keeps the norm."""

    name = "qwen_image"
    title = "Qwen-Image"
    network_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    latent_encoder = ChannelLatentEncoder
    lists = ("transformer_blocks",)
    positions = 4
    sinusoids = ("time_text_embed.time_proj", 1.0)
    time_embedding = ("time_text_embed",)
    uncond_prompt = " "
    lora_loader = "QwenImageLoraLoaderMixin"
    text_input = ("txt_in", "txt_norm")
    text_output = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
    visual_output = ("attn.to_q", "attn.norm_q", "attn.to_out", "img_mlp")
    default_guidance = 4.0

    @classmethod
    def recognises(cls, pipeline: PipelineConfigs) -> bool:
        """See :meth:`Family.recognises`; Qwen-Image-Edit has another class of pipeline, or ``zero_cond_t``."""
        if not super().recognises(pipeline):
            return False
        zero_time = bool(pipeline.config(cls.part).get("zero_cond_t"))
        return (zero_time or pipeline.index.get("_class_name") in EDITORS) == (cls.sources != (0, 0))

    # Text

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the pipeline, checked."""
        from transformers import Qwen2Tokenizer

        return self.pipeline.tokenizer("tokenizer", Qwen2Tokenizer)

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import Qwen2_5_VLForConditionalGeneration

        whole = load(Qwen2_5_VLForConditionalGeneration, "text_encoder")
        return QwenImagePromptEncoder(whole.get_submodule("model.language_model"), self.tokenizer)

    # Guidance

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        """See :meth:`Family.guide`; each token of 2×2 pixels gets the norm of the prediction with the prompt."""
        guided = super().guide(with_prompt, without, scale)

        def norm(values: Tensor) -> Tensor:
            squares = values.float().square().sum(dim=1, keepdim=True)  # pooling on a CPU has no 16 bits
            return 2 * F.avg_pool3d(squares, (1, self.packing, self.packing)).sqrt()

        ratio = (norm(with_prompt) / norm(guided)).to(guided.dtype)
        return guided * F.interpolate(ratio, scale_factor=(1.0, self.packing, self.packing), mode="nearest-exact")

    # Network

    def load_network(self, pretrained: bool = True) -> Any:
        network = super().load_network(pretrained)
        rope = network.pos_embed
        with torch.device("cpu"):  # its tables are no buffers: made on the meta device, they would stay there
            network.pos_embed = Positions(type(rope)(rope.theta, rope.axes_dim, rope.scale_rope))
        return network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        dtype, grids = network.img_in.weight.dtype, self.grids(latents, conditioning)
        output = network(
            hidden_states=self.sequence(latents, conditioning).to(dtype),
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            encoder_hidden_states_mask=needed_mask(conditioning),
            timestep=sigma,
            img_shapes=[grids] * len(latents),
        ).sample
        return self.unpack(output, grids[0])

    # Adapters

    @cached_property
    def idle(self) -> Sequence[str]:
        """Names of layers whose output never reaches the network's: those of the last block's text output."""
        last = f"transformer_blocks.{self.entry(self.part, 'num_layers', int) - 1}"
        parts = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        return [f"{last}.{part}" for part in parts]


class Positions(nn.Module):
    """Rotary positions of a network, which keep tables for each device, made outside inference mode.

    Tables of a validation under inference mode could not serve a backward pass.
    """

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, *args: Any, **options: Any) -> Any:
        """Return what the network's own module returns."""
        with torch.inference_mode(False):
            return self.rope(*args, **options)


def needed_mask(conditioning: Conditioning) -> Tensor | None:
    """Return the mask of encoded prompts; None if it is true everywhere, for which attention is faster without it."""
    mask = conditioning.prompt_mask
    return None if mask is None or (not mask.is_meta and bool(mask.all())) else mask


def padded_rows(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return token ids padded at the end, and their mask, ``(B, longest)`` on the CPU."""
    with torch.device("cpu"):
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
    return ids, mask


def prefix_length(tokenizer: Any, template: str = TEMPLATE) -> int:
    """Return the number of tokens that a template begins with, whatever the prompt."""
    first, second = (tokenizer(template.format(prompt)).input_ids for prompt in ("a", "1"))
    return next(place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])


def without_prefix(states: Tensor, mask: Tensor, length: int) -> Conditioning:
    """Return encoded prompts without the first ``length`` tokens, zeros in place of padding."""
    states, kept = states[:, length:], mask[:, length:] != 0
    return Conditioning(states.masked_fill(~kept.unsqueeze(-1), 0.0), prompt_mask=kept)


class QwenImagePromptEncoder(PromptEncoder):
    """Prompt encoder of Qwen-Image: the states of Qwen2.5-VL's language model after its final norm, with a mask."""

    num_tokens = 512
    pooled_dim = 0
    masked = True

    def __init__(self, text_encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.token_dim = text_encoder.config.hidden_size
        self.dropped_tokens = prefix_length(tokenizer)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        texts, most = [TEMPLATE.format(prompt) for prompt in prompts], self.dropped_tokens + self.num_tokens
        rows = self.tokenizer(texts).input_ids
        self.tell_cut(self.tokenizer, texts, [len(row) for row in rows], most)
        return padded_rows([row[:most] for row in rows], self.tokenizer.pad_token_id)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        ids, mask = input_ids
        states = self.text_encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return without_prefix(states, mask, self.dropped_tokens)


@register_backbone
def qwen_image(source: PathText, **options: Any) -> FamilyBackbone:
    """Load Qwen-Image (Apache-2.0): 60 blocks."""
    return load_family_backbone(source, "qwen_image", **options)
