"""Twins of FLUX.2-klein, base and distilled."""

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.diffusion.families.flux2_vae import CHANNELS, flux2_vae, statistics
from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import WIDTH

TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
"""The parts of Qwen3's chat template that a single user turn reaches."""
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def qwen_tokenizer(padding_side: str = "right") -> Qwen2Tokenizer:
    """A byte-level tokenizer with one merge and Qwen3's chat template."""
    symbols = list(bytes_to_unicode().values())
    vocab = {token: number for number, token in enumerate([*symbols, "ca"])}
    tokenizer = Qwen2Tokenizer(vocab, [("c", "a")], chat_template=TEMPLATE, padding_side=padding_side)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS[1:])})
    return tokenizer


def qwen3(vocab_size: int, layers: int) -> Qwen3ForCausalLM:
    """A text encoder with as many positions in its config as Qwen3, of which it makes no table."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
        )
    )


def klein(distilled: bool, layers: int, padding_side: str) -> DiffusionPipeline:
    tokenizer = qwen_tokenizer(padding_side)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3(len(tokenizer), layers),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=distilled,
    )


def normalised(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """The pipeline returns latents of the VAE: patches and norm once more."""
    mean, variance = statistics()
    patches = Flux2KleinPipeline._patchify_latents(latents)
    return (patches - mean.view(1, -1, 1, 1)) / (variance + 1e-4).sqrt().view(1, -1, 1, 1)


TWINS = [
    Twin("klein_base", "flux2_klein", lambda: klein(False, 28, "right"), found=normalised, backbone="flux2_klein"),
    # As many layers as are read, so that the last of them is normalised, and the other padding side.
    Twin(
        "klein_distilled",
        "flux2_klein",
        lambda: klein(True, 27, "left"),
        found=normalised,
        backbone="flux2_klein",
        same_network=True,
    ),
]
