"""HiDream-I1: a mixture of experts in FLUX.1's latents, two CLIPs, T5, and a layer of Llama for each block.

Conventions follow diffusers' ``HiDreamImagePipeline``. A block reads the tokens of T5 and of Llama's last layer, which
go from block to block, and those of its own layer of Llama, which end with it. A picture that is not square is padded
to as many tokens as the largest square one has; padding is not masked, its keys are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from latentreward.core.contracts import Conditioning, PathText
from latentreward.core.errors import InputError
from latentreward.core.registry import register_backbone
from latentreward.core.storage.json_files import entries
from latentreward.diffusion.encoders.prompts import PromptEncoder, first_layers, masked_ids, token_ids
from latentreward.diffusion.families.backbone import FamilyBackbone, load_family_backbone
from latentreward.diffusion.families.flow import FlowFamily
from latentreward.diffusion.noise.schedules import unipc_clock, unipc_levels

TEXT_LENGTH, CLIP_LENGTH = 128, 218  # tokens of a prompt for T5 and Llama, and at most for the CLIPs
LLAMA = "text_encoder_4"


class HiDream(FlowFamily):
    """Family of HiDream-I1: dual and single blocks with experts, and no mask of padded prompts.

    With ``UniPCMultistepScheduler``, which the released pipeline of the undistilled model holds, the network receives
    whole timesteps; its levels are sampled with Euler's steps. The network's output is x_0 − ε.
    """

    name = "hidream"
    title = "HiDream-I1"
    network_class = "HiDreamImageTransformer2DModel"
    lists = ("double_stream_blocks", "single_stream_blocks")
    tail = ("final_layer",)
    time_embedding = ("t_embedder", "p_embedder")
    lora_targets = ("to_q", "to_k", "to_v", "to_out")
    lora_loader = "HiDreamImageLoraLoaderMixin"
    t5_tokens = (TEXT_LENGTH, 512)
    default_guidance = 5.0
    text_output = ("block.attn1.to_q_t", "block.attn1.q_rms_norm_t", "block.attn1.to_out_t", "block.ff_t")
    visual_output = ("block.attn1.to_q", "block.attn1.q_rms_norm", "block.attn1.to_out", "block.ff_i")

    # Latents

    def latent_shape(self, height: int | None = None, width: int | None = None, frames: int = 1) -> tuple[int, ...]:
        shape = super().latent_shape(height, width, frames)
        self.check_area(shape)
        return shape

    def check_area(self, shape: Sequence[int]) -> None:
        """Raise InputError if latents of a ``shape`` that is not square have too many tokens."""
        rows, columns = (side // self.packing for side in shape[-2:])
        high, wide = entries(self.config, "max_resolution", int, self.named(self.part), (128, 128))
        most = high * wide // self.packing**2
        if rows != columns and rows * columns > most:
            raise InputError(
                f"{self.title} takes pictures that are not square of at most {most} tokens, and {rows} × {columns} are "
                f"{rows * columns}; choose a smaller size"
            )

    # Text

    @property
    def layers(self) -> tuple[int, ...]:
        """Number of the layer of Llama, from 0, that each block reads."""
        return self.entry(self.part, "llama_layers", tuple[NonNegativeInt, ...])  # type: ignore[type-var]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of features of a token of T5 and of Llama."""
        return entries(self.config, "caption_channels", int, self.named(self.part))

    @property
    def text_dim(self) -> int:
        """See :attr:`FlowFamily.text_dim`; a token has the features of T5 and of all layers of Llama that are read."""
        return self.widths[0] + len({*self.layers}) * self.widths[1]

    @property
    def pooled_dim(self) -> int:
        return self.entry(self.part, "text_emb_dim", int)

    def prompt_encoder(self, load: Any, length: int) -> PromptEncoder:
        from transformers import CLIPTextModelWithProjection, LlamaForCausalLM, T5EncoderModel

        if not self.pipeline.has(LLAMA):
            raise InputError(
                f"source={self.pipeline.source!r} has no {LLAMA}: {self.title} is published without "
                "Llama-3.1-8B-Instruct; load the pipeline with it once and save it whole (docs/families.md)"
            )
        kinds = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel, LlamaForCausalLM)
        ends = ("", "_2", "_3", "_4")
        models = [load(kind, f"text_encoder{end}") for kind, end in zip(kinds, ends, strict=True)]
        models[3] = first_layers(models[3].get_submodule("model"), max(self.layers) + 1)
        tokenizers = [self.pipeline.tokenizer(f"tokenizer{end}") for end in ends]
        tokenizers[3].pad_token = tokenizers[3].eos_token
        return HiDreamPromptEncoder(models, tokenizers, length, sorted({*self.layers}))

    # Noise

    def levels(self, num_inference_steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        return unipc_levels(self.scheduler_config, num_inference_steps)

    # Network

    def load_network(self, pretrained: bool = True) -> Any:
        """See :meth:`Family.load_network`; experts get a gradient, which diffusers leaves out in evaluation mode."""
        network = super().load_network(pretrained)
        for module in network.modules():
            if hasattr(module, "moe_infer"):
                module.forward = partial(mixed, module)
        return network

    def velocity(
        self, network: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        assert conditioning.pooled_prompt_embeds is not None
        self.check_area(latents.shape)
        dtype = network.x_embedder.proj.weight.dtype
        words, layers = self.texts(conditioning, dtype)
        output: Tensor = network(
            hidden_states=latents.to(dtype),
            timesteps=unipc_clock(self.scheduler_config, sigma),
            encoder_hidden_states_t5=words,
            encoder_hidden_states_llama3=layers,
            pooled_embeds=conditioning.pooled_prompt_embeds.to(dtype),
        ).sample
        return -output

    def texts(self, conditioning: Conditioning, dtype: torch.dtype) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the tokens of T5 ``(B, L, D)``, and those of Llama by the number of the layer."""
        first, rest = conditioning.prompt_embeds.to(dtype).tensor_split([self.widths[0]], dim=-1)
        numbers = sorted({*self.layers})
        return first, dict(zip(numbers, rest.chunk(len(numbers), dim=-1), strict=True))

    # Features

    def split(self, number: int, found: Any, visual: int, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """See :meth:`FlowFamily.split`; the text of a block's own layer follows the tokens of T5 and of Llama."""
        if isinstance(found, tuple):
            image, text = found if number else found[::-1]
        else:  # with the padding of the picture
            image, text = found.tensor_split([visual], dim=1)
        return image, text[:, : 2 * conditioning.prompt_embeds.shape[1]]

    def temb(self, *found: Any) -> Tensor:
        """See :meth:`FlowFamily.temb`; with that of the pooled text."""
        return found[0] + found[1]

    def unread_outside(self, number: int, visual: bool, text: bool) -> tuple[str, ...]:
        """See :meth:`FlowFamily.unread_outside`; the projections for blocks that are not there."""
        if not (number or text):
            return ("caption_projection",)
        return tuple(f"caption_projection.{block}" for block in range(number, len(self.layers) - 1))


class HiDreamPromptEncoder(PromptEncoder):
    """Prompt encoder of HiDream-I1: T5 and several layers of Llama one after another by token, and both CLIPs pooled.

    Prompts are padded to ``length`` tokens of T5 and of Llama, which themselves leave padding out of attention; the
    network attends to it.

    Args:
        models: CLIP-L, CLIP-G, T5, and Llama without its output layer, as :func:`first_layers` returns it.
        tokenizers: Their tokenizers.
        length: Number of tokens of T5, of Llama and, up to 218, of the CLIPs.
        layers: Numbers of Llama's layers that are read, from 0.
    """

    tokens_only = ("text_encoder_3", "text_encoder_4")

    def __init__(self, models: Sequence[Any], tokenizers: Sequence[Any], length: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.text_encoder_3, self.text_encoder_4 = models
        self.tokenizers, self.num_tokens, self.layers = tokenizers, length, layers
        self.token_dim = models[2].config.d_model + len(layers) * models[3].config.hidden_size
        self.pooled_dim = sum(model.config.projection_dim for model in models[:2])

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        found = [token_ids(words, prompts, min(self.num_tokens, CLIP_LENGTH)) for words in self.tokenizers[:2]]
        for words in self.tokenizers[2:]:
            found += masked_ids(self, words, prompts, self.num_tokens)
        return tuple(found)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        small, large, ids, mask, llama_ids, llama_mask = input_ids
        pooled = [self.text_encoder(small).text_embeds, self.text_encoder_2(large).text_embeds]
        words = self.text_encoder_3(ids, mask).last_hidden_state
        given = {"attention_mask": llama_mask, "output_hidden_states": True, "use_cache": False}
        states = self.text_encoder_4(llama_ids, **given).hidden_states
        tokens = [words, *(states[layer + 1].to(words) for layer in self.layers)]  # the first state is the embeddings'
        return Conditioning(torch.cat(tokens, dim=-1), torch.cat(pooled, dim=-1))


def mixed(experts: Any, states: Tensor) -> Tensor:
    """Apply a mixture of experts to states ``(B, N, D)``, each to the tokens that are sent to it.

    In evaluation mode, diffusers' own pass leaves the experts out of the gradient.
    """
    chosen, weights, _ = experts.gate(states)
    tokens = states.flatten(0, 1)
    made = torch.zeros_like(tokens)
    for number, expert in enumerate(experts.experts):
        if tokens.is_meta:  # an estimate has no values: each expert gets an equal share
            rows = torch.arange(chosen.numel() // len(experts.experts), device=tokens.device) % len(tokens)
            share = weights.flatten()[: len(rows), None]
        else:
            rows, place = (chosen == number).nonzero(as_tuple=True)
            share = weights[rows, place, None]
        made = made.index_add(0, rows, (share * expert(tokens[rows])).to(made.dtype))
    return made.view_as(states) + experts.shared_experts(states)


@register_backbone
def hidream(source: PathText, **options: Any) -> FamilyBackbone:
    """Load the first blocks of HiDream-I1-Full (MIT; its text encoder Llama has terms of its own), 48 blocks.

    The pipeline folder ``source`` must hold Llama too.
    """
    return load_family_backbone(source, "hidream", **options)
