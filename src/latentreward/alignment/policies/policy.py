"""The policy that alignment trains: a frozen diffusion network, a trainable adapter, text encoders and VAE.

Adapters are those of peft, by name: the policy's, which trains, and others on the same network, as of a reward.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from latentreward.core.checkpoints.base_weights import is_quantized
from latentreward.core.contracts import Conditioning, LatentSpace, PreferenceBatch, sources_of
from latentreward.core.errors import InputError
from latentreward.diffusion import Family, NoiseProcess
from latentreward.diffusion.encoders.prompts import PromptEncoder, empty_prompts, encode_texts
from latentreward.diffusion.encoders.vae import encode_edits, reading_pictures

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.vae import LatentEncoder

POLICY = "policy"
"""Name of the trainable adapter in peft."""


class Policy(nn.Module):
    """A text-to-image network with a trainable adapter. Without the adapter, the network is the reference model.

    Args:
        network: diffusers network, frozen, with an adapter named :data:`POLICY`.
        family: Family of the network, which knows its conventions.
        text_encoder: Frozen prompt encoder; None if prompts are encoded elsewhere.
        vae: Frozen VAE; None if latents are never decoded, and no picture is edited.

    Attributes:
        source: Folder or hub id of the weights, for messages.
        adapters: Switch between the policy's adapter, a reward's adapter, and no adapter.
        source_encoder: Encoder of the pictures that prompts edit; None for a network that edits none.
        source_size: See :class:`~latentreward.alignment.PolicySource`.
        moving_adapters: Names of frozen adapters that training changes, so that checkpoints hold them.
    """

    source: str = ""
    moving_adapters: tuple[str, ...] = ()
    source_size: str = "made"
    network: Any

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        text_encoder: PromptEncoder | None = None,
        vae: LatentEncoder | None = None,
    ) -> None:
        super().__init__()
        self.network, self.family = network, family
        self.text_encoder, self.vae = text_encoder, vae
        self.source_encoder = None if vae is None else family.source_encoder(vae)
        self.adapters = AdapterSwitch(network, POLICY)
        self._uncond: tuple[Any, Conditioning] | None = None
        self._rows: dict[str, int] = {}
        self._remembered: tuple[Conditioning, Conditioning | None] | None = None

    @property
    def noise_process(self) -> NoiseProcess:
        """Forward process that the network was trained with."""
        return self.family.noise_process

    @property
    def latent_space(self) -> LatentSpace:
        """Latent space that the network works in."""
        return self.family.latent_space

    def train(self, mode: bool = True) -> Self:
        """Switch the dropout of the trainable adapter, and the network where :attr:`Family.train_mode` says so."""
        # T5 has dropout, and Lightning sets every module to training.
        super().train(False)
        self.training = mode
        self.network.train(mode and self.family.train_mode)
        for name, module in self.network.named_modules():
            if name.endswith(f".lora_dropout.{POLICY}"):
                module.train(mode)
        return self

    def reference(self) -> AbstractContextManager[None]:
        """Return a context in which all adapters are off, so that the network predicts as before alignment."""
        return self.adapters.use(None)

    def predict(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance: float | None = None
    ) -> Tensor:
        """Predict noise, v or velocity ``(B, C, ...)`` as :meth:`Family.predict`, by default with its own guidance."""
        return self.family.predict(self.network, latents, timesteps, conditioning, guidance)

    def predict_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        uncond: Conditioning | None,
        guidance_scale: float | None,
    ) -> Tensor:
        """Predict with the family's guidance, in one forward pass: of B rows, or B for each of :attr:`Family.passes`.

        ``uncond`` is the encoded empty prompt, one row, or B where it depends on a row's sources; without
        classifier-free guidance it is not used. ``guidance_scale`` is as :meth:`Family.guidance` returns it.
        """
        prompts = self.with_uncond(conditioning, uncond, guidance_scale)
        return self.predict_packed(latents, timesteps, prompts, guidance_scale)

    def with_uncond(
        self, conditioning: Conditioning, uncond: Conditioning | None, guidance_scale: float | None
    ) -> Conditioning:
        """Return B prompts as :meth:`predict_packed` takes them; see :meth:`predict_guided`."""
        if guidance_scale is None or not self.family.needs_uncond(guidance_scale):
            return conditioning
        if uncond is None:
            raise InputError(f"guidance_scale={guidance_scale:g} needs the encoded empty prompt; give it")
        return Conditioning.join(self.family.guided_prompts(conditioning, uncond))

    def predict_packed(
        self, latents: Tensor, timesteps: Tensor, prompts: Conditioning, guidance_scale: float | None
    ) -> Tensor:
        """Predict as :meth:`predict_guided` for ``prompts`` as :meth:`with_uncond` returns them."""
        if guidance_scale is None or not self.family.needs_uncond(guidance_scale):
            return self.predict(latents, timesteps, prompts, guidance_scale)
        # One pass of all rows: FSDP2 gathers each block once, and a GPU is filled better.
        passes = self.family.passes
        output = self.predict(torch.cat([latents] * passes), torch.cat([timesteps] * passes), prompts)
        without, with_prompt, *others = output.chunk(passes)
        return self.family.guide(with_prompt, without, guidance_scale, *others)

    def encode_prompts(
        self, prompts: Sequence[str], sources: Sequence[Tensor] = (), latents: bool = False
    ) -> Conditioning:
        """Encode B prompts and the pictures that they edit without gradient, each distinct prompt once.

        ``sources`` and ``latents`` are as those of :meth:`DiffusionBackbone.encode_prompts`.
        """
        with torch.no_grad(), reading_pictures():
            return encode_edits(self.require_text_encoder(), prompts, self.source_encoder, sources, latents)

    def conditioning_of(self, batch: PreferenceBatch) -> Conditioning:
        """Return the encoded prompts of a batch, from a cache or by the text encoder, with the latents of sources."""
        sources = tuple(source.float() for source in batch.sources)  # bfloat16 of a cache, as the latents of pairs
        if batch.conditioning is None:
            return self.encode_prompts(batch.prompts, sources, batch.latent_space is not None)
        return replace(batch.conditioning, source_latents=sources) if sources else batch.conditioning

    def encode_uncond(self, prompts: Sequence[str] = ()) -> Conditioning:
        """Encode the prompt for classifier-free guidance: the empty one, or zeros, as the family does.

        It is one row, encoded once for a frozen encoder in one place and precision; where the text encoder sees the
        pictures that ``prompts`` edit, it is a row for each of them.
        """
        encoder = self.require_text_encoder()
        if any(map(sources_of, empty := empty_prompts(encoder, prompts, self.family.uncond_prompt))):
            with torch.no_grad():
                return encode_texts(encoder, empty)
        weights = [*encoder.parameters()]
        # Without weights it is a table of encoded prompts; what trains or has no version may have changed unseen.
        if not weights or any(weight.requires_grad or weight.is_inference() for weight in weights):
            return self.family.encode_uncond(encoder)
        weight = weights[0]
        device = weight.device.type
        precision = weight.dtype, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        # What inference mode made cannot be part of a graph.
        state = encoder, weight.device, *precision, weight._version, torch.is_inference_mode_enabled()
        if self._uncond is None or self._uncond[0] != state:
            self._uncond = state, self.family.encode_uncond(encoder)
        return self._uncond[1]

    def remember(self, prompts: Sequence[str], guided: bool) -> None:
        """Encode prompts, and the empty prompt if ``guided``; keep both on the CPU, in place of those kept before."""
        # One by one: the last bits can depend on the batch size, and a resumed run has fewer prompts left.
        parts = [self.encode_prompts([prompt]).to("cpu") for prompt in prompts]
        uncond = None
        if guided and self.require_text_encoder().sees_sources:
            uncond = Conditioning.join([self.encode_uncond([prompt]).to("cpu") for prompt in prompts])
        elif guided:
            uncond = self.encode_uncond()
        # Rows are trained on for many batches; encoding T5 anew in each would cost more than the step.
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._remembered = Conditioning.join(parts), uncond

    def conditioning(self, prompts: Sequence[str], guided: bool) -> tuple[Conditioning, Conditioning | None]:
        """Return encoded prompts, remembered or new, and the empty prompt if ``guided``, on the network's device."""
        if self._remembered is None or not self._rows.keys() >= set(prompts):
            return self.encode_prompts(prompts), self.encode_uncond(prompts) if guided else None
        encoded, uncond = self._remembered
        rows, device = [self._rows[prompt] for prompt in prompts], next(self.network.parameters()).device
        if uncond is not None and self.require_text_encoder().sees_sources:
            uncond = uncond.select(rows).trimmed().to(device)
        # Text is padded to the longest prompt of the rollout; attention over the rest of the padding is wasted.
        return encoded.select(rows).trimmed().to(device), uncond

    def require_text_encoder(self) -> PromptEncoder:
        """Return the text encoder; raise InputError if the policy has none."""
        if self.text_encoder is None:
            raise InputError("this policy was built without a text encoder; load it from a full pipeline folder")
        return self.text_encoder

    def edit_at(self, height: int | None, width: int | None) -> None:
        """Resize pictures that are edited to the size of those that are made, by default the network's native size.

        Nothing changes for a network that edits none, or if ``source_size`` is ``pipeline``.
        """
        if self.source_encoder is not None and self.source_size == "made":
            native = self.native_size
            self.source_encoder.resize_to(height or native[0], width or native[1])

    @contextmanager
    def editing_at(self, height: int | None, width: int | None) -> Iterator[None]:
        """Call :meth:`edit_at` for the block; afterwards pictures are resized as before."""
        before = None if self.source_encoder is None else self.source_encoder.loader
        self.edit_at(height, width)
        try:
            yield
        finally:
            if self.source_encoder is not None:
                self.source_encoder.loader = before

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the network was trained on."""
        return self.family.native_size

    @property
    def side_multiple(self) -> int:
        """Number of pixels of which both sides of an image must be multiples."""
        return self.family.side_multiple

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Return the shape of one image's latents; see :meth:`Family.latent_shape`."""
        return self.family.latent_shape(height, width)

    def blocks(self) -> Iterator[nn.Module]:
        """Yield the network's blocks in order, for compiling, gradient checkpointing and sharding one by one."""
        return self.family.blocks(self.network)


