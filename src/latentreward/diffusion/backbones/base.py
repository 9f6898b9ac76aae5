"""Base classes of the backbones: a network that returns features, and one from the first blocks of a transformer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, LatentSpace, map_tensors
from latentreward.core.errors import InputError, check_range
from latentreward.core.promises import Kind, Part, place_of, returns, shown, wrong_tensor
from latentreward.core.registry import Construction
from latentreward.diffusion.backbones.tuning import ATTENTION, freeze
from latentreward.diffusion.encoders.vae import SourceEncoder, encode_edits
from latentreward.diffusion.noise.processes import NoiseProcess

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.prompts import PromptEncoder
    from latentreward.diffusion.encoders.vae import LatentEncoder


def _wrong_features(
    found: Features, backbone: DiffusionBackbone, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> str | None:
    if not isinstance(found, Features):
        return f"{shown(found)}; it must be Features"
    spec = getattr(backbone, "feature_spec", None)  # a backbone without a text encoder may not know its widths
    return None if spec is None else features_problem(found, spec, len(latents), "numbers")


def features_problem(features: Features, spec: FeatureSpec, rows: int, values: Kind = "floats") -> str | None:
    """Return the first difference of features from the ``spec`` that a head was built from; None without one."""
    promised: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    for kind, taps, specs in (("visual", features.visual, spec.visual), ("text", features.text, spec.text)):
        if len(taps) != len(specs):
            return f"{len(taps)} {kind} taps; it must be the {len(specs)} of feature_spec"
        lengths = [math.prod(grid) for grid in features.visual_grids] if kind == "visual" else [-1] * len(taps)
        if len(lengths) != len(taps):
            return f"{len(lengths)} visual_grids; it must be one for each of {len(taps)} taps"
        for number, (tap, length) in enumerate(zip(taps, lengths, strict=True)):
            promised[f"{kind} tap {number}"] = tap, (rows, length, specs[number].width)
    promised["temb"] = features.temb, (rows, spec.temb_dim)
    promised["pooled_text"] = features.pooled_text, (rows, spec.pooled_text_dim)
    for name, (tensor, shape) in promised.items():
        if problem := wrong_tensor(tensor, shape, values):
            return f"{name} {problem} as feature_spec and visual_grids say"
    channels = None if features.output is None else features.output.shape[1]
    if channels != (None if spec.output is None else spec.output.width):
        return f"an output map of {channels} channels; it must be as feature_spec says, {spec.output}"
    return None


class LatentNetwork(Protocol):
    """Network of latents with the encoders of its input: a backbone or a policy."""

    vae: LatentEncoder | None
    text_encoder: PromptEncoder | None

    @property
    def latent_space(self) -> LatentSpace:
        """Latents that the network takes."""
        ...

    @property
    def source_encoder(self) -> SourceEncoder | None:
        """Encoder of the pictures that prompts edit."""
        ...


class DiffusionBackbone(nn.Module, Part):
    """Part of a diffusion network that computes features for a reward head, with its encoders and noise process.

    A feature is read at a *tap*: the output of one block of the network. A subclass implements :meth:`read`,
    :attr:`feature_spec` and :meth:`blocks`. Latents may have any number of axes after the channels.

    Args:
        noise_process: Forward process of the network.
        latent_space: Latents that the network takes.
        text_encoder: Prompt encoder; None if conditioning comes from elsewhere.
        vae: Encoder of pixels into latents; None if latents come from elsewhere.
        output_map: Whether the features have the network's output too, ``(B, C, ...)``, for a head that reads it (DRM):
            of a transformer that of the output layers after the last tapped block, of a U-Net that of all of it.

    Attributes:
        source: Folder or hub id of the weights, with the revision, as the user gave it; for messages.
        network_name: Name of the attribute with the diffusers network; empty if :meth:`with_network` is not possible.
        takes_aspects: Whether the network was trained on images of several aspect ratios.
        max_side: Largest side of the latents for which the network has position embeddings; None for any.
        max_prompt: Largest number of tokens of a prompt for which the network has them; None for any.
        lora_targets: Name endings of the layers that get adapters where the settings name none.
        sources: Least and largest number of pictures that the network edits or refers to; None for any number.
        source_encoder: Encoder of the pictures that prompts edit; None for a network that edits none.
        built_by: Record of the call that made the backbone; None if an argument cannot be written as JSON.
    """

    source: str = ""
    network_name: str = ""
    takes_aspects: bool = False
    max_side: int | None = None
    max_prompt: int | None = None
    sources: tuple[int, int | None] = (0, 0)
    lora_targets: Sequence[str] = ATTENTION
    built_by: Construction | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments in :attr:`built_by`, which a registered factory replaces by its own call."""
        backbone = super().__new__(cls)
        # nn.Module.__setattr__ works only after nn.Module.__init__.
        object.__setattr__(backbone, "built_by", Construction.of(cls, args, kwargs))
        return backbone

    def __init__(
        self,
        noise_process: NoiseProcess,
        latent_space: LatentSpace,
        text_encoder: PromptEncoder | None = None,
        vae: LatentEncoder | None = None,
        output_map: bool = False,
    ) -> None:
        super().__init__()
        self.noise_process, self.latent_space, self.output_map = noise_process, latent_space, output_map
        self.text_encoder, self.vae = text_encoder, vae
        self.source_encoder: SourceEncoder | None = None
        self._compared = False

    @property
    @abstractmethod
    def feature_spec(self) -> FeatureSpec:
        """Widths and token grids of the features that :meth:`read` returns."""

    @property
    def native_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the images that the network was trained on; None if unknown."""
        return None

    @property
    def side_multiple(self) -> int:
        """Number of pixels of which both sides of an image must be multiples."""
        return self.latent_space.downscale

    @abstractmethod
    @returns(_wrong_features)
    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        """Compute the features of ``latents`` ``(B, C, ...)`` at ``timesteps`` ``(B,)``, with ``uncond`` None."""

    def forward(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, uncond: Conditioning | None = None
    ) -> Features:
        """Compute features for the prompts and, if ``uncond`` is given, in the same pass for the empty prompt too.

        Args:
            latents: ``(B, C, ...)`` scaled noisy latents.
            timesteps: ``(B,)`` timesteps of :attr:`noise_process`.
            conditioning: Encoded prompts, B rows.
            uncond: Encoded empty prompt, one row.
        """
        if latents.shape[1] != self.latent_space.channels:
            packed = "; unpack packed tokens by the pipeline's _unpack_latents" if latents.ndim == 3 else ""
            raise InputError(
                f"latents have {latents.shape[1]} channels, but this backbone takes latents of the space "
                f"[{self.latent_space}]; encode the images with the VAE of its own pipeline{packed}"
            )
        timesteps = timesteps.to(latents.device)
        size = len(latents)
        if uncond is not None:
            conditioning = Conditioning.join([conditioning, uncond.beside(conditioning)])
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        features = self.read(latents, timesteps, conditioning)
        if not self._compared:  # shapes, once: a head takes its layer sizes from the spec, where that is known
            spec = getattr(self, "feature_spec", None)
            if spec is not None and (problem := features_problem(features, spec, len(latents))):
                raise InputError(f"{type(self).__name__}.read returned {problem}{place_of(type(self).read)}")
            self._compared = True
        if uncond is None:
            return features
        return replace(rows_of(features, slice(size)), uncond=rows_of(features, slice(size, None)))

    def encode_prompts(
        self, prompts: Sequence[str], sources: Sequence[Tensor] = (), latents: bool = False
    ) -> Conditioning:
        """Encode B prompts and the pictures that they edit to B rows, repeated prompts once.

        Args:
            prompts: B prompts.
            sources: Pixels ``(B, 3, H, W)`` of each picture that the prompts edit; empty reads those of the prompts.
            latents: Whether ``sources`` are latents ``(B, C, ...)`` instead.
        """
        if self.text_encoder is None:
            raise InputError("this backbone was built without a text encoder; load it from a full pipeline folder")
        return encode_edits(self.text_encoder, prompts, self.source_encoder, sources, latents)

    def drop_unread(self, text: bool, temb: bool) -> None:
        """Stop reading ``text`` taps, or the timestep embedding, that a head does not use; freeze what made them."""
        if not (text and self.feature_spec.text):
            self.drop_text_taps()
        if not temb:
            self.drop_time_embedding()

    def drop_text_taps(self) -> None:
        """Stop reading text taps, and freeze what only they need: without gradients it would make DDP fail."""

    def drop_time_embedding(self) -> None:
        """Freeze parameters that only the timestep embedding in the features needs."""

    def with_network(self, network: nn.Module, text_encoder: PromptEncoder | None) -> Self | None:
        """Return a copy without a VAE that reads the taps of this backbone from ``network``; None if not possible.

        A class whose attributes refer to the network besides :attr:`network_name` needs a method of its own. Other code
        uses ``network``, a whole one with the same config, too: no block is dropped, those after the last tap not run.
        """
        if not self.network_name or type(network) is not type(getattr(self, self.network_name)):
            return None
        others = self._modules.keys() - {self.network_name, "text_encoder", "vae"}
        if {*self._parameters, *self._buffers} or any(
            True for name in others for _ in getattr(self, name).parameters()
        ):
            return None  # weights of its own have no values where this backbone was built without
        backbone = copy(self)
        backbone._modules = {**self._modules}  # which copy shares
        setattr(backbone, self.network_name, network)
        backbone.text_encoder, backbone.vae, backbone.built_by = text_encoder, None, None
        return backbone

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """Yield the kept blocks of the network in order: the units of compilation, checkpointing and sharding."""


def rows_of(features: Features, rows: slice) -> Features:
    """Return the given rows of a batch of features."""
    return map_tensors(features, lambda tensor: tensor[rows])


def check_taps(name: str, taps: Sequence[int], last: int, least: int = 0) -> tuple[int, ...]:
    """Check block numbers to read features at, and return them as a tuple."""
    taps = tuple(taps)
    if outside := [tap for tap in taps if not 0 <= tap <= last]:
        raise InputError(
            f"{name}={list(taps)} reaches block {outside[-1]}, but this network has blocks 1 to {last} (0 reads before "
            "the first one)"
        )
    if len(taps) < least or list(taps) != sorted(set(taps)):
        raise InputError(f"{name}={list(taps)} must name at least {least} blocks, which ascend without repeats")
    return taps


class PassEnded(Exception):
    """Ends a pass of a network behind the last block that is read."""


class FirstBlocks(nn.Module):
    """Stand-in for a network's list of blocks during a pass that is recorded."""

    def __init__(self, blocks: Sequence[nn.Module], count: int, ends: bool) -> None:
        super().__init__()
        # ``count``: of the whole list, which Chroma's network asks for; ``ends``: the pass ends behind ``blocks``.
        self.blocks, self.count, self.ends = tuple(blocks), count, ends

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.blocks
        if self.ends:
            raise PassEnded


