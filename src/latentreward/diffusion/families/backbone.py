"""Backbone from the first blocks of a rectified-flow transformer of any family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, TapSpec
from latentreward.core.errors import InputError
from latentreward.diffusion.backbones.base import TransformerBackbone
from latentreward.diffusion.backbones.loading import Backbone, PipelineSource, finish
from latentreward.diffusion.backbones.tuning import LoRA, StorageDtype, Tuning, freeze
from latentreward.diffusion.backbones.weights import Quantization, check_quantization
from latentreward.diffusion.families.base import Family, find_family
from latentreward.diffusion.families.flow import FlowFamily


class FamilyBackbone(TransformerBackbone):
    """First blocks of a transformer, with the conventions of its family.

    Tap k is the output of block k, counted over all lists of the network; tap 0 is before the first block. A family
    without a pooled text vector gives the mean of the tokens in its place, see :meth:`Conditioning.pooled`.

    Args:
        transformer: diffusers transformer; blocks after the last kept one are removed from this object.
        family: Family of the transformer.
        num_layers: Number of blocks to keep; None keeps the blocks up to the last tap.
        visual_taps: Numbers of the blocks whose visual tokens are read, ascending.
        text_taps: Numbers of the blocks whose text tokens are read, ascending; may be empty.
        options: ``text_encoder``, ``vae`` and ``output_map``, see :class:`DiffusionBackbone`.
    """

    takes_aspects = True

    def __init__(
        self,
        transformer: Any,
        family: FlowFamily,
        num_layers: int | None = None,
        visual_taps: Sequence[int] = (4, 8, 12),
        text_taps: Sequence[int] = (4, 8, 12),
        **options: Any,
    ) -> None:
        super().__init__(family.noise_process, family.latent_space, **options)
        self.family, self.max_side, self.max_prompt = family, family.max_side, family.max_prompt
        self.lora_targets = family.lora_targets
        self.sources = family.sources
        self.source_encoder = None if self.vae is None else family.source_encoder(self.vae)
        self.lists, self.tail = family.lists, family.tail
        self.keep_blocks(transformer, num_layers, visual_taps, text_taps)
        if family.constant_text and max(self.text_taps, default=0) > self.visual_taps[-1]:
            raise InputError(
                f"text_taps={list(self.text_taps)} lie after the last of visual_taps, but {family.title} has the same "
                "text in all blocks; name earlier blocks"
            )
        for name in () if self.output_map else family.tail:
            if isinstance(getattr(transformer, name, None), nn.Parameter):
                delattr(transformer, name)
            elif hasattr(transformer, name):
                setattr(transformer, name, nn.Identity())

    def unread_parts(self, number: int, visual: bool, text: bool) -> tuple[Sequence[str], Sequence[str]]:
        inside = self.family.unread(number, visual, text) if number else ()
        return inside, self.family.unread_outside(number, visual, text)

    def drop_text_taps(self) -> None:
        super().drop_text_taps()
        if self.text_encoder is not None and self.last_tap == 0:
            freeze(self.text_encoder, self.text_encoder.tokens_only)

    def drop_time_embedding(self) -> None:
        if self.last_tap == 0 and not self.family.refines:  # no block runs, which would need it
            freeze(self.transformer, self.family.time_embedding)

    @property
    def feature_spec(self) -> FeatureSpec:
        """See :attr:`DiffusionBackbone.feature_spec`; grids are for the family's native size."""
        family, encoder = self.family, self.text_encoder
        length = 1 if encoder is None else encoder.num_tokens
        pooled = family.pooled_dim if encoder is None else encoder.pooled_dim or encoder.token_dim
        grid = family.latent_shape(*family.native_size)[1:]
        return FeatureSpec(
            visual=(TapSpec(family.width, family.grid(family.native_size)),) * len(self.visual_taps),
            text=(TapSpec(family.text_width, (length,)),) * len(self.text_taps),
            temb_dim=family.temb_dim,
            pooled_text_dim=pooled,
            output=TapSpec(family.latent_space.channels, grid) if self.output_map else None,
        )

    @property
    def native_size(self) -> tuple[int, int]:
        return self.family.native_size

    @property
    def side_multiple(self) -> int:
        return self.family.side_multiple

    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        """See :meth:`DiffusionBackbone.read`; a network with embedded guidance gets the family's default."""
        family, output = self.family, None
        sigma = timesteps.to(latents.device, torch.float32) / 1000
        # The pass ends behind the last tap, so that `output` is set with an output map alone.
        with family.exact_times(self.transformer, sigma), self.recorded(family.time_embedding) as seen:
            output = family.predict(self.transformer, latents, timesteps, conditioning, None)
        grids, first = family.grids(latents, conditioning), seen[0]
        count = first[1].shape[1] if isinstance(first, tuple) else sum(map(math.prod, grids))
        taps = {0: first} | {tap: seen[tap] for tap in (*self.visual_taps, *self.text_taps)}
        if family.constant_text:
            taps = {tap: (first[0], found) if tap else first for tap, found in taps.items()}
        read = {tap: family.split(tap, found, count, conditioning) for tap, found in taps.items()}
        text, mask = tuple(read[tap][1] for tap in self.text_taps), conditioning.prompt_mask
        return Features(
            visual=tuple(read[tap][0][:, : math.prod(grids[0])] for tap in self.visual_taps),
            visual_grids=(grids[0],) * len(self.visual_taps),
            text=text,
            pooled_text=conditioning.pooled(),
            temb=family.temb(*(seen[name] for name in family.time_embedding))[: len(latents)],
            text_mask=mask[:, : text[0].shape[1]] if text and mask is not None else mask,
            output=output,
        )


