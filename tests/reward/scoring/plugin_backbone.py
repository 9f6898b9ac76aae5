"""A backbone as a plug-in may write it: two networks under names of its own, one of them read from a folder."""

from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, TapSpec
from latentreward.core.registry import register_backbone
from latentreward.diffusion import DiffusionBackbone, LoRA
from latentreward.diffusion.backbones.loading import PipelineSource, finish, load_weights
from latentreward.diffusion.backbones.tuning import Tuning


class TwoNetworks(DiffusionBackbone):
    """What a U-Net without its own text predicts, seen through a small network and a weight of the backbone's own."""

    def __init__(self, pipeline: PipelineSource) -> None:
        parts = pipeline.clip_prompts(), pipeline.latent_encoder()
        super().__init__(pipeline.noise_process(), pipeline.latent_space(), *parts)
        self.denoiser = load_weights(UNet2DConditionModel, pipeline.source, subfolder="unet")
        self.side = pipeline.config("unet")["sample_size"]
        self.mixer = nn.Conv2d(self.latent_space.channels, 8, kernel_size=1)
        self.gain = nn.Parameter(torch.full((8, 1, 1), 0.5))
        self.source = str(pipeline)

    @property
    def native_size(self) -> tuple[int, int]:
        return (self.side * self.latent_space.downscale,) * 2

    @property
    def feature_spec(self) -> FeatureSpec:
        pooled = self.text_encoder.pooled_dim
        return FeatureSpec((TapSpec(8, (self.side, self.side)),), text=(), temb_dim=pooled, pooled_text_dim=pooled)

    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        seen = self.gain * self.mixer(self.denoiser(latents, timesteps, conditioning.prompt_embeds).sample)
        pooled = conditioning.pooled_prompt_embeds
        return Features((seen.flatten(2).transpose(1, 2),), (tuple(seen.shape[2:]),), (), pooled, pooled)

    def blocks(self) -> Iterator[nn.Module]:
        yield self.mixer


class Shifted(TwoNetworks):
    """The same, shifted by a number that is drawn at random: in a buffer, an attribute, or a frozen weight."""

    def __init__(self, pipeline: PipelineSource, drawn: str) -> None:
        super().__init__(pipeline)
        number = 5 * torch.randn(1)
        if drawn in ("saved", "buffer"):
            self.register_buffer("shift", number, persistent=drawn == "saved")
        elif drawn == "attribute":
            self.shift = number
        else:
            self.shifter = nn.Linear(1, 1).requires_grad_(False)

    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        shift = self.shifter.bias if hasattr(self, "shifter") else self.shift
        return super().read(latents + shift, timesteps, conditioning)


@register_backbone
def two_networks(source: str, tuning: Tuning = "lora", drawn: str = "") -> TwoNetworks:
    """The two networks; the small one trains as a whole."""
    backbone = Shifted(PipelineSource(source), drawn) if drawn else TwoNetworks(PipelineSource(source))
    return finish(backbone, backbone.denoiser, tuning=tuning, lora=LoRA(2, 4.0) if tuning == "lora" else None)