@contextmanager
def recorded(
    network: Any, lists: Mapping[str, FirstBlocks], watched: Mapping[Any, nn.Module]
) -> Iterator[dict[Any, Any]]:
    """Record what the ``watched`` modules return, by their keys, in a pass of a network in the body of the context.

    ``lists`` stand in for the network's lists of blocks. If one ends the pass, the rest of the body is left out too.
    """
    seen: dict[Any, Any] = {}
    forward, own_forward, whole = network.forward, vars(network).get("forward"), {n: getattr(network, n) for n in lists}

    def note(key: Any, module: nn.Module, inputs: Any, output: Any) -> None:
        seen[key] = output

    def until_end(*inputs: Any, **named: Any) -> Any:
        with suppress(PassEnded):
            return forward(*inputs, **named)
        return seen  # FSDP2 gathers the network's weights once a gradient arrives at what the pass returns

    def end(*call: Any) -> None:
        raise PassEnded

    hooks = [module.register_forward_hook(partial(note, key)) for key, module in watched.items()]
    for name, blocks in lists.items():
        setattr(network, name, blocks)
    if ends := any(blocks.ends for blocks in lists.values()):
        network.forward = until_end
        hooks.append(network.register_forward_hook(end))
    try:
        with suppress(PassEnded):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for name, blocks in whole.items():
            setattr(network, name, blocks)
        if ends:
            del network.forward
        if own_forward is not None:
            network.forward = own_forward


