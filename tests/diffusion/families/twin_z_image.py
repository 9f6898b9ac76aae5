"""Twins of Z-Image, and of Z-Image-Turbo with another padding side."""

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.diffusion.families.flux_vae import flux_vae
from tests.diffusion.families.qwen3 import qwen, qwen_tokenizer
from tests.diffusion.families.twins import Twin
from tests.tiny_pipelines import WIDTH


def transformer() -> ZImageTransformer2DModel:
    network = ZImageTransformer2DModel(
        in_channels=16, dim=24, n_layers=4, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 4], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    for token in (network.x_pad_token, network.cap_pad_token):  # zeros at the start
        torch.nn.init.normal_(token)
    return network


def pipeline(shift: float, padding_side: str) -> DiffusionPipeline:
    tokenizer = qwen_tokenizer(padding_side=padding_side)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=flux_vae(),
        text_encoder=qwen(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer(),
    )


TWINS = [
    Twin("z_image", "z_image", lambda: pipeline(6.0, "right"), call={"guidance_scale": 4.0}, guidance=4.0,
         backbone="z_image"),
    Twin("z_image_turbo", "z_image", lambda: pipeline(3.0, "left"), call={"guidance_scale": 0.0}, backbone="z_image",
         same_network=True),
]  # fmt: skip
