"""Ideogram 4: one stream of text and image tokens in patches of FLUX.2's VAE, which reads 13 layers of Qwen3-VL.

Conventions follow diffusers' ``Ideogram4Pipeline``. The network takes 1 − σ and returns x_0 − ε.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.errors import InputError
from latentreward.core.registry import register_backbone
from latentreward.diffusion.encoders.prompts import LanguageModelEncoder, PromptEncoder, first_layers
from latentreward.diffusion.encoders.vae import PatchedLatentEncoder
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.flow import FlowFamily
from latentreward.diffusion.noise.schedules import shifted_levels

LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)
"""Numbers, from 0, of the text encoder's layers whose outputs are read, before its final norm."""
TEXT_LENGTH = 2048  # greatest number of tokens of a prompt with its template
TEXT, IMAGE = 3, 2  # roles of tokens; 0 is padding
FIRST_PLACE = 65536  # position of the image's first row and column, and of all its tokens on the first axis
SPREAD = 1.5  # standard deviation of the logits of the noise levels
LEAST, MOST = (1 / (1 + math.exp(logit)) for logit in (7.5, -9.0))  # noise levels, but for the last one, which is 0


def by_channel(features: Tensor) -> Tensor:
    """Bring features of 2×2 patches, in the last axis, from the network's order (dy, dx, c) into (c, dy, dx)."""
    return features.unflatten(-1, (4, -1)).mT.flatten(-2)


class Ideogram4LatentEncoder(PatchedLatentEncoder):
    """Frozen VAE of FLUX.2 whose batch norm has the statistics of Ideogram 4's latents, in the network's order.

    The order of the latents' channels is FLUX.2's, so that equal statistics are one latent space.
    """

    arranged = staticmethod(by_channel)


