"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, LatentSpace, PathText, TapSpec
from latentreward.core.errors import InputError
from latentreward.core.registry import register_backbone
from latentreward.diffusion.backbones.base import TransformerBackbone
from latentreward.diffusion.backbones.loading import SHIPPED, check_channels, check_sample_size, tiny_pipeline
from latentreward.diffusion.backbones.tuning import freeze
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.families.backbone import TransformerOptions
from latentreward.diffusion.families.base import Family, PipelineConfigs
from latentreward.diffusion.noise.processes import NoiseProcess, process_from_scheduler
from latentreward.diffusion.noise.schedules import FLOW_SCHEDULERS, static_levels

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel


class StableDiffusion3(Family):
    """Family of SD3 and SD3.5: a transformer with two streams, two CLIP text encoders and T5, static shift."""

    name = "sd3"
    title = "Stable Diffusion 3 (SD3, SD3.5)"
    network_class = "SD3Transformer2DModel"
    lora_loader = "SD3LoraLoaderMixin"
    default_guidance = 5.0  # Flow-GRPO's and this project's, instead of the pipeline's 7.0

    @classmethod
    def recognises(cls, pipeline: PipelineConfigs) -> bool:
        if not pipeline.has("transformer"):
            return False
        return pipeline.config("transformer").get("_class_name", cls.network_class) == cls.network_class

    def check(self) -> None:
        check_channels(self.pipeline.source, "transformer", self.config, self.latent_space)

    @property
    def model(self) -> str:
        large = " Large" if self.is_large else ""
        return f"SD3.5{large}" if self.config.get("qk_norm") else "SD3"

    @property
    def is_large(self) -> bool:
        """Whether the transformer has as many blocks as SD3.5-Large's."""
        return self.config.get("num_layers") == 38

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.entry(self.part, "sample_size", int) * self.latent_space.downscale
        return side, side

    @property
    def side_multiple(self) -> int:
        return self.latent_space.downscale * self.entry(self.part, "patch_size", int, 2)

    @property
    def max_side(self) -> int:
        positions = self.entry(self.part, "pos_embed_max_size", int, 96)
        return positions * self.entry(self.part, "patch_size", int, 2)

    def load_prompt_encoder(
        self, t5_length: int | None = None, load_t5: bool = True, pretrained: bool = True
    ) -> PromptEncoder:
        """See :meth:`Family.load_prompt_encoder`; zeros stand for T5's tokens without T5.

        ``t5_length`` None takes 256, or 0 for a shipped pipeline.
        """
        shipped = self.pipeline.named in SHIPPED
        length = (0 if shipped else 256) if t5_length is None else t5_length
        width = self.entry(self.part, "joint_attention_dim", int)
        encoder: PromptEncoder = self.pipeline.sd3_prompts(width, length, load_t5, mapped=True)
        return encoder

    @cached_property
    def noise_process(self) -> NoiseProcess:
        return process_from_scheduler(self.scheduler_config, FLOW_SCHEDULERS)

    def levels(self, num_inference_steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        return static_levels(self.scheduler_config, num_inference_steps)

    def predict(
        self, network: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        assert conditioning.pooled_prompt_embeds is not None
        dtype = network.pos_embed.proj.weight.dtype
        output: Tensor = network(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            pooled_projections=conditioning.pooled_prompt_embeds.to(dtype),
            timestep=timesteps.to(latents.device),
        ).sample
        return output

    def blocks(self, network: Any) -> Iterator[nn.Module]:
        yield from network.transformer_blocks


_TEXT_OUTPUT = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context")
_VISUAL_OUTPUT = ("attn.to_q", "attn.norm_q", "attn.to_out", "attn2", "ff")
"""Submodules of a block that only its text output, or only its visual output, depends on; both need all others."""


class SD3DiTBackbone(TransformerBackbone):
    """First ``num_layers`` blocks of an SD3 or SD3.5 transformer (DiNa-LRM, arXiv:2602.11146, section 3.2).

    Tap k is the output of block k; tap 0 is the embedded tokens before the first block. The timestep embedding in the
    features contains the pooled CLIP text, because SD3 adds the two.

    Args:
        transformer: diffusers transformer; blocks after the first ``num_layers`` are removed from this object.
        noise_process: See :class:`DiffusionBackbone`.
        latent_space: See :class:`DiffusionBackbone`.
        num_layers: Number of blocks to keep; None keeps the blocks up to the last tap, after which none runs.
        visual_taps: Numbers of the blocks whose visual tokens are read, ascending.
        text_taps: Numbers of the blocks whose text tokens are read, ascending; may be empty.
        pooled_text: Pooled text vector in the features: ``clip`` is the pooled CLIP text, ``t5`` the mean of T5's
            tokens including padding.
        options: ``text_encoder``, ``vae`` and ``output_map``, see :class:`DiffusionBackbone`.

    Note:
        On an LRM with SD3 the paper (arXiv:2502.01051, appendix) says only that features come from block 18 of 24 and
        from all text encoders, "the rest similar". This implementation mean-pools the visual tokens, uses block 18 as
        the mid feature, computes T from the pooled CLIP text (or from T5 with ``pooled_text: t5``), and encodes the
        empty prompt for visual feature enhancement.
    """

    takes_aspects = True

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        noise_process: NoiseProcess,
        latent_space: LatentSpace,
        num_layers: int | None = None,
        visual_taps: Sequence[int] = (4, 8, 12),
        text_taps: Sequence[int] = (4, 8, 12),
        pooled_text: Literal["clip", "t5"] = "clip",
        **options: Any,
    ) -> None:
        super().__init__(noise_process, latent_space, **options)
        check_sample_size(transformer.config.sample_size)
        self.keep_blocks(transformer, num_layers, visual_taps, text_taps)
        num_layers = len(transformer.transformer_blocks)
        last = transformer.transformer_blocks[num_layers - 1]
        if last.context_pre_only and num_layers in self.text_taps:
            raise InputError(
                f"text_taps={list(self.text_taps)} reads block {num_layers}, the last of the network, which has no "
                "text output; read an earlier block"
            )
        if pooled_text == "t5" and (self.text_encoder is None or self.text_encoder.text_encoder_3 is None):
            raise InputError("pooled_text='t5' needs the T5 text encoder; set load_t5: true or pooled_text: clip")
        self.pooled_text = pooled_text
        self.max_side = transformer.config.pos_embed_max_size * transformer.config.patch_size

    def unread_parts(self, number: int, visual: bool, text: bool) -> tuple[Sequence[str], Sequence[str]]:
        inside = (*(() if text else _TEXT_OUTPUT), *(() if visual else _VISUAL_OUTPUT))
        return inside, () if number or text else ("context_embedder",)

    def drop_text_taps(self) -> None:
        super().drop_text_taps()
        if self.last_tap == 0 and self.text_encoder is not None and self.pooled_text == "clip":
            freeze(self.text_encoder, self.text_encoder.tokens_only)

    def drop_time_embedding(self) -> None:
        if self.last_tap == 0 and not self.output_map:  # no block runs, which would need it
            self.transformer.time_text_embed.requires_grad_(False)
            if self.pooled_text == "t5" and not self.text_taps:  # then nothing reads the CLIP text
                freeze(self.text_encoder, ("text_encoder", "text_encoder_2"))

    @property
    def feature_spec(self) -> FeatureSpec:
        config = self.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        side = config.sample_size // config.patch_size
        length = 77 if self.text_encoder is None else self.text_encoder.num_tokens
        return FeatureSpec(
            visual=(TapSpec(width, (side, side)),) * len(self.visual_taps),
            text=(TapSpec(width, (length,)),) * len(self.text_taps),
            temb_dim=width,
            pooled_text_dim=config.pooled_projection_dim if self.pooled_text == "clip" else config.joint_attention_dim,
            output=TapSpec(config.out_channels, (config.sample_size,) * 2) if self.output_map else None,
        )

    @property
    def native_size(self) -> tuple[int, int]:
        return (self.transformer.config.sample_size * self.latent_space.downscale,) * 2

    @property
    def side_multiple(self) -> int:
        return self.transformer.config.patch_size * self.latent_space.downscale

    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        """See :meth:`DiffusionBackbone.read`; rows and columns beyond a multiple of the patch size are ignored."""
        dit, pooled, output = self.transformer, conditioning.pooled_prompt_embeds, None
        assert pooled is not None
        dtype = dit.pos_embed.proj.weight.dtype
        # The pass ends behind the last tap, so that `output` is set with an output map alone.
        with self.recorded(["time_text_embed"]) as seen:
            output = dit(
                hidden_states=latents.to(dtype),
                encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
                pooled_projections=pooled.to(dtype),
                timestep=timesteps,
            ).sample
        if self.pooled_text == "t5":
            pooled = conditioning.prompt_embeds[:, self.text_encoder.clip_length :].mean(dim=1)
        grid = tuple(size // dit.config.patch_size for size in latents.shape[2:])
        return Features(
            visual=tuple(seen[tap][1] for tap in self.visual_taps),
            visual_grids=(grid,) * len(self.visual_taps),
            text=tuple(seen[tap][0] for tap in self.text_taps),
            pooled_text=pooled,
            temb=seen["time_text_embed"],
            output=output,
        )


def load_sd3(
    source: str,
    model: str | None = None,
    num_layers: int | None = None,
    visual_taps: Sequence[int] = (4, 8, 12),
    text_taps: Sequence[int] = (4, 8, 12),
    pooled_text: Literal["clip", "t5"] = "clip",
    output_map: bool = False,
    **options: Any,
) -> SD3DiTBackbone:
    """Load a backbone from the first blocks of the transformer of a Stable Diffusion 3 or 3.5 pipeline.

    Args:
        source: Diffusers pipeline folder, or hub id.
        model: ``SD3`` or ``SD3.5``, which the pipeline must be; None takes both.
        num_layers: Number of blocks to keep; None keeps the blocks up to the last tap.
        visual_taps: Numbers of the blocks whose visual tokens are read; 0 is before the first block.
        text_taps: Numbers of the blocks whose text tokens are read; may be empty.
        pooled_text: Pooled text vector for heads: ``clip`` or ``t5``; see :class:`SD3DiTBackbone`.
        output_map: Whether to return the network's output after the last tapped block too, for a head that reads it.
        options: See :class:`~latentreward.diffusion.families.backbone.TransformerOptions`.
    """
    chosen = TransformerOptions(**options)
    family = chosen.family(source, "sd3", model)
    (network, encoders), taps = chosen.parts(family), (num_layers, visual_taps, text_taps)
    space = family.noise_process, family.latent_space
    backbone = SD3DiTBackbone(network, *space, *taps, pooled_text, output_map=output_map, **encoders)
    return chosen.finish(backbone, family, backbone.unread())


@register_backbone
def sd3_medium(source: PathText, **options: Any) -> SD3DiTBackbone:
    """Load Stable Diffusion 3 Medium (Stability AI Community License): 24 blocks without QK normalisation."""
    return load_sd3(source, "SD3", **options)


@register_backbone
def sd35_medium(source: PathText, **options: Any) -> SD3DiTBackbone:
    """Load Stable Diffusion 3.5 Medium (Stability AI Community License); DiNa-LRM uses 12 of its 24 blocks."""
    return load_sd3(source, "SD3.5", **options)


@register_backbone
def sd35_large(
    source: PathText,
    visual_taps: Sequence[int] = (6, 13, 19),
    text_taps: Sequence[int] = (6, 13, 19),
    **options: Any,
) -> SD3DiTBackbone:
    """Load Stable Diffusion 3.5 Large (Stability AI Community License): half of its 38 blocks, as DiNa-LRM of Medium's.

    By default thirds of the first 19 blocks are read.
    """
    return load_sd3(source, "SD3.5", visual_taps=visual_taps, text_taps=text_taps, **options)


@register_backbone
def sd35_tiny(
    source: PathText | None = None,
    num_layers: int | None = 3,
    visual_taps: Sequence[int] = (1, 2, 3),
    text_taps: Sequence[int] = (1, 2, 3),
    t5_length: int = 0,
    **options: Any,
) -> SD3DiTBackbone:
    """Load the tiny SD3.5-like pipeline that is shipped with the package for tests and tutorials: 4 blocks, no T5.

    The shipped pipeline was trained without tokens in the place of T5's.
    """
    taps = {"num_layers": num_layers, "visual_taps": visual_taps, "text_taps": text_taps}
    return load_sd3(source or tiny_pipeline("sd35_tiny"), t5_length=t5_length, **taps, **options)
