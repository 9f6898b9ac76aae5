"""Backbone from the U-Net of SD1.5, SD2.1 or SDXL: its down and mid blocks, or all of it for the output map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from latentreward.backbones.base import DiffusionBackbone, check_taps
from latentreward.backbones.loading import PipelineSource, check_channels, check_sample_size, finish, tiny_pipeline
from latentreward.backbones.quantization import check_options
from latentreward.backbones.registry import register_backbone
from latentreward.backbones.tuning import StorageDtype, Tuning, freeze
from latentreward.contracts import Conditioning, Features, FeatureSpec, LatentSpace, TapSpec
from latentreward.errors import InputError
from latentreward.noise import NoiseProcess

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from latentreward.encoders.prompts import PromptEncoder


class SDUNetBackbone(DiffusionBackbone):
    """Down path and mid block of a Stable Diffusion U-Net; the up path is dropped unless the output map is read.

    Visual tap 0 is the output of the input convolution. Tap i is the i-th down block's output after its last layer and
    before its downsampler. The last tap is the mid block's output (LRM, arXiv:2502.01051, section 3.1). The U-Net does
    not change its text tokens, so that the only text tap is 0: the prompt embeddings themselves.

    Args:
        unet: diffusers U-Net; the up path and blocks after the last tap are removed from this object.
        noise_process: See :class:`DiffusionBackbone`.
        latent_space: See :class:`DiffusionBackbone`.
        visual_taps: Numbers of the blocks to read, ascending; None reads every down block and the mid block.
        text_taps: ``(0,)`` or empty.
        cut: Whether to remove blocks from ``unet``. Set False for a network that other code uses too; blocks after the
            last tap are not run then.
        options: ``text_encoder``, ``vae`` and ``output_map``, see :class:`DiffusionBackbone`.

    Raises:
        InputError: If a tap is not one of the network's blocks, or the network's ``sample_size`` is not valid.
    """

    network_name = "unet"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        noise_process: NoiseProcess,
        latent_space: LatentSpace,
        visual_taps: Sequence[int] | None = None,
        text_taps: Sequence[int] = (0,),
        cut: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(noise_process, latent_space, **options)
        check_sample_size(unet.config.sample_size)
        self._mid = len(unet.down_blocks) + 1
        taps = range(1, self._mid + 1) if visual_taps is None else visual_taps
        self.visual_taps = check_taps("visual_taps", taps, self._mid, least=1)
        self.text_taps = check_taps("text_taps", text_taps, 0)
        self.unet = cut_unet(unet, self.visual_taps[-1]) if cut and not self.output_map else unet

    def with_network(self, network: nn.Module, text_encoder: PromptEncoder | None) -> SDUNetBackbone | None:
        """See :meth:`DiffusionBackbone.with_network`."""
        if type(network) is not type(self.unet):
            return None
        process, taps = (self.noise_process, self.latent_space), (self.visual_taps, self.text_taps)
        options = {"cut": False, "output_map": self.output_map}
        return SDUNetBackbone(network, *process, *taps, **options, text_encoder=text_encoder)

    @property
    def feature_spec(self) -> FeatureSpec:
        """See :attr:`DiffusionBackbone.feature_spec`; grids are for the U-Net's native latent size."""
        config, encoder = self.unet.config, self.text_encoder
        width, size = config.cross_attention_dim, self._native_size()
        length, pooled = (77, width) if encoder is None else (encoder.num_tokens, encoder.pooled_dim)
        levels = [config.block_out_channels[0], *config.block_out_channels, config.block_out_channels[-1]]
        shrink = [0, *range(self._mid - 1), self._mid - 2]
        return FeatureSpec(
            visual=tuple(
                TapSpec(levels[tap], tuple(-(-side >> shrink[tap]) for side in size)) for tap in self.visual_taps
            ),
            text=tuple(TapSpec(width, (length,)) for _ in self.text_taps),
            temb_dim=self.unet.time_embedding.linear_2.out_features,
            pooled_text_dim=pooled,
            output=TapSpec(config.out_channels, size) if self.output_map else None,
        )

    @property
    def native_size(self) -> tuple[int, int]:
        """See :attr:`DiffusionBackbone.native_size`."""
        height, width = self._native_size()
        return height * self.latent_space.downscale, width * self.latent_space.downscale

    def drop_text_taps(self) -> None:
        """See :meth:`DiffusionBackbone.drop_text_taps`."""
        self.text_taps = ()
        attends = any(getattr(block, "has_cross_attention", False) for block in self.blocks())
        if self.text_encoder is not None and not attends:
            freeze(self.text_encoder, self.text_encoder.tokens_only)

    def drop_time_embedding(self) -> None:
        """See :meth:`DiffusionBackbone.drop_time_embedding`; nothing is frozen if any block is kept."""
        if not any(True for _ in self.blocks()):
            self.unet.time_embedding.requires_grad_(False)
            if self.unet.config.addition_embed_type == "text_time":
                self.unet.add_embedding.requires_grad_(False)

    def _native_size(self) -> tuple[int, int]:
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        """See :meth:`DiffusionBackbone.read`; latents ``(B, 4, h, w)``."""
        unet = self.unet
        sample = latents.to(unet.conv_in.weight.dtype)
        tokens = conditioning.prompt_embeds.to(sample.dtype)
        temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps))
        if unet.config.addition_embed_type == "text_time":
            height, width = (float(side) for side in self.native_size)
            # SDXL's size conditioning as in training of LRM-SDXL: original size native, no crop, target size native.
            sizes = [height, width, 0.0, 0.0, height, width]
            temb = temb + unet.get_aug_embed(
                emb=temb,
                encoder_hidden_states=tokens,
                added_cond_kwargs={
                    "text_embeds": conditioning.pooled_prompt_embeds.to(sample.dtype),
                    "time_ids": sample.new_tensor(sizes).expand(len(sample), 6),
                },
            )
        sample = unet.conv_in(sample)
        last = self._mid if self.output_map else self.visual_taps[-1]
        read, skips = {0: sample}, [sample]
        for number, block in enumerate(unet.down_blocks[:last], start=1):
            sample, outputs = block(hidden_states=sample, temb=temb, **attended(block, tokens))
            read[number] = outputs[len(block.resnets) - 1]
            skips += outputs
        if last == self._mid:
            read[self._mid] = unet.mid_block(sample, temb, encoder_hidden_states=tokens)
        maps = [read[tap] for tap in self.visual_taps]
        return Features(
            visual=tuple(features.flatten(2).transpose(1, 2) for features in maps),
            visual_grids=tuple(tuple(features.shape[2:]) for features in maps),
            text=(tokens,) * len(self.text_taps),
            pooled_text=conditioning.pooled_prompt_embeds,
            temb=temb,
            output=self._output(read[self._mid], skips, temb, tokens) if self.output_map else None,
        )

    def _output(self, sample: Tensor, skips: list[Tensor], temb: Tensor, tokens: Tensor) -> Tensor:
        """Run the up path on the mid block's output and the down path's outputs; returns ``(B, C, h, w)``."""
        unet = self.unet
        for block in unet.up_blocks:
            count = len(block.resnets)
            skips, taken = skips[:-count], skips[-count:]
            size = {"upsample_size": skips[-1].shape[2:]} if skips else {}  # sides that are odd before a downsampler
            sample = block(sample, tuple(taken), temb, **attended(block, tokens), **size)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))

    def blocks(self) -> Iterator[nn.Module]:
        """See :meth:`DiffusionBackbone.blocks`."""
        yield from self.unet.down_blocks
        if self.unet.mid_block is not None:
            yield self.unet.mid_block
        yield from self.unet.up_blocks


