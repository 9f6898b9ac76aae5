"""Twin of Chroma."""

from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from tests.diffusion.families.flux_vae import flux_vae
from tests.diffusion.families.twin_flux1 import CHANNELS, packed, unpacked
from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import WIDTH, t5_tokenizer


def pipeline() -> DiffusionPipeline:
    words = t5_tokenizer()
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux_vae(),
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=len(words), d_model=3 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer=words,
        transformer=ChromaTransformer2DModel(
            in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=12, num_attention_heads=2,
            joint_attention_dim=3 * WIDTH, axes_dims_rope=(4, 4, 4), approximator_num_channels=16,
            approximator_hidden_dim=32, approximator_layers=2,
        ),
    )  # fmt: skip


def mask_padding(pipeline: Any) -> None:
    """Make the mask boolean, with which the network was trained; the pipeline's numbers do not mask."""

    def boolean(network: torch.nn.Module, inputs: Any, options: dict[str, Any]) -> Any:
        mask = options["attention_mask"]
        return inputs, options | {"attention_mask": mask if mask is None else mask.bool()}

    pipeline.transformer.register_forward_pre_hook(boolean, with_kwargs=True)


TWINS = [Twin("chroma", "chroma", pipeline, given=packed, found=unpacked, backbone="chroma", mended=mask_padding)]
