"""Policies and rewards of real architectures with random weights, or without values on the meta device.

Sizes: ``sd15``, ``sdxl`` and ``sd35`` are as published. ``sd15_side32`` is SD1.5 with latents of 32 × 32. ``mid`` has
SD1.5's layout with channels (96, 192, 384, 384), latents of 32 × 32 and VAE channels (64, 128, 256). ``mid_sd35`` has
SD3.5's layout with 13 blocks of width 512, and latents and VAE like ``mid``. ``small`` and ``small_sd35`` have a third
and a quarter of these widths, and latents of 16 × 16. ``toy`` and ``toy_sd35`` are for tests of the benchmarks.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from latentreward.alignment import Policy, PolicySource, RewardSource
from latentreward.alignment.policies.loading import add_lora
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.alignment.rewards.shared_base import share_adapter
from latentreward.apps.estimate.pipelines import PIPELINES, SHARED, write_pipelines
from latentreward.apps.estimate.shapes import replace_tensors
from latentreward.core.contracts import Conditioning, LatentSpace
from latentreward.diffusion import LoRA, SD3DiTBackbone, SDUNetBackbone
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.reward import CLIPProjectionHead, GatedQFormerHead, RewardModel

_VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.18215, "layers_per_block": 2}
_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
_VAE_16 = {**_VAE, **_LEVELS, "latent_channels": 16, "shift_factor": 0.0609}
_SMALL_TEXT = {**SHARED["clip_l"], "num_hidden_layers": 1}
_SMALL_T5 = {**SHARED["t5_xxl"], "num_layers": 1}


def _sd15(vae_widths: tuple[int, ...], **unet: Any) -> dict[str, Any]:
    """Return the parts of SD1.5 with one layer of its text encoder, and these entries instead."""
    return {
        **PIPELINES["sd15"],
        "unet": {**PIPELINES["sd15"]["unet"], **unet},
        "vae": {**_VAE, **_LEVELS, "block_out_channels": vae_widths},
        "text_encoder": _SMALL_TEXT,
    }


def _sd35(vae_widths: tuple[int, ...], **transformer: Any) -> dict[str, Any]:
    """Return the parts of SD3.5-Medium with 13 blocks, one layer of each text encoder, and these entries instead."""
    return {
        **PIPELINES["sd35"],
        "vae": {**_VAE_16, "block_out_channels": vae_widths},
        "text_encoder": _SMALL_TEXT,
        "text_encoder_2": {**SHARED["clip_g"], "num_hidden_layers": 1},
        "text_encoder_3": _SMALL_T5,
        "transformer": {**PIPELINES["sd35"]["transformer"], "num_layers": 13, **transformer},
    }


SIZES = {
    **PIPELINES,
    "mid": _sd15((64, 128, 256), sample_size=32, block_out_channels=(96, 192, 384, 384)),
    "sd15_side32": {
        **PIPELINES["sd15"],
        "unet": {**PIPELINES["sd15"]["unet"], "sample_size": 32},
        "text_encoder": _SMALL_TEXT,
    },
    "mid_sd35": _sd35(
        (64, 128, 256),
        sample_size=32,
        num_attention_heads=8,
        caption_projection_dim=512,
        pos_embed_max_size=64,
    ),
    "small": _sd15((32, 64, 64), sample_size=16, block_out_channels=(32, 64, 96, 96)),
    "small_sd35": _sd35(
        (32, 64, 64),
        sample_size=16,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        pos_embed_max_size=32,
    ),
    "toy": _sd15((32, 32, 32), sample_size=8, block_out_channels=(32, 32, 32, 32)),
    "toy_sd35": _sd35(
        (32, 32, 32),
        sample_size=16,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    ),
}
"""Name of a size → part of the pipeline → config of the part."""
SD35_TOKENS = 77 + 256

_STORE = tempfile.TemporaryDirectory(prefix="random_pipelines_")


@cache
def pipeline_folders() -> dict[str, str]:
    """Write a folder with configs and stand-in tokenizers for every size; return the folders by name of the size."""
    return write_pipelines(Path(_STORE.name), SIZES)


def pipeline_folder(size: str) -> str:
    """Return the pipeline folder of a size."""
    return pipeline_folders()[size]


class RandomPipeline(PipelineSource):
    """Pipeline whose parts are built from their configs with random weights."""

    def load(self, kind: type[Any], part: str, pretrained: bool = True, mapped: bool = True) -> Any:
        """See :meth:`PipelineSource.load`; no weight is read."""
        return super().load(kind, part, pretrained=False)

    def unet(self) -> Any:
        """Return the U-Net, in float32."""
        from diffusers import UNet2DConditionModel

        return self.load(UNet2DConditionModel, "unet")

    def transformer(self) -> Any:
        """Return SD3's transformer, in float32."""
        from diffusers import SD3Transformer2DModel

        return self.load(SD3Transformer2DModel, "transformer")


