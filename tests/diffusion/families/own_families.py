"""Families outside the package, as their authors would write them: PixArt-Sigma, which predicts noise, and a U-Net."""

from functools import cached_property

import torch
from diffusers import (
    AutoencoderDC,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from latentreward.core.contracts import Conditioning
from latentreward.core.registry import register_backbone
from latentreward.diffusion import Family, FamilyBackbone, FlowFamily, load_family_backbone, process_from_scheduler
from latentreward.diffusion.encoders.prompts import CLIPPromptEncoder, PromptEncoder
from tests.tiny_pipelines import t5_tokenizer, vae


class T5Prompts(PromptEncoder):
    """T5 tokens of the prompts up to the longest."""

    masked, pooled_dim = True, 0

    def __init__(self, text_encoder, tokenizer, num_tokens):
        super().__init__()
        self.text_encoder, self.tokenizer, self.num_tokens = text_encoder, tokenizer, num_tokens
        self.token_dim = text_encoder.config.d_model

    def padded(self, prompts, padding):
        settings = {"padding": padding, "truncation": True, "max_length": self.num_tokens}
        with torch.device("cpu"):
            made = self.tokenizer(list(prompts), return_tensors="pt", **settings)
        return made.input_ids, made.attention_mask

    def tokenize(self, prompts):
        return self.padded(prompts, "longest")

    def encode_ids(self, *ids):
        states = self.text_encoder(input_ids=ids[0], attention_mask=ids[1]).last_hidden_state
        return Conditioning(states, prompt_mask=ids[1].bool())


class PixArt(FlowFamily):
    """Family of PixArt-Sigma: a transformer that predicts noise."""

    name, title, flow = "pixart", "PixArt-Sigma", False
    network_class = "PixArtTransformer2DModel"
    lists = ("transformer_blocks",)
    lora_targets, time_embedding = ("to_q", "to_k", "to_v"), ("adaln_single",)
    text_field, default_guidance, constant_text = "caption_channels", 4.5, True

    def load_prompt_encoder(self, t5_length=None, load_t5=True, pretrained=True):
        text = self.pipeline.load(T5EncoderModel, "text_encoder", pretrained)
        return self.fitting(T5Prompts(text, self.pipeline.tokenizer("tokenizer"), t5_length or 300))

    def velocity(self, network, latents, sigma, conditioning, guidance):
        dtype = network.pos_embed.proj.weight.dtype
        made = network(
            latents.to(dtype), conditioning.prompt_embeds.to(dtype), sigma * 1000,
            {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=conditioning.prompt_mask,
        ).sample  # fmt: skip
        return made.chunk(2, dim=1)[0]


def t5(width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def sana_vae() -> AutoencoderDC:
    side = {"block_types": "ResBlock", "block_out_channels": (8, 8, 8, 8, 32, 32), "layers_per_block": (1,) * 6}
    sides = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in side.items()}
    return AutoencoderDC(
        **sides, encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6, scaling_factor=0.41407
    )


def pixart_pipeline() -> DiffusionPipeline:
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=4, cross_attention_dim=32, sample_size=32,
        caption_channels=32,
    )  # fmt: skip
    return PixArtSigmaPipeline(t5_tokenizer(), t5(), vae(0.13025), network, DDIMScheduler(clip_sample=False))


@register_backbone
def own_pixart(source: str, **options) -> FamilyBackbone:
    """PixArt-Sigma as a reward's backbone."""
    return load_family_backbone(source, family=f"{__name__}.PixArt", **options)


class PlainUNet(Family):
    """Family of U-Nets such as Stable Diffusion 1.5's."""

    name, title = "plain_unet", "Plain U-Net"
    part, network_class, flow = "unet", "UNet2DConditionModel", False
    lora_loader = "StableDiffusionLoraLoaderMixin"
    default_guidance = 7.5

    @classmethod
    def recognises(cls, pipeline):
        return pipeline.has("unet")

    @cached_property
    def noise_process(self):
        return process_from_scheduler(self.pipeline.config("scheduler"))

    @property
    def native_size(self):
        side = self.config["sample_size"] * self.latent_space.downscale
        return side, side

    def load_prompt_encoder(self, t5_length=None, load_t5=True, pretrained=True):
        text_encoder = self.pipeline.load(CLIPTextModel, "text_encoder", pretrained)
        return CLIPPromptEncoder(text_encoder, self.pipeline.tokenizer("tokenizer"))

    def predict(self, network, latents, timesteps, conditioning, guidance):
        dtype = network.conv_in.weight.dtype
        text = conditioning.prompt_embeds.to(dtype)
        return network(latents.to(dtype), timesteps.to(latents.device), text).sample

    def blocks(self, network):
        yield from network.down_blocks
        yield network.mid_block
        yield from network.up_blocks