class TransformerBackbone(DiffusionBackbone):
    """Backbone with visual and text taps on numbered blocks of a transformer; tap 0 is before the first block.

    Attributes:
        transformer: diffusers transformer.
        lists: Names of the transformer's lists of blocks, in the order in which they run.
        tail: Names of the transformer's modules and weights after the last block.
        visual_taps: Numbers of the blocks whose visual tokens are read, ascending.
        text_taps: Numbers of the blocks whose text tokens are read, ascending; may be empty.
    """

    network_name = "transformer"
    transformer: Any
    lists: Sequence[str] = ("transformer_blocks",)
    tail: Sequence[str] = ("norm_out", "proj_out")
    visual_taps: tuple[int, ...]
    text_taps: tuple[int, ...]

    def keep_blocks(
        self, transformer: Any, num_layers: int | None, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> None:
        """Set transformer and taps, and drop the blocks after ``num_layers``, or with None those after the last tap."""
        self.block_counts = [len(getattr(transformer, name)) for name in self.lists]  # before any are dropped
        depth = sum(self.block_counts)
        check_range(f"[1, {depth}]", "the network has no more blocks", num_layers=num_layers)
        self.visual_taps = check_taps("visual_taps", visual_taps, num_layers or depth, least=1)
        self.text_taps = check_taps("text_taps", text_taps, num_layers or depth)
        self.transformer, kept = transformer, num_layers or max([*visual_taps, *text_taps, 1])
        for name in self.lists:
            blocks = getattr(transformer, name)
            setattr(transformer, name, blocks[:kept])
            kept = max(0, kept - len(blocks))

    @property
    def last_tap(self) -> int:
        """Number of the last block that is run; the output map needs one."""
        return max(*self.visual_taps, *self.text_taps, int(self.output_map))

    def blocks(self) -> Iterator[nn.Module]:
        for name in self.lists:
            yield from getattr(self.transformer, name)

    @contextmanager
    def recorded(self, modules: Sequence[str]) -> Iterator[dict[int | str, Any]]:
        """Record a pass of the transformer in the body of the context, and end it behind the last tap.

        With an output map the pass goes on with the output layers. The record has the outputs of ``modules`` by name,
        and of each tapped block by number; 0 is what the first block takes: text and visual tokens, or joint ones.
        """
        network, blocks, last = self.transformer, [*self.blocks()], self.last_tap
        watched: dict[int | str, nn.Module] = {name: network.get_submodule(name) for name in modules}
        watched |= {tap: blocks[tap - 1] for tap in (*self.visual_taps, *self.text_taps) if tap}
        lists, left = {}, max(last, 1)
        for name, count in zip(self.lists, self.block_counts, strict=True):
            kept = [*getattr(network, name)][:left]
            lists[name] = FirstBlocks(kept, count, len(kept) == left and not self.output_map)
            left -= len(kept)

        def begin(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = signature(block.forward).bind(*inputs, **named).arguments
            tokens, text = next(iter(given.values())), given.get("encoder_hidden_states")
            seen[0] = tokens if text is None else (text, tokens)
            if not last:
                raise PassEnded

        # Before FSDP2's own hook, which gathers the weights of a block.
        hook = blocks[0].register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
        with hook, recorded(network, lists, watched) as seen:
            yield seen

    def unread(self) -> tuple[str, ...]:
        """Return names of what no tap depends on in the transformer; it must not train or get adapters."""
        last, network = self.last_tap, self.transformer
        numbered = [f"{name}.{index}" for name in self.lists for index in range(len(getattr(network, name)))]
        inside, outside = self.unread_parts(last, last in self.visual_taps or self.output_map, last in self.text_taps)
        names = [*numbered[last:], *outside, *(() if self.output_map else self.tail)]
        names += [f"{numbered[last - 1]}.{part}" for part in inside if last]
        present = {name for name, _ in (*network.named_modules(), *network.named_parameters())}
        return tuple(name for name in names if name in present)

    @abstractmethod
    def unread_parts(self, number: int, visual: bool, text: bool) -> tuple[Sequence[str], Sequence[str]]:
        """Return names of what these outputs of block ``number`` do not depend on: inside it, and outside blocks."""

    def drop_text_taps(self) -> None:
        self.text_taps = ()
        freeze(self.transformer, self.unread())
