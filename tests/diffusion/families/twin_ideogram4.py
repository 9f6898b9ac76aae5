"""Twin of Ideogram 4."""

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer

from latentreward.diffusion.families.ideogram4 import LAYERS
from tests.diffusion.families.flux2_vae import CHANNELS, flux2_vae, statistics
from tests.diffusion.families.qwen3 import qwen_tokenizer
from tests.diffusion.families.qwen3_vl import text_encoder
from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import WIDTH

TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for content in message.content %}{%- if 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}"
    "{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""The parts of Qwen3-VL's chat template that a user's message without pictures reaches."""


def tokenizer() -> Qwen2Tokenizer:
    words = qwen_tokenizer()
    words.chat_template = TEMPLATE
    return words


def transformer() -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=4,
        attention_head_dim=12,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=len(LAYERS) * WIDTH,
        rope_theta=10,  # rotates by tens of degrees from one token to the next in each axis
        mrope_section=(2, 2, 2),
    )


def patches(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Latents of the pipeline ``(B, N, (dy, dx, c))`` as FLUX.2's, ``(B, (c, dy, dx), h, w)``."""
    height, width = (side // 4 for side in size)
    return tokens.reshape(-1, height, width, 2, 2, CHANNELS).permute(0, 5, 3, 4, 1, 2).flatten(1, 3)


def tokens(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo :func:`patches`."""
    return latents.unflatten(1, (CHANNELS, 2, 2)).permute(0, 4, 5, 2, 3, 1).flatten(3).flatten(1, 2)


def pipeline() -> DiffusionPipeline:
    """A pipeline whose VAE has FLUX.2's statistics in the pipeline's order."""
    words, vae = tokenizer(), flux2_vae()
    for stored, values in zip((vae.bn.running_mean, vae.bn.running_var), statistics(), strict=True):
        stored.copy_(values.view(CHANNELS, 4).T.flatten())
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder(len(words), LAYERS[-1] + 1),
        tokenizer=words,
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )


TWINS = [
    Twin(
        "ideogram4",
        "ideogram4",
        pipeline,
        # 1 is off in the pipeline, whose second network then has no effect.
        call={"guidance_scale": 1.0, "guidance_schedule": None, "max_sequence_length": 80},
        given=tokens,
        found=patches,
        backbone="ideogram4",
    )
]