class AdapterSwitch:
    """A switch that activates the peft adapters of a network and leaves ``requires_grad`` alone.

    peft's own switches (``set_adapter``, ``disable_adapters``) change ``requires_grad`` and take milliseconds. This
    class sets only the two private fields of peft's layers that decide the forward pass. The ``default`` adapter, or
    several, are active outside any :meth:`use`.
    """

    def __init__(self, network: nn.Module, default: str | Sequence[str]) -> None:
        self._network = network
        self._default = [default] if isinstance(default, str) else list(default)
        self._merged: list[MergedLayer] = []  # layers whose weights have adapters added at the moment
        self.refresh()

    def set_default(self, names: Sequence[str]) -> None:
        """Activate adapters ``names``, or none, outside any :meth:`use`."""
        self._default = list(names)
        self.refresh()

    def refresh(self) -> None:
        """Find the adapter layers again, as after one is added, and activate the default adapters."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = [module for module in self._network.modules() if isinstance(module, BaseTunerLayer)]
        self._names = {
            name for layer in self._layers for names in layer.adapter_layer_names for name in getattr(layer, names)
        }
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = list(self._default), False

    @property
    def working(self) -> tuple[str, ...]:
        """Adapters that are at work."""
        layer = next(iter(self._layers), None)
        return () if layer is None or layer._disable_adapters else tuple(layer._active_adapter)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Activate adapter ``name`` alone, or no adapter if ``name`` is None; on exit restore what was active before.

        With gradient checkpointing, call ``backward`` inside the context: checkpointed blocks are computed again with
        the adapter that is active at that time.
        """
        if name is not None and name not in self._names:  # peft would silently run the network without adapters
            raise ValueError(f"the network has no adapter {name!r}, only {sorted(self._names)}; call refresh()")
        # Layer by layer: adapters of a reward may be active on some layers alone.
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        merged, self._merged = self._merged, []
        exchange(merged)
        try:
            for layer in self._layers:
                layer._active_adapter, layer._disable_adapters = [] if name is None else [name], name is None
            yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled
            exchange(merged)
            self._merged = merged

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Add the adapters at work to the weights of their layers for the block, so that a layer is one product.

        Afterwards the weights are the tensors of before. Nothing is merged where rounding would tell (in autocast, and
        where weights are not float32), nor in quantised or sharded layers, nor where layers share a weight.
        """
        working = [one for one in self._layers if not one._disable_adapters]
        active = ((layer, [name for name in layer._active_adapter if name in layer.scaling]) for layer in working)
        layers = [(layer, names, layer.get_base_layer().weight) for layer, names in active if names]
        weights = [weight for _, _, weight in layers]
        foreign = [one for one in weights if is_quantized(one) and not isinstance(one, FakeTensor)]  # sharded ones too
        kept = any(one.dtype != torch.float32 for one in weights) or bool(foreign)
        others = any(layer.lora_variant or any(layer.lora_bias.values()) for layer, _, _ in layers)
        tied = len({id(one) for one in weights}) < len(weights)
        if not layers or self._merged or kept or others or tied or torch.is_autocast_enabled(weights[0].device.type):
            yield
            return
        with torch.no_grad():
            self._merged = [MergedLayer(*given, with_adapters(*given)) for given in layers]
        exchange(self._merged)
        try:
            yield
        finally:
            exchange(self._merged)
            self._merged = []


def with_adapters(layer: Any, names: Sequence[str], weight: Tensor) -> Tensor:
    """Return the weight of a layer of peft with adapters added."""
    for name in names:
        if weight.ndim == 2 and not layer.fan_in_fan_out:  # one kernel
            weight = torch.addmm(
                weight, layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name]
            )
        else:
            weight = weight + layer.get_delta_weight(name)
    return weight


@dataclass
class MergedLayer:
    """Layer of a network whose weight is for a while that with the adapters added."""

    layer: Any  # layer of peft
    names: list[str]  # adapters that are added
    weight: nn.Parameter  # weight of the layer below
    other: Tensor  # value of the weight that is not at work


def exchange(layers: Sequence[MergedLayer]) -> None:
    """Exchange the weights of layers for those with, or without, the adapters added."""
    for one in layers:
        # In place of the tensor, not into it: subtracting what was added would not give back every bit.
        one.weight.data, one.other = one.other, one.weight.data
        one.layer.merged_adapters = [] if one.layer.merged_adapters else [*one.names]


def add_frozen_adapter(network: nn.Module, config: Any, name: str) -> dict[str, nn.Parameter]:
    """Add an adapter to a network whose other adapters stay as they are, and return its parameters by their names.

    They are frozen, of peft's initial values and the types of the layers' weights. Call :meth:`AdapterSwitch.refresh`
    afterwards.
    """
    from peft import inject_adapter_in_model

    trains = {parameter for parameter in network.parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, network, name)
    for parameter in network.parameters():  # peft has made the new adapter the one that trains
        parameter.requires_grad_(parameter in trains)
    return {key: parameter for key, parameter in network.named_parameters() if f".{name}." in key}