class RandomPolicy(PolicySource):
    """A policy with random weights; ``source`` is a key of :data:`SIZES`."""

    def pipeline(self) -> PipelineSource:
        """See :meth:`PolicySource.pipeline`."""
        return RandomPipeline(pipeline_folder(self.source))


class RandomLatentReward(RewardSource):
    """An LRM (on a U-Net) or DiNa-LRM (on SD3.5) with random weights, on latents of the policy.

    Args:
        size: Key of :data:`SIZES`.
        share: Whether the reward is an adapter on the policy's network; otherwise the reward has its own down and mid
            blocks (U-Net) or its own first 12 transformer blocks (SD3.5).
        guidance: Guidance of the visual feature enhancement (LRM); 1 switches the enhancement off.
    """

    def __init__(self, size: str, share: bool = False, guidance: float = 7.5) -> None:
        self.size, self.share, self.guidance = size, share, guidance

    def latent_space(self) -> LatentSpace:
        """See :meth:`RewardSource.latent_space`."""
        return RandomPipeline(pipeline_folder(self.size)).latent_space()

    def load(self, policy: Policy) -> LatentScorer:
        """See :meth:`RewardSource.load`."""
        backbone: Any = self._backbone(policy)
        switch: Any = nullcontext
        if self.share:
            with torch.device("meta"):
                outline = getattr(self._backbone(policy), backbone.network_name)
                add_lora(outline, LoRA(16, 32), "default", 0, policy.family)
            weights = {name: torch.zeros(weight.shape) for name, weight in outline.named_parameters()}
            switch = partial(policy.adapters.use, share_adapter(policy, outline, weights))
            backbone = backbone.with_network(policy.network, policy.text_encoder)
        head: Any = CLIPProjectionHead(backbone.feature_spec, self.guidance)
        if policy.family.part == "transformer":
            head = GatedQFormerHead(backbone.feature_spec)
        head.requires_grad_(False)
        if not self.share:
            backbone.requires_grad_(False)
        return LatentScorer(RewardModel(backbone, head).eval(), policy.noise_process, None, policy, switch)

    def _backbone(self, policy: Policy) -> Any:
        pipeline, around = RandomPipeline(pipeline_folder(self.size)), (policy.noise_process, policy.latent_space)
        if policy.family.part == "transformer":
            return SD3DiTBackbone(pipeline.transformer(), *around, num_layers=12, text_encoder=policy.text_encoder)
        return SDUNetBackbone(pipeline.unet(), *around, text_encoder=policy.text_encoder)


