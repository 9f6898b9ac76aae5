"""Twins of FLUX.2-klein, base and distilled."""

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.diffusion.families.flux2_vae import CHANNELS, flux2_vae, statistics
from tests.diffusion.families.qwen3 import qwen_config, qwen_tokenizer
from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import WIDTH


def klein(distilled: bool, layers: int, padding_side: str) -> DiffusionPipeline:
    tokenizer = qwen_tokenizer(padding_side=padding_side)
    # As many positions as Qwen3's config has, of which it makes no table.
    more = {"num_hidden_layers": layers, "max_position_embeddings": 40960, "tie_word_embeddings": True}
    text = qwen_config(tokenizer, **more)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(text), tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * WIDTH, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        ),
        is_distilled=distilled,
    )  # fmt: skip


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
