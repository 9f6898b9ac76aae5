"""Diffusers pipeline folders with the layout of the real families, tiny networks and random weights."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH = 16
TOKENS = 12
PIXELS = 16
"""Side of an image; the VAEs halve it."""
LATENTS = 8
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer(**options: Any) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer with two merges; any string can be tokenised."""
    symbols = list(bytes_to_unicode().values())
    merges = [("c", "a"), ("ca", "t</w>")]
    vocab = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(vocab)}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=TOKENS, **options)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer over single characters, with T5's special tokens."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -1.0),
        *((chr(code), -2.0) for code in range(33, 127)),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, vocab=pieces)


def clip_config(tokenizer: CLIPTokenizer, width: int = WIDTH, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def vae(scaling_factor: float, channels: int = 4, shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=PIXELS,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def sd_unet(**options: Any) -> UNet2DConditionModel:
    """SD1.5's two kinds of blocks, one each, for time goes by blocks; ``options`` replace parts of the config."""
    return UNet2DConditionModel(
        **{
            "sample_size": LATENTS,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **options,
        }
    )


def sdxl_unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": LATENTS,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "cross_attention_dim": 2 * WIDTH,
            "attention_head_dim": (2, 2),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
            **options,
        }
    )


def sd3_transformer(sd35: bool, **options: Any) -> SD3Transformer2DModel:
    """Four blocks; with ``sd35`` normalised queries and keys, and a second attention in the first two."""
    return SD3Transformer2DModel(
        **{
            "sample_size": LATENTS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "joint_attention_dim": 3 * WIDTH,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 2 * WIDTH,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0, 1) if sd35 else (),
            "qk_norm": "rms_norm" if sd35 else None,
            **options,
        }
    )


def sd15() -> DiffusionPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=vae(0.18215),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=sd_unet(),
        scheduler=DDIMScheduler(**_BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15_four_levels() -> DiffusionPipeline:
    """With as many levels as SD1.5's U-Net has."""
    pipeline = sd15()
    down, up = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    unet = sd_unet(block_out_channels=(8, 16, 24, 24), down_block_types=down, up_block_types=up)
    pipeline.register_modules(unet=unet)
    return pipeline


def sd21() -> DiffusionPipeline:
    """Like SD2.1, whose width 1024 tells it from SD1.5; it predicts v."""
    tokenizer = clip_tokenizer(pad_token="!")
    return StableDiffusionPipeline(
        vae=vae(0.18215),
        text_encoder=CLIPTextModel(clip_config(tokenizer, width=1024, layers=1)),
        tokenizer=tokenizer,
        unet=sd_unet(cross_attention_dim=1024, use_linear_projection=True),
        scheduler=DDPMScheduler(**_BETAS, prediction_type="v_prediction", steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> DiffusionPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad_token="!")
    return StableDiffusionXLPipeline(
        vae=vae(0.13025),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer_2)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=sdxl_unet(),
        scheduler=EulerDiscreteScheduler(**_BETAS),
    )


def ip2p_sd15() -> DiffusionPipeline:
    """InstructPix2Pix, whose pipeline takes the scheduler's settings as they are."""
    parts = sd15().components | {
        "unet": sd_unet(in_channels=8),
        "scheduler": DDIMScheduler(**_BETAS, clip_sample=False),
    }
    return StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)


def ip2p_sdxl() -> DiffusionPipeline:
    parts = sdxl().components | {"unet": sdxl_unet(in_channels=8)}
    return StableDiffusionXLInstructPix2PixPipeline(
        **{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    )


def sd3_like(sd35: bool, with_t5: bool, **options: Any) -> DiffusionPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad_token="!")
    t5, t5_words = None, None
    if with_t5:
        t5_words = t5_tokenizer()
        t5 = T5EncoderModel(
            T5Config(vocab_size=len(t5_words), d_model=3 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    return StableDiffusion3Pipeline(
        vae=vae(1.5305, shift_factor=0.0609),
        transformer=sd3_transformer(sd35, **options),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer_2)),
        text_encoder_3=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=t5_words,
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd15": sd15,
    "sd15_four_levels": sd15_four_levels,
    "sd21": sd21,
    "sdxl": sdxl,
    "ip2p_sd15": ip2p_sd15,
    "ip2p_sdxl": ip2p_sdxl,
    "sd3": lambda: sd3_like(sd35=False, with_t5=True),
    "sd35": lambda: sd3_like(sd35=True, with_t5=True),
    "sd3_deep": lambda: sd3_like(sd35=False, with_t5=True, num_layers=18),
    "sd35_deep": lambda: sd3_like(sd35=True, with_t5=True, num_layers=22),
    "sd35_no_t5": lambda: sd3_like(sd35=True, with_t5=False),
}


def randomise(network: torch.nn.Module) -> None:
    """Random values where initialisation puts zeros or ones, so that every path matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def write_pipeline(name: str, folder: Path) -> Path:
    """Save the pipeline ``name`` of :data:`BUILDERS` into ``folder``; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = BUILDERS[name]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            randomise(part)
    pipeline.save_pretrained(folder)
    return folder


_STORE = tempfile.TemporaryDirectory(prefix="tiny_pipelines_")


@cache
def pipeline_folder(name: str) -> str:
    """The pipeline ``name``, written once per test run; do not change it (copy it first)."""
    return str(write_pipeline(name, Path(_STORE.name) / name))


def source_of(name: str) -> str:
    """Folder of a pipeline of :data:`BUILDERS`; any other name is that of a shipped one."""
    return pipeline_folder(name) if name in BUILDERS else name