class PrecomputedPrompts(nn.Module):
    """Stand-in for text encoders that returns embeddings of the right shape for any prompt."""

    sees_sources = False

    def __init__(self, tokens: int, width: int, pooled_width: int) -> None:
        super().__init__()
        self.shape, self.pooled_width = (tokens, width), pooled_width
        self.register_buffer("place", torch.zeros(1), persistent=False)

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Return one row of random embeddings per prompt; equal numbers of prompts give equal embeddings."""
        generator = torch.Generator().manual_seed(0)
        with torch.device("cpu"):
            tokens = torch.randn(len(prompts), *self.shape, generator=generator)
            pooled = torch.randn(len(prompts), self.pooled_width, generator=generator)
        return Conditioning(tokens.to(self.place), pooled.to(self.place))


def prompts_for(size: str) -> PrecomputedPrompts:
    """Return the stand-in for the text encoders of a size."""
    with torch.device("cpu"):
        if "transformer" in SIZES[size]:
            return PrecomputedPrompts(SD35_TOKENS, 4096, 2048)
        unet = SIZES[size]["unet"]
        return PrecomputedPrompts(77, unet["cross_attention_dim"], 1280 if "addition_embed_type" in unet else 768)


def materialise(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a module of the meta device values on ``device``; tensors that modules share stay shared.

    Matrices are random numbers of N(0, 0.02²), other weights 1, and all else, such as biases, 0.

    Args:
        module: Module whose parameters and buffers are replaced.
        device: Device.
        dtype: Type of all floats; None keeps the types.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw_weight(name: str, old: Tensor) -> Tensor:
        wanted = dtype if dtype and old.is_floating_point() else old.dtype
        new = torch.full(old.shape, float(name == "weight"), dtype=wanted, device=device)
        return new.normal_(0, 0.02, generator=generator) if old.ndim > 1 and old.is_floating_point() else new

    replace_tensors(module, draw_weight)
    if isinstance(module, LightningModule):
        module._device = torch.device(device)  # ``to`` would fail on the states of metrics
    return module


def write_weights(folder: Path, dtype: torch.dtype, shard: int = 2 * 10**9) -> None:
    """Write random weights of every network of a pipeline folder, shard by shard: no network is held as a whole.

    Norms get the weight 1, biases 0, and matrices numbers of N(0, 0.02²), which repeat every few million.

    Args:
        folder: Folder of configs.
        dtype: Type of the weights.
        shard: Most bytes of a file; larger networks get several files and an index.
    """
    import diffusers
    import transformers

    drawn = 0.02 * torch.randn(2**22 + 3, generator=torch.Generator().manual_seed(0))
    for place in sorted(path.parent for path in folder.glob("*/config.json")):
        config = json.loads((place / "config.json").read_text())
        with torch.device("meta"):
            if diffusers_name := config.get("_class_name"):
                family: Any = getattr(diffusers, diffusers_name)
                network = family.from_config(family.load_config(place))
            else:
                clip = transformers.CLIPTextModel
                if (folder / "transformer").is_dir() or place.name == "text_encoder_2":
                    clip = transformers.CLIPTextModelWithProjection
                kinds = {"clip_text_model": clip, "t5": transformers.T5EncoderModel, "qwen3": transformers.Qwen3Model}
                family = kinds[config["model_type"]]
                network = family(family.config_class.from_pretrained(place))
        stem = "diffusion_pytorch_model" if diffusers_name else "model"
        outlines = {id(value): (name, value) for name, value in network.state_dict(keep_vars=True).items()}
        files: list[list[tuple[str, Tensor]]] = [[]]
        for name, outline in outlines.values():
            if sum(one.numel() for _, one in files[-1]) * dtype.itemsize > shard:
                files.append([])
            files[-1].append((name, outline))
        names = [f"{stem}-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
        if len(files) == 1:
            names = [f"{stem}.safetensors"]
        else:
            index = {name: file for file, members in zip(names, files, strict=True) for name, _ in members}
            (place / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for file, members in zip(names, files, strict=True):
            save_file({name: draw(name, outline, drawn).to(dtype) for name, outline in members}, place / file)


def draw(name: str, outline: Tensor, drawn: Tensor) -> Tensor:
    """Return values for a parameter of the shape of ``outline``: constants for vectors, else from the row ``drawn``."""
    if outline.ndim < 2:
        return torch.full(outline.shape, float(name.endswith("weight")))
    size = outline.numel()
    return drawn.repeat(size // len(drawn) + 1)[:size].view(outline.shape)


def random_states(policy: Policy, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return standard normal latents ``(count, C, ...)`` of the policy's native size."""
    if torch.device(device).type == "meta":
        return torch.empty(count, *policy.latent_shape(), device=device)
    noise = torch.randn(count, *policy.latent_shape(), generator=torch.Generator().manual_seed(0), device="cpu")
    return noise.to(device)
