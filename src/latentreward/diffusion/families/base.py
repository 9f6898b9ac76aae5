"""Interface of the families of generators: the one object that knows the conventions of a family's networks."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, LatentSpace, sources_of, sources_wanted
from latentreward.core.errors import InputError, check_range, errors_at
from latentreward.core.promises import Part, finite, of_class, returns, shown, tensor, wrong_tensor
from latentreward.core.registry import backbone_names, import_class, of_this_package
from latentreward.core.storage.json_files import Kind, entry
from latentreward.diffusion.backbones.tuning import ATTENTION, StorageDtype
from latentreward.diffusion.backbones.weights import settle
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.encoders.vae import LatentEncoder, SourceEncoder, SourceSize
from latentreward.diffusion.noise.processes import DDPM, FlowMatching, NoiseProcess
from latentreward.diffusion.noise.schedules import fits_kind

Pair = tuple[Tensor, Tensor]  # A ``(rank, in)`` and B ``(out, rank)`` of a layer's adapter


class PipelineConfigs(Protocol):
    """Configs of a pipeline's parts; of a folder, a hub id or a pipeline in memory.

    Attributes:
        source: Folder, hub id or class name, for messages.
        index: Content of ``model_index.json``.
    """

    source: str
    index: dict[str, Any]

    def has(self, part: str) -> bool:
        """Tell whether the pipeline has ``part``."""

    def config(self, part: str) -> dict[str, Any]:
        """Return the config of ``part``; raise InputError if it is missing."""

    def tensors(self, part: str, names: Sequence[str]) -> list[Tensor]:
        """Return weights of ``part`` by name; raise InputError if one is missing."""


def wrong_prediction(found: Tensor, family: Family, network: Any, latents: Tensor, *given: Any) -> str | None:
    """Return what is wrong with a prediction for ``latents``, see :data:`~latentreward.core.promises.Check`."""
    if family.flow and isinstance(family.noise_process, DDPM):
        return "a prediction with flow = True, but noise_process is DDPM; it must be FlowMatching, or flow = False"
    if family.clips and family.latent_space.frame_downscale is None:
        return "a prediction of clips (clips = True), but latent_space has no time axis; it must have a frame_downscale"
    return wrong_tensor(found, latents.shape) if finite(latents) else None


def _wrong_levels(found: tuple[Tensor, Tensor], family: Family, steps: int, shape: Sequence[int]) -> str | None:
    if not isinstance(found, tuple) or len(found) != 2:
        return f"{shown(found)}; it must be two tensors, timesteps and noise levels"
    timesteps, sigmas = found
    problem = wrong_tensor(timesteps, (steps,), low=0, high=1000) or wrong_tensor(sigmas, (steps + 1,), low=0, high=1)
    if problem:
        return problem
    if sigmas[-1] or (sigmas.diff() > 0).any():
        return f"noise levels from {sigmas[0]:g} to {sigmas[-1]:g}; they must fall, the last one to 0"
    if (family.noise_process.sigma(timesteps) - sigmas[:-1]).abs().max() > 0.01:  # rounded to whole timesteps
        return f"timesteps from {timesteps[0]:g} for noise levels from {sigmas[0]:g}; they must be 1000 times those"
    return None


class Family(Part):
    """Conventions of one family of generators: latents, text, noise levels, guidance, network, adapters.

    Outside a family there are latents in canonical form (4-D, or 5-D with a time axis; scaled, never packed), timesteps
    of :attr:`noise_process` (1000·σ for flows) and :class:`~latentreward.core.contracts.Conditioning` only. An object
    describes one pipeline and reads configs only; weights are loaded by the methods ``load_…``.

    Args:
        pipeline: Configs of the pipeline; a :class:`~latentreward.diffusion.backbones.loading.PipelineSource` if
            weights are to be loaded.

    Attributes:
        name: Name of the family: that of its file and of its settings.
        title: Name in messages and documents.
        part: Name of the network in a pipeline.
        network_class: Class of the network in diffusers.
        vae_class: Class of the VAE in diffusers.
        latent_encoder: Class that encodes and decodes with the VAE.
        flow: Whether the network is a rectified flow; else it predicts noise or v of a DDPM process.
        train_mode: Whether the network is in training mode while a policy trains; True for one that in evaluation mode
            computes a part of its output without gradient.
        clips: Whether the network makes clips; others make images, also in a latent space with a time axis.
        default_guidance: ``guidance_scale`` where none is given, as a rule that of the family's pipeline; None for
            networks without guidance.
        no_guidance: ``guidance_scale`` that switches guidance off.
        image_guidance_scale: Scale of the guidance towards the pictures to edit; None for guidance with one scale.
        passes: Number of predictions of a picture that classifier-free guidance combines.
        uncond_prompt: Prompt that is encoded for classifier-free guidance.
        lora_targets: Default name endings of the layers that get adapters.
        idle: Names of layers whose output never reaches the network's, so that an adapter would not train.
        float32_parts: Parts of the names of weights that are float32 also where frozen weights are stored in another
            type, as diffusers loads them.
        lora_loader: Class in ``diffusers.loaders`` that reads and writes LoRA files of the family, or None.
        sources: Least and largest number of pictures that the network edits or refers to; None for any number.
        sees_sources: Whether the text encoder reads these pictures too, as its :attr:`PromptEncoder.sees_sources` says.
        kohya_module: Name of the network module of kohya's scripts, for the metadata of their format.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    part: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = ""
    vae_class: ClassVar[str] = "AutoencoderKL"
    latent_encoder: ClassVar[type[LatentEncoder]] = LatentEncoder
    flow: ClassVar[bool] = True
    train_mode: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    no_guidance: ClassVar[float] = 1.0
    image_guidance_scale: float | None = None
    passes: ClassVar[int] = 2
    uncond_prompt: ClassVar[str] = ""
    lora_targets: ClassVar[Sequence[str]] = ATTENTION
    idle: Sequence[str] = ()
    float32_parts: ClassVar[Sequence[str]] = ()
    sources: tuple[int, int | None] = (0, 0)
    sees_sources: ClassVar[bool] = False
    kohya_module: ClassVar[str] = "networks.lora"

    def __init__(self, pipeline: PipelineConfigs) -> None:
        self.pipeline: Any = pipeline

    @classmethod
    @abstractmethod
    def recognises(cls, pipeline: PipelineConfigs) -> bool:
        """Tell whether a pipeline's network is of this family, from its configs."""

    def check(self) -> None:
        """Check that this variant of the family is supported, and that network and VAE belong together."""

    def check_flow(self) -> None:
        """Check :attr:`flow` of a family of one's own by the scheduler: a wrong one would train in silence."""
        config = self.pipeline.config("scheduler") if self.pipeline.has("scheduler") else {}
        name = f"family: {type(self).__name__}.flow is {self.flow}"
        if not fits_kind(config, self.flow):
            told = f"is not so of a network with a {config.get('_class_name')} ({self.named('scheduler')})"
            raise InputError(f"{name}, which {told}; set flow = {not self.flow}")
        if isinstance(self.noise_process, FlowMatching) != self.flow:
            process = type(self.noise_process).__name__
            raise InputError(f"{name}, which contradicts noise_process, a {process}; change one of the two")

    def assumption(self) -> str | None:
        """Return what is assumed about the variant where the configs do not tell, for a line of the run's output."""
        return None

    def report_assumption(self, part: str) -> None:
        """Write :meth:`assumption` to the run's output; ``part`` says what the pipeline is loaded for."""
        if assumption := self.assumption():
            from lightning.pytorch.utilities import rank_zero_info  # takes seconds to import

            rank_zero_info(f"{part} of {self.model}: {assumption}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """Config of the network."""
        return self.pipeline.config(self.part)

    def named(self, part: str) -> str:
        """Return the name of the config of ``part`` in messages."""
        return f"source={self.pipeline.source!r}: {part}"

    def entry(self, part: str, field: str, kind: type[Kind], default: Kind | None = None) -> Kind:
        """Return an entry of the config of ``part``; see :func:`~latentreward.core.storage.json_files.entry`."""
        return entry(self.pipeline.config(part), field, kind, self.named(part), default)

    @property
    def model(self) -> str:
        """Name of the model within the family, such as ``SDXL``."""
        return self.title

    # Latents

    @cached_property
    def latent_space(self) -> LatentSpace:
        """Space of the latents, from the VAE's config."""
        return self.latent_encoder.space_in(self.pipeline)

    @property
    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the network was trained on."""

    @property
    def side_multiple(self) -> int:
        """Number of pixels of which both sides of an image must be multiples."""
        return self.latent_space.downscale

    @property
    def max_side(self) -> int | None:
        """Largest side of the latents for which the network has positions; None for any."""
        return None

    def latent_shape(self, height: int | None = None, width: int | None = None, frames: int = 1) -> tuple[int, ...]:
        """Return the shape ``(C, h, w)``, or ``(C, T, h, w)`` with a time axis, of the latents of one sample.

        ``height`` and ``width`` are in pixels; None takes the native ones. ``frames`` is 1 for an image.
        """
        sides, space = [], self.latent_space
        for name, side, native in zip(("height", "width"), (height, width), self.native_size, strict=True):
            pixels = native if side is None else side
            if type(pixels) is not int or pixels < 1 or pixels % self.side_multiple:
                raise InputError(f"{name}={pixels!r} must be a positive multiple of {self.side_multiple} pixels")
            if self.max_side is not None and pixels > (most := self.max_side * space.downscale):
                raise InputError(
                    f"{name}={pixels} is over {most} pixels, for which this network has positions; set {most}"
                )
            sides.append(pixels)
        if frames != 1 and not self.clips:
            raise InputError(f"frames={frames}: {self.title} makes images; leave frames out")
        space.check_frames(frames)
        return space.shape(sides[0], sides[1], frames)

    def check_sources(self, number: int) -> None:
        """Raise InputError if the network does not take this number of pictures to edit."""
        if wanted := sources_wanted(number, self.sources):
            takes = f"takes {wanted} picture{'s' * (wanted != '1')} to edit, and {number} were given"
            alone = f"makes pictures from text alone, and {number} to edit were given; leave them out"
            raise InputError(f"{self.title} {alone if wanted == '0' else takes}")

    def check_prompt(self, prompt: str) -> None:
        """Raise InputError if a text encoder that sees pictures does not take the prompt, whatever their number."""

    def check_prompts(self, prompts: Sequence[str], setting: str) -> None:
        """Raise InputError if a prompt of a ``setting`` is not taken, or they edit unlike numbers of pictures."""
        for prompt in prompts:
            with errors_at(f"{setting}: {prompt[:60]!r}: "):
                self.check_sources(len(sources_of(prompt)))
                self.check_prompt(prompt)
        firsts = {len(sources_of(prompt)): prompt for prompt in reversed(prompts)}
        if len(firsts) > 1:
            told = ", ".join(f"{number} ({firsts[number][:60]!r})" for number in sorted(firsts)[:3])
            raise InputError(
                f"{setting}: the prompts edit unlike numbers of pictures, first {told}; give a list for each number"
            )

    def source_size(self, height: int, width: int) -> SourceSize:
        """Return the size for a picture to edit of (height, width) pixels, as the family's pipeline has it."""
        self.check_sources(1)
        raise NotImplementedError(f"{type(self).__name__} gives no size for sources")

    def source_encoder(self, vae: LatentEncoder) -> SourceEncoder | None:
        """Return the encoder of the pictures that the network edits; None for a network that edits none."""
        if self.sources == (0, 0):
            return None
        return SourceEncoder(vae, self.source_size)

    def load_latent_encoder(self, dtype: StorageDtype = "float32") -> LatentEncoder:
        """Load the VAE in ``dtype``; constants stored beside its weights (FLUX.2) stay float32."""
        import diffusers

        vae = self.pipeline.load(getattr(diffusers, self.vae_class), "vae").requires_grad_(False)
        settle(vae, getattr(torch, dtype), torch.float32)
        return self.wrap_vae(vae)

    def wrap_vae(self, vae: Any) -> LatentEncoder:
        """Return the encoder of a diffusers VAE in memory."""
        return self.latent_encoder(vae, self.latent_space)

    # Text

    @abstractmethod
    @returns(of_class(PromptEncoder))
    def load_prompt_encoder(
        self, t5_length: int | None = None, load_t5: bool = True, pretrained: bool = True
    ) -> PromptEncoder:
        """Load tokenizers and text encoders, whose weights stay unread for ``settle``.

        Args:
            t5_length: Number of T5 tokens per prompt, for families with T5; None takes the pipeline's own.
            load_t5: False leaves T5 out, for families that allow it.
            pretrained: False initialises the text encoders at random, as a control.
        """

    def encode_uncond(self, encoder: PromptEncoder) -> Conditioning:
        """Encode the prompt for classifier-free guidance, one row."""
        with torch.no_grad():
            return encoder([self.uncond_prompt])

    # Noise

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Config of the scheduler, as the family's pipeline in diffusers uses it."""
        config: dict[str, Any] = self.pipeline.config("scheduler")
        return config

    @property
    @abstractmethod
    def noise_process(self) -> NoiseProcess:
        """Forward process of the network."""

    @returns(_wrong_levels, each=True)
    def levels(self, num_inference_steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the timesteps ``(n,)`` and noise levels ``(n + 1,)`` of the pipeline's sampler, for flows.

        ``shape`` is that of one sample's latents, on which some families' levels depend.
        """
        raise NotImplementedError(f"{type(self).__name__} is not a flow")

    # Guidance

    def set_image_guidance(self, scale: float) -> None:
        """Set :attr:`image_guidance_scale`; raise InputError if it is below 1 or the family's guidance has none."""
        if self.image_guidance_scale is None:
            raise InputError(
                f"image_guidance_scale={scale:g}, but guidance of {self.title} has one scale; leave it out"
            )
        check_range("[1, inf)", "set guidance_scale: 1 to switch both off", image_guidance_scale=scale)
        self.image_guidance_scale = scale

    @property
    @abstractmethod
    def default_guidance(self) -> float | None:
        """``guidance_scale`` of the family's pipeline; None for networks without guidance."""

    def guidance(self, scale: float | None) -> float | None:
        """Check a ``guidance_scale`` and return it; None is replaced by the family's own."""
        if scale is None:
            return self.default_guidance
        if self.default_guidance is None and scale != self.no_guidance:
            raise InputError(
                f"guidance_scale={scale:g}, but {self.model} was distilled to sample without guidance; leave it out "
                "or set it to null"
            )
        if not self.no_guidance <= scale < math.inf:
            raise InputError(
                f"guidance_scale={scale:g} must be at least {self.no_guidance:g}, which switches guidance of "
                f"{self.title} off, and finite"
            )
        return scale

    @property
    def unguided(self) -> float | None:
        """``guidance_scale`` without classifier-free guidance; None, the family's own, where that needs none."""
        return self.no_guidance if self.needs_uncond(self.guidance(None)) else None

    def needs_uncond(self, scale: float | None) -> bool:
        """Tell whether a prediction with this checked ``guidance_scale`` needs the encoded empty prompt."""
        return scale is not None and scale != self.no_guidance

    def guided_prompts(self, conditioning: Conditioning, uncond: Conditioning) -> list[Conditioning]:
        """Return the prompts of the :attr:`passes` that :meth:`guide` combines: empty ones, the given ones, others.

        ``conditioning`` has B rows, and ``uncond``, the empty prompt, one row, or B.
        """
        return [uncond.beside(conditioning), conditioning]

    @returns(tensor(lambda family, with_prompt, *given: with_prompt.shape))
    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        """Combine the predictions with and without the prompt: u + s·(c − u), or c + s·(c − u) where 0 is off."""
        return (without if self.no_guidance else with_prompt) + scale * (with_prompt - without)

    # Network

    @returns(of_class(nn.Module))
    def load_network(self, pretrained: bool = True) -> Any:
        """Load the network, whose weights stay unread for ``settle``; initial weights without ``pretrained``."""
        import diffusers

        return self.pipeline.load(getattr(diffusers, self.network_class), self.part, pretrained)

    @abstractmethod
    @returns(wrong_prediction)
    def predict(
        self, network: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        """Predict noise, v or velocity ``(B, C, ...)`` with one pass of the network.

        Args:
            network: Network of the family.
            latents: ``(B, C, ...)`` canonical latents.
            timesteps: ``(B,)`` timesteps of :attr:`noise_process`.
            conditioning: Encoded prompts, B rows.
            guidance: Checked ``guidance_scale``, for networks that take it as an input (FLUX.1-dev).
        """

    @abstractmethod
    def blocks(self, network: Any) -> Iterator[nn.Module]:
        """Yield the network's blocks in order: the units of compilation, checkpointing and sharding."""

    # Adapters

    @property
    def lora_loader(self) -> str | None:
        """Class in ``diffusers.loaders`` that reads and writes LoRA files of the family; None if there is none."""
        return None

    def kohya_layers(self, layers: Mapping[str, Pair]) -> dict[str, Pair]:
        """Return adapters by the layers' names in the programs that read kohya's format."""
        other = "peft" if self.lora_loader is None else "diffusers"
        raise InputError(
            f"format=kohya has no names for {self.title}; use format={other} or merged; docs/families.md tells which "
            "programs read them"
        )


OTHER_TASKS = re.compile(
    "(Kontext|Edit)Inpaint|Control|Fill|VisualCloze|Layered|ImageOmni|ImageToVideo|VACE|LucyEdit|KleinKV|Kolors|"
    "Flux2Pipeline"
)
"""Pipelines of diffusers with a family's class of network that take more than a prompt, or another text encoder."""


@cache
def families(*mentioning: str) -> dict[str, type[Family]]:
    """Return the families of this package by name, of all files or of those that hold one of the given words."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        if mentioning and not any(word in file.read_text(encoding="utf-8") for word in mentioning):
            continue  # each import costs time
        module = import_module(f"{__package__}.{file.stem}")
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, Family) and kind.name and kind.__module__ == module.__name__:
                found[kind.name] = kind
    return found


def find_family(pipeline: PipelineConfigs, own: str | None = None) -> Family:
    """Return the family of a pipeline, checked; no weight is loaded.

    ``own`` is the import path of a family to use without asking those of this package.
    """
    if own is not None:
        family = import_family(own)(pipeline)
        family.check_flow()
        theirs = next(base for base in type(family).__mro__ if "name" in vars(base))
        taken = backbone_names() | {name: kind.__module__ for name, kind in families().items()}
        if not of_this_package(theirs.__module__) and of_this_package(taken.get(family.name)):
            raise InputError(f"family: {theirs.__name__}.name is {family.name!r}, a name of this package; give another")
        family.check()
        return family
    configs = [pipeline.index, *(pipeline.config(part) for part in ("transformer", "unet") if pipeline.has(part))]
    names = [str(config.get("_class_name")) for config in configs]
    known = families(*names)  # a family's file names its classes
    if OTHER_TASKS.search(names[0]):
        raise InputError(
            f"source={pipeline.source!r} is a {names[0]}, which takes more than a prompt, or a text encoder that no "
            "family here has; give a text-to-image pipeline, or a class of your own as family (docs/families.md)"
        )
    found = [kind for kind in known.values() if kind.recognises(pipeline)]
    # The file of a family that derives from another one may name no class.
    found = found or [kind for kind in families().values() if kind.recognises(pipeline)]
    if len(found) != 1:
        told = f"source={pipeline.source!r} is of no known family (it holds a {names[-1]})"
        titles = ", ".join(sorted(kind.title for kind in families().values()))
        raise InputError(f"{told}; known are {titles}; give a class of your own as family")
    family = found[0](pipeline)
    family.check()
    return family


def is_foreign(path: Any) -> bool:
    """Tell whether a setting ``family`` names a class outside this package, whose module would be imported."""
    return isinstance(path, str) and "." in path and not of_this_package(path)


def import_family(path: str) -> type[Family]:
    """Import a family by its path; who reads that from a stranger's file asks :func:`is_foreign` first."""
    if "." not in path:
        told = f"family={path!r} cannot be imported: it is no path of a class, such as my_file.MyFamily"
        raise InputError(f"{told}; for a family of this package leave family out, which is found from the configs")
    return import_class("family", path, Family)
