"""Backbone from the transformer of SD3 or SD3.5: its first blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, LatentSpace, TapSpec
from latentreward.core.errors import InputError
from latentreward.diffusion.backbones.base import TransformerBackbone
from latentreward.diffusion.backbones.loading import check_sample_size
from latentreward.diffusion.backbones.tuning import freeze
from latentreward.diffusion.noise.processes import NoiseProcess

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel


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