@dataclass(frozen=True)
class BackboneOptions:
    """Options that the factories of all families share: what is loaded, what trains, and how it runs.

    Attributes:
        revision: Branch, tag or commit of a hub id.
        variant: File variant of the weights, such as ``fp16``.
        pretrained: False initialises the network at random, as a control, and of Stable Diffusion the text encoder too.
        vae_dtype: Precision of the VAE.
        tuning: Weights of the network that train: ``full`` (all), ``lora`` (adapters) or ``frozen`` (none).
        lora: Adapter settings for ``tuning: lora``; the default is DiNa-LRM's rank 64, alpha 128.
        text_encoder_tuning: Weights of the text encoders that train: ``full``, ``lora`` or ``frozen``.
        frozen_dtype: Type in which frozen weights are stored; use ``bfloat16`` with ``precision: bf16-mixed``.
        gradient_checkpointing: Recompute block activations in the backward pass: less memory, about a third slower.
        attention_backend: Name of a diffusers attention backend, such as ``flash``; None keeps PyTorch's own. Networks
            that call PyTorch's attention themselves (U-Nets, SD3) have no other.
        quantization: Storage of the frozen linear layers of the blocks: ``int8`` (torchao) or ``nf4`` (bitsandbytes,
            on a GPU). None keeps ``frozen_dtype``.
    """

    revision: str | None = None
    variant: str | None = None
    pretrained: bool = True
    vae_dtype: StorageDtype = "float32"
    tuning: Tuning = "lora"
    lora: LoRA | None = None
    text_encoder_tuning: Tuning = "frozen"
    frozen_dtype: StorageDtype = "float32"
    gradient_checkpointing: bool = False
    attention_backend: str | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_quantization(self.quantization, self.tuning)

    def family(self, source: str, name: str | None, model: str | None = None, own: str | None = None) -> Family:
        """Return the family of the pipeline at ``source``, which must be of ``name`` and ``model`` if these are given.

        ``own`` is the import path of a family of one's own. No weight is loaded.
        """
        found = find_family(PipelineSource(source, self.revision, self.variant), own)
        if (name is not None and found.name != name) or (model is not None and found.model.split()[0] != model):
            raise InputError(
                f"source={source!r} is {found.model}, but this backbone is of {model or name}; choose the backbone of "
                "that model, or another source"
            )
        found.report_assumption("backbone")
        return found

    def parts(self, family: Family, **text: Any) -> tuple[Any, dict[str, Any]]:
        """Load a family's network, and its encoders by the names of a backbone's arguments."""
        text_encoder = family.load_prompt_encoder(**text)
        network = family.load_network(self.pretrained)
        return network, {"text_encoder": text_encoder, "vae": family.load_latent_encoder(self.vae_dtype)}

    def finish(self, backbone: Backbone, family: Family, unread: tuple[str, ...] = ()) -> Backbone:
        """Apply these options to a new backbone of a family, and return it; see :func:`.loading.finish`."""
        backbone.source, network = str(family.pipeline), backbone.get_submodule(backbone.network_name)
        loading = ("revision", "variant", "pretrained", "vae_dtype", "load_t5", "t5_length")  # before the backbone
        shared = {name: value for name, value in vars(self).items() if name not in loading}
        return finish(backbone, network, unread, float32_parts=family.float32_parts, **shared)


@dataclass(frozen=True)
class TransformerOptions(BackboneOptions):
    """Options of the factories of transformers, some of whose text encoders are T5.

    Attributes:
        load_t5: False leaves T5 out, for families that allow it; saves 9.5 GB in bfloat16 and loses detail of long
            prompts.
        t5_length: Number of T5 tokens per prompt, for families with T5; None takes the pipeline's own. Without T5 the
            number of SD3's zero tokens in their place.
    """

    load_t5: bool = True
    t5_length: int | None = None

    def parts(self, family: Family, **text: Any) -> tuple[Any, dict[str, Any]]:
        return super().parts(family, t5_length=self.t5_length, load_t5=self.load_t5, **text)


def load_family_backbone(
    source: str,
    name: str | None = None,
    family: str | None = None,
    num_layers: int | None = None,
    visual_taps: Sequence[int] = (4, 8, 12),
    text_taps: Sequence[int] = (4, 8, 12),
    output_map: bool = False,
    **options: Any,
) -> FamilyBackbone:
    """Load a backbone from the first blocks of a pipeline's rectified-flow transformer.

    Args:
        source: Diffusers pipeline folder, or hub id.
        name: Name of the family that the pipeline must belong to; None takes any.
        family: Import path of a family of one's own; None finds the family among those of this package.
        num_layers: Number of blocks to keep; None keeps the blocks up to the last tap.
        visual_taps: Numbers of the blocks whose visual tokens are read; 0 is before the first block.
        text_taps: Numbers of the blocks whose text tokens are read; may be empty.
        output_map: Whether to return the network's output after the last tapped block too, for a head that reads it.
        options: See :class:`TransformerOptions` and :class:`BackboneOptions`.
    """
    chosen = TransformerOptions(**options)
    found = chosen.family(source, name, own=family)
    if not isinstance(found, FlowFamily):
        raise InputError(f"source={source!r} is a pipeline of {found.title}; choose a backbone of that family")
    (network, encoders), taps = chosen.parts(found), (num_layers, visual_taps, text_taps)
    backbone = FamilyBackbone(network, found, *taps, output_map=output_map, **encoders)
    return chosen.finish(backbone, found, backbone.unread())