def attended(block: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Return the argument with the text tokens, for a block that attends to them."""
    return {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}


def cut_unet(unet: UNet2DConditionModel, last_tap: int) -> UNet2DConditionModel:
    """Remove, in place, the up path and all blocks after block ``last_tap``.

    Every remaining parameter contributes to a feature, so that DDP finds no unused parameters.
    """
    unet.up_blocks = nn.ModuleList()
    unet.conv_norm_out, unet.conv_act, unet.conv_out = None, None, nn.Identity()
    unet.num_upsamplers = 0
    if last_tap <= len(unet.down_blocks):
        unet.mid_block = None
        unet.down_blocks = unet.down_blocks[:last_tap]
        if last_tap:
            unet.down_blocks[-1].downsamplers = None
    return unet


def load_sd_unet(
    source: str,
    family: str = "any",
    revision: str | None = None,
    variant: str | None = None,
    pretrained: bool = True,
    vae_dtype: StorageDtype = "float32",
    **options: Any,
) -> SDUNetBackbone:
    """Load a U-Net backbone from a Stable Diffusion pipeline.

    Args:
        source: Diffusers pipeline folder, or hub id.
        family: Family that the pipeline must belong to: ``SD1.5``, ``SD2.1``, ``SDXL`` or ``any``.
        revision: Branch, tag or commit of a hub id.
        variant: File variant of the weights, such as ``fp16``.
        pretrained: False initialises network and text encoder at random, as a control.
        vae_dtype: Precision of the VAE.
        options: See :func:`cut_sd_unet`.

    Raises:
        InputError: If the source is not a pipeline of that family, its parts do not fit together, or a tap is not one
            of the network's blocks.
    """
    check_options(options, "full")
    pipeline = PipelineSource(source, revision, variant)
    config = pipeline.config("unet")
    found = unet_family(config)
    if family not in ("any", found):
        raise InputError(
            f"source={source!r} holds a {found} U-Net (cross_attention_dim {config.get('cross_attention_dim')}), but "
            f"this backbone is {family}; choose the backbone of that family or another source"
        )
    check_undistilled(source, config)
    check_channels(source, "U-Net", config, pipeline.latent_space())
    load_prompts = pipeline.sdxl_prompts if found == "SDXL" else pipeline.clip_prompts
    text_encoder = load_prompts(pretrained, mapped=True)
    if text_encoder.token_dim != config["cross_attention_dim"]:
        raise InputError(
            f"source={source!r}: the text encoder is {text_encoder.token_dim} wide, but the U-Net takes "
            f"{config['cross_attention_dim']}; network and text encoder must come from one pipeline"
        )
    unet = pipeline.unet(pretrained, mapped=True)
    encoders = {"text_encoder": text_encoder, "vae": pipeline.latent_encoder(vae_dtype)}
    return cut_sd_unet(pipeline, unet, encoders, **options)


def cut_sd_unet(
    pipeline: PipelineSource,
    unet: UNet2DConditionModel,
    encoders: Mapping[str, Any],
    visual_taps: Sequence[int] | None = None,
    text_taps: Sequence[int] = (0,),
    tuning: Tuning = "full",
    text_encoder_tuning: Tuning = "full",
    output_map: bool = False,
    **options: Any,
) -> SDUNetBackbone:
    """Build a backbone from a pipeline's U-Net and encoders.

    Args:
        pipeline: Stable Diffusion 1.5, 2.1 or XL.
        unet: U-Net of the pipeline.
        encoders: ``text_encoder`` and ``vae`` of the pipeline.
        visual_taps: Numbers of the blocks to read; None reads all down blocks and the mid block.
        text_taps: ``[0]`` reads the prompt embeddings; ``[]`` reads no text.
        tuning: Weights of the U-Net that train: ``full`` (all), ``lora`` (adapters) or ``frozen`` (none).
        text_encoder_tuning: Weights of the text encoder that train: ``full``, ``lora`` or ``frozen``.
        output_map: Whether to run the whole U-Net and return its output too, for a head that reads it.
        options: See :func:`~latentreward.backbones.loading.finish`.

    Raises:
        InputError: If a tap is not one of the network's blocks.
    """
    backbone = SDUNetBackbone(
        unet,
        pipeline.noise_process(),
        pipeline.latent_space(),
        visual_taps,
        text_taps,
        output_map=output_map,
        **encoders,
    )
    backbone.source = str(pipeline)
    return finish(backbone, backbone.unet, (), tuning=tuning, text_encoder_tuning=text_encoder_tuning, **options)


def check_undistilled(source: str, config: Mapping[str, Any]) -> None:
    """Raise InputError if a U-Net takes the guidance scale as an input, as distilled ones do (LCM)."""
    if config.get("time_cond_proj_dim") is not None:
        raise InputError(
            f"source={source!r} holds a U-Net with time_cond_proj_dim, distilled to few steps with guidance inside "
            "(LCM); give the model that it was distilled from"
        )


def unet_family(config: dict[str, Any]) -> str:
    """Return the model family of a U-Net config: ``SDXL``, ``SD2.1`` or ``SD1.5``."""
    if config.get("addition_embed_type") == "text_time":
        return "SDXL"
    return "SD2.1" if config.get("cross_attention_dim") == 1024 else "SD1.5"


@register_backbone
def sd15(source: str, **options: Any) -> SDUNetBackbone:
    """Load Stable Diffusion 1.5 (CreativeML OpenRAIL-M), the backbone of LRM-SD1.5.

    Args:
        source: Diffusers pipeline folder, or hub id.
        options: See :func:`load_sd_unet`.
    """
    return load_sd_unet(source, "SD1.5", **options)


@register_backbone
def sd21(source: str, **options: Any) -> SDUNetBackbone:
    """Load Stable Diffusion 2.1 (CreativeML OpenRAIL++-M) with its OpenCLIP-H text encoder; v- or ε-prediction.

    Args:
        source: Diffusers pipeline folder, or hub id.
        options: See :func:`load_sd_unet`.

    Note:
        LPO's published SD2.1 runs use the reward trained on SD1.5, which has the same VAE; this factory is for a reward
        trained on SD2.1 itself.
    """
    return load_sd_unet(source, "SD2.1", **options)


@register_backbone
def sdxl(source: str, **options: Any) -> SDUNetBackbone:
    """Load Stable Diffusion XL base (CreativeML OpenRAIL++-M), the backbone of LRM-SDXL.

    Args:
        source: Diffusers pipeline folder, or hub id.
        options: See :func:`load_sd_unet`.
    """
    return load_sd_unet(source, "SDXL", **options)


@register_backbone
def sd_tiny(source: str | None = None, **options: Any) -> SDUNetBackbone:
    """Load the tiny Stable Diffusion that is shipped with the package for tests and tutorials.

    Args:
        source: Pipeline folder; None takes the shipped one.
        options: See :func:`load_sd_unet`.
    """
    return load_sd_unet(source or tiny_pipeline("sd_tiny"), **options)