class Ideogram4(FlowFamily):
    """Family of Ideogram 4, without guidance: that of its pipeline takes a second network of the same size.

    Attention sees the tokens of the prompt and of the image. Padding follows the prompt's tokens here and comes before
    them in the pipeline, which changes no state, as positions are those of the prompt alone.
    """

    name = "ideogram4"
    title = "Ideogram 4"
    network_class = "Ideogram4Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    latent_encoder = Ideogram4LatentEncoder
    lists = ("layers",)
    tail = ("final_layer",)
    packing = 1
    time_embedding = ("t_embedding", "adaln_proj")
    text_field = "llm_features_dim"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    lora_loader = "Ideogram4LoraLoaderMixin"
    text_input = ("llm_cond_norm", "llm_cond_proj")
    default_guidance = None

    def assumption(self) -> str | None:
        return "pictures are sampled without guidance, which takes a second network; prompts are encoded as given"

    # Text

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import Qwen3VLModel

        model = load(Qwen3VLModel, "text_encoder").get_submodule("language_model")
        return Ideogram4PromptEncoder(first_layers(model, LAYERS[-1] + 1), self.chat_tokenizer(), TEXT_LENGTH)

    # Noise

    def levels(self, num_inference_steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See :meth:`Family.levels`; quantiles of a logit-normal distribution whose mean grows with the picture."""
        mean = 0.5 * math.log(math.prod(shape[-2:]) * self.latent_space.downscale**2 / 512**2)
        quantiles = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64, device="cpu")[:-1]
        sigmas = torch.sigmoid(mean + SPREAD * torch.special.ndtri(quantiles)).clamp(LEAST, MOST)
        return shifted_levels(self.scheduler_config, num_inference_steps, None, sigmas.float().numpy())

    # Guidance

    def guidance(self, scale: float | None) -> float | None:
        """See :meth:`Family.guidance`; a scale of 1 is that of the pipeline too, and switches guidance off."""
        if scale not in (None, self.no_guidance):
            raise InputError(
                f"guidance_scale={scale:g}, but {self.title} is guided by a second network (unconditional_transformer)"
                f", which is not supported; leave it out, or set it to {self.no_guidance:g}, which is off"
            )
        return scale

    # Network

    def load_network(self, pretrained: bool = True) -> Any:
        """See :meth:`Family.load_network`; queries and keys get the type of the rotation, and attention takes one."""
        network = super().load_network(pretrained)
        for block in network.layers:
            block.attention.register_forward_pre_hook(rotating_in_own_type, with_kwargs=True)
        return network

    def pack(self, latents: Tensor) -> Tensor:
        return super().pack(latents).unflatten(-1, (-1, 4)).mT.flatten(-2)

    def unpack(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        return super().unpack(by_channel(tokens), grid)

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        tokens, text = self.pack(latents).to(network.input_proj.weight.dtype), conditioning.prompt_embeds
        (rows, length), image, mask = text.shape[:2], tokens.shape[1], conditioning.prompt_mask
        roles = tokens.new_full((rows, length + image), IMAGE, dtype=torch.long)
        roles[:, :length] = TEXT if mask is None else TEXT * mask
        places = positions(length, self.token_grid(latents), latents.device)
        # The network takes the 53,248 features of a text token for each token of the image too, gigabytes of zeros:
        # its two layers of text get those of the prompt alone.
        norm, projection = network.llm_cond_norm, network.llm_cond_proj
        with (
            exact_time(network),
            norm.register_forward_pre_hook(lambda module, inputs: text.to(tokens.dtype)),
            projection.register_forward_hook(lambda module, inputs, output: F.pad(output, (0, 0, 0, image))),
        ):
            output = network(
                hidden_states=F.pad(tokens, (0, 0, length, 0)),
                timestep=1 - sigma,
                encoder_hidden_states=tokens.new_zeros(rows, length + image, 1),
                position_ids=places.expand(rows, -1, -1),
                segment_ids=roles > 0,
                indicator=roles,
            ).sample
        return -self.unpack(output[:, length:], self.token_grid(latents))

    # Features

    def temb(self, *found: Any) -> Tensor:
        return F.silu(found[-1].squeeze(1))

    @property
    def temb_dim(self) -> int:
        return self.entry(self.part, "adaln_dim", int)


def positions(length: int, grid: Sequence[int], device: torch.device) -> Tensor:
    """Return positions ``(n, 3)`` of tokens: (j, j, j) for text, and far from it (0, row, column) for the image."""
    text = torch.arange(length, device=device)[:, None].expand(-1, 3)
    image = torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, *grid)))
    return torch.cat([text, FIRST_PLACE + image])


def rotating_in_own_type(attention: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give an attention, before it runs, the rotation in the type of its values."""
    kind = attention.to_v.weight.dtype
    if kind.is_floating_point:
        named["image_rotary_emb"] = tuple(part.to(kind) for part in named["image_rotary_emb"])
    return inputs, named


def exact_time(network: Any) -> Any:
    """Return a context in which the network embeds float32 times, of which bfloat16 would join several to one."""
    layer = network.t_embedding.mlp_in
    return layer.register_forward_pre_hook(lambda module, inputs: inputs[0].to(module.weight.dtype))


class Ideogram4PromptEncoder(LanguageModelEncoder):
    """Prompt encoder of Ideogram 4: outputs of the layers :data:`LAYERS` of Qwen3-VL, one feature after another.

    A prompt is a user's message of its chat template. The language model's final norm is removed.
    """

    def __init__(self, text_encoder: Any, tokenizer: Any, num_tokens: int) -> None:
        super().__init__(text_encoder, tokenizer, num_tokens)
        text_encoder.norm = nn.Identity()
        self.token_dim *= len(LAYERS)

    def text(self, prompt: str) -> str:
        message = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        text: str = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return text

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        (ids,) = input_ids
        mask = ids >= 0
        given = {"input_ids": ids.clamp(min=0), "attention_mask": mask}
        states = self.text_encoder(**given, output_hidden_states=True, use_cache=False).hidden_states
        return Conditioning(torch.stack([states[layer + 1] for layer in LAYERS], dim=-1).flatten(2), prompt_mask=mask)


@register_backbone
def ideogram4(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of Ideogram 4 (Ideogram Non-Commercial Model Agreement), 9.3 billion parameters."""
    return load_family_backbone(source, "ideogram4", **options)
