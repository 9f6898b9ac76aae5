"""Z-Image and Z-Image-Turbo: one stream of image and caption tokens, Qwen3 as text encoder, static shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.prompts import LanguageModelEncoder, PromptEncoder, without_last_layer
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.flow import FlowFamily

TURBO_SHIFT = 3.0  # shift of the scheduler of Z-Image-Turbo; the base model has 6
MULTIPLE = 32  # number of which the lengths of captions and images are multiples inside the network
TEXT_LENGTH = 512  # greatest number of tokens of a prompt with its template


class ZImage(FlowFamily):
    """Family of Z-Image: a transformer whose position ids depend on the length of the caption.

    The network takes lists of latents and captions and 1 − σ, and returns x_0 − ε. Base and Turbo have equal configs
    but for the scheduler's shift. Guidance is p + s·(p − n) of the predictions with (p) and without (n) the prompt, so
    that a scale of 0 switches it off.
    """

    name = "z_image"
    title = "Z-Image"
    network_class = "ZImageTransformer2DModel"
    lists = ("layers",)
    axes_lens = (1024, 512, 512)
    text_field = "cap_feat_dim"
    tail = ("all_final_layer",)
    time_embedding = ("t_embedder",)
    refines = True
    no_guidance = 0.0
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    lora_loader = "ZImageLoraLoaderMixin"
    text_input = ("cap_embedder", "cap_pad_token", "context_refiner")

    @property
    def turbo(self) -> bool:
        """Whether the pipeline is taken for Z-Image-Turbo."""
        return self.shift == TURBO_SHIFT

    @property
    def shift(self) -> float:
        """Shift of the pipeline's scheduler."""
        return float(self.entry("scheduler", "shift", float, 1.0))

    @property
    def model(self) -> str:
        return "Z-Image-Turbo" if self.turbo else "Z-Image"

    def assumption(self) -> str | None:
        guided = "without guidance" if self.turbo else "with classifier-free guidance"
        return (
            f"taken for {self.model}, which samples {guided}, because its scheduler's shift is {self.shift:g} (Z-Image "
            f"has 6, Z-Image-Turbo {TURBO_SHIFT:g})"
        )

    @property
    def max_prompt(self) -> int:
        """See :attr:`FlowFamily.max_prompt`; the image has the position after the padded prompt, which begins at 1."""
        return (self.lens[0] - 2) // MULTIPLE * MULTIPLE

    # Text

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import Qwen3Model

        model = without_last_layer(load(Qwen3Model, "text_encoder"))
        return ZImagePromptEncoder(model, self.chat_tokenizer(), TEXT_LENGTH)

    # Guidance

    @property
    def default_guidance(self) -> float | None:
        return None if self.turbo else 5.0

    # Network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        dtype = embedder(network).weight.dtype
        rows = zip(conditioning.prompt_embeds.to(dtype), lengths_of(conditioning), strict=True)
        captions = [tokens[:length] for tokens, length in rows]
        images = list(latents.to(dtype).unsqueeze(2).unbind())
        output = network(images, 1 - sigma, captions, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)

    # Features

    def split(self, number: int, found: Any, visual: int, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """See :meth:`FlowFamily.split`; blocks take the image, its padding and the caption, in this order."""
        start = visual + -visual % MULTIPLE
        return found[:, :visual], found[:, start : start + conditioning.prompt_embeds.shape[1]]

    @property
    def width(self) -> int:
        return self.entry(self.part, "dim", int)

    @property
    def temb_dim(self) -> int:
        return min(self.width, 256)


class ZImagePromptEncoder(LanguageModelEncoder):
    """Prompt encoder with Qwen3, which gets the prompt as a user's message of its chat template."""

    def text(self, prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        text: str = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text


def embedder(network: Any) -> Any:
    """Return the layer that embeds patches of 2×2 latent pixels."""
    return network.all_x_embedder["2-1"]


def lengths_of(conditioning: Conditioning) -> list[int]:
    """Return the number of tokens of each prompt."""
    tokens, mask = conditioning.prompt_embeds, conditioning.prompt_mask
    return [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(dim=1).tolist()


@register_backbone
def z_image(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of Z-Image or Z-Image-Turbo (Tongyi-MAI, Apache-2.0), 6 billion parameters in 30 blocks."""
    return load_family_backbone(source, "z_image", **options)
