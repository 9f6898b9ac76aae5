"""Trained reward models on disk: the model folder, and the base class in whose form an importer gives any other layout.

A model folder holds all weights but the pretrained ones of the base pipeline:

=====================================  ================================================================================
``config.json``                        classes and settings of backbone and head, base, noise, image sizes, calibration
``head.safetensors``                   weights of the head
``adapter/``                           LoRA of the network, in PEFT's format
``adapter_text_encoder[_2|_3]/``       LoRA of a text encoder, in PEFT's format
``backbone.safetensors``               modules of the backbone that were trained in full
``base.safetensors``                   four values of each weight that comes from the base, to recognise the base
``README.md``                          model card
=====================================  ================================================================================

Loading runs no code from the folder: it holds only safetensors and JSON, and :mod:`.recipe` decides which classes
``config.json`` may name.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from latentreward import __version__
from latentreward.core.checkpoints.base_weights import VALUES, same_values, sample, sample_in, without_adapters
from latentreward.core.contracts import LatentSpace, taken_of_edits
from latentreward.core.errors import InputError, did_you_mean, errors_at
from latentreward.core.storage.digests import check_hash
from latentreward.core.storage.json_files import STRICT, checked, read_config
from latentreward.core.storage.weight_files import map_weights
from latentreward.data.clips import check_clips
from latentreward.data.image_sizes import ImageSizes, NearestBucket, OneSize
from latentreward.data.images import MAX_PIXELS, ExifOrientation
from latentreward.diffusion import DiffusionBackbone
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.backbones.weights import assign, settling_later
from latentreward.reward.heads.base import AXES, RewardHead
from latentreward.reward.scoring.files import WEIGHTS as ADAPTER_WEIGHTS
from latentreward.reward.scoring.files import (
    compare_tensors,
    existing_folder,
    fill_adapter,
    inject_adapter,
    load_exactly,
    lora_layers,
    names_in_file,
    read_lora,
    read_safetensors,
)
from latentreward.reward.scoring.recipe import (
    ONLY_IN_TRAINING,
    ModelPart,
    ModelRecipe,
    build_backbone,
    build_head,
    called,
    check_class,
    is_ours,
)
from latentreward.reward.scoring.scoring_noise import Calibration, ScoringNoise

if TYPE_CHECKING:
    from latentreward.reward.scoring.reward_model import RewardModel

Model = TypeVar("Model", bound="RewardModel")
FORMAT, VERSION = "latentreward-reward-model", 1
CONFIG, HEAD, BACKBONE, BASE = "config.json", "head.safetensors", "backbone.safetensors", "base.safetensors"
IMAGE_SIZES: dict[str, type[ImageSizes]] = {"OneSize": OneSize, "NearestBucket": NearestBucket}


class StoredReward(ABC):
    """Trained reward model on disk: a recipe of its parts, and the files with their weights.

    Constructing an object reads only small files. In alignment, a reward that was trained as a LoRA adapter on the
    policy's base can run on the policy's own network. :attr:`on_meta_device`, :meth:`same_base`, :meth:`head` and
    :meth:`adapter` serve that case: they tell whether the reward fits the policy, and load the reward's head and
    adapter without its base.
    """

    recipe: ModelRecipe | None = None  # None in a published layout, where the weights decide on some settings
    exif: ExifOrientation = "ignore"  # as in training; ``ignore`` in the published layouts
    image_sizes: ImageSizes | None = None  # as in training; None if not recorded, as in the published layouts
    edits: bool | None = None  # whether the pairs of the training were edits of pictures; None if not recorded
    shareable: bool = True  # whether the model may run on a policy's network, as an adapter can

    @abstractmethod
    def backbone(self) -> DiffusionBackbone:
        """Build the backbone with initialised adapters; under ``torch.device("meta")`` it has shapes but no weights."""

    @abstractmethod
    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        """Load only the trained head, built for the features of ``backbone``, which may be :attr:`on_meta_device`."""

    def reading(self) -> AbstractContextManager[Any]:
        """Return a context in which :meth:`load` builds and fills the model."""
        return nullcontext()

    def fill(self, model: RewardModel) -> None:
        """Load the trained weights other than the head's; the base class loads the network's adapter."""
        fill_adapter(model.backbone.get_submodule(model.backbone.network_name), self.adapter(model.backbone))

    def load(self, kind: type[Model]) -> Model:
        """Load the whole model as an object of the class ``kind``, frozen and in evaluation mode."""
        with self.reading(), torch.random.fork_rng(devices=[]):  # initial values are random but overwritten
            backbone = self.backbone()
            model = kind(backbone, self.head(backbone))
            model.recipe, model.exif, model.edits = self.recipe, self.exif, self.edits
            self.fill(model)
        backbone.sources = self.sources(backbone)
        model.image_sizes = self.image_sizes or model.image_sizes
        return model.requires_grad_(False).eval()

    @cached_property
    def on_meta_device(self) -> DiffusionBackbone:
        """Backbone on the meta device, which has shapes but no weights."""
        with torch.device("meta"):
            return self.backbone()

    def latent_space(self) -> LatentSpace:
        """Return the latent space of the latents that the model scores, from config files alone."""
        return self.on_meta_device.latent_space

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the two outputs of a head with axes, from its settings; empty for a head with one score."""
        return AXES if self.recipe is not None and self.recipe.head.init_args.get("axes") else ()

    def sources(self, backbone: DiffusionBackbone) -> tuple[int, int | None]:
        """Return how many pictures to edit the model takes: as many as its ``backbone``, if its training had some."""
        return taken_of_edits(backbone.sources, lambda: self.edits)

    def adapter(self, backbone: DiffusionBackbone) -> dict[str, Tensor]:
        """Read only the trained LoRA tensors of the network of ``backbone``, by their names in it."""
        return {}

    def base_values(self) -> Mapping[str, Tensor]:
        """Read a few values of each weight as in training, by its name in the backbone without adapters.

        The result is empty if no values were recorded.
        """
        return {}

    def same_base(self, part: str, weights: Mapping[str, Tensor], source: str) -> bool:
        """Tell whether the model was trained on the given pretrained weights, from :meth:`base_values`.

        ``weights`` are by their names, without adapters, in ``part`` of the backbone: ``text_encoder``, or the
        ``network_name`` of :attr:`on_meta_device`. The published DiNa-LRM layout, which records no values, compares
        ``source``, their folder or hub id, instead.
        """
        theirs, ours = self.base_values(), {f"{part}.{name}": weight for name, weight in weights.items()}
        return all(name in theirs and same_values(sample(weight), theirs[name]) for name, weight in ours.items())

    def complete_from(self, pipeline: PipelineSource) -> None:
        """Take tokenizers that the files lack from the ``pipeline`` of the policy, unless a base is given."""
        return


def sizes_record(sizes: ImageSizes | None) -> dict[str, Any] | None:
    """Return the rule for image sizes as values for JSON; the inverse of :func:`sizes_of`, which refuses some rules."""
    if sizes is None:
        return None
    if IMAGE_SIZES.get(type(sizes).__name__) is not type(sizes):
        raise InputError(f"image_sizes={sizes} cannot be saved; set a {' or '.join(IMAGE_SIZES)}")
    record = ModelPart(type(sizes).__name__, asdict(sizes)).record()  # type: ignore[call-overload]
    with errors_at("image_sizes: "):
        sizes_of(record)
    return record


def sizes_of(record: Any) -> ImageSizes | None:
    """Build the rule for image sizes from its entry in ``config.json``; None for null."""
    if record is None:
        return None
    part = checked(ModelPart, record)
    if part.name not in IMAGE_SIZES:
        raise InputError(f"unknown class {part.name!r}{did_you_mean(part.name, IMAGE_SIZES)}")
    sizes = called(IMAGE_SIZES[part.name], part.init_args)
    if isinstance(sizes, NearestBucket):
        sizes = replace(sizes, buckets=tuple(map(tuple, sizes.buckets)))
    for height, width in sizes.buckets if isinstance(sizes, NearestBucket) else [(sizes.height, sizes.width)]:
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            raise InputError(f"{height}x{width} is not a size from 1 to {MAX_PIXELS} pixels")
    if isinstance(sizes, OneSize):
        check_clips("", sizes.frames, sizes.fps)
    elif not sizes.buckets:
        raise InputError("buckets is empty; download it again")
    return sizes


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Contents of a model folder's ``config.json``, in the order of the file."""

    __pydantic_config__ = STRICT
    backbone: ModelPart
    head: ModelPart
    own_weights: tuple[Annotated[str, Field(pattern=r"^\w+$")], ...] = ()  # see ``own`` of :class:`ModelRecipe`
    # Names of the backbone's modules that have a LoRA adapter
    adapters: tuple[Annotated[str, Field(pattern=r"^\w+(\.\w+)?$")], ...]
    base: str  # base pipeline that the model was trained on, with its revision; for messages
    noise: ScoringNoise  # default noise levels and seeds of a score
    # Rule by which images are resized; None takes the backbone's default
    image_sizes: Any = None
    exif: ExifOrientation = "ignore"  # whether images are turned upright by their EXIF orientation
    edits: bool | None = None  # whether the training's images were edits of pictures; None if not recorded
    # Mean and quantiles of scores on a reference set; None if the model was not calibrated
    calibration: Calibration | None = None
    training: dict[str, Any] = field(default_factory=dict)  # see :class:`ModelRecipe`
    sha256: dict[str, str] = field(default_factory=dict)  # path of each file of weights in the folder → its SHA-256

    @property
    def recipe(self) -> ModelRecipe:
        """Classes and settings of backbone and head."""
        return ModelRecipe(self.backbone, self.head, self.own_weights, self.training)

    def text(self) -> str:
        """Return the text of the file, with one entry per line; the inverse of :meth:`of_record`."""
        record = {
            "format": FORMAT,
            "format_version": VERSION,
            **asdict(self),
            "backbone": self.backbone.record(),
            "head": self.head.record(),
            "image_sizes": sizes_record(self.image_sizes),
            "versions": {
                "latentreward": __version__,
                **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
            },
        }
        lines = (f"  {json.dumps(n)}: {json.dumps(v)}" for n, v in record.items() if (n, v) != ("edits", None))
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def of_record(cls, record: Mapping[str, Any], base: str | None = None) -> Self:
        """Build the config from the contents of a ``config.json``, on the pipeline ``base`` unless that is None."""
        again = "download it again"
        if record.get("format") != FORMAT:
            raise InputError(f"format is {record.get('format')!r}, not {FORMAT!r}, a reward model of latentreward")
        if (number := checked(PositiveInt, record.get("format_version"), "format_version", again)) > VERSION:
            raise InputError(f"format_version is {number}, but this program reads up to {VERSION}; update latentreward")
        entries = [one.name for one in fields(cls)]
        if missing := [name for name in entries if name not in record and name != "edits"]:
            raise InputError(f"{missing[0]} is missing; {again}")
        # Entries that a later version adds under the same number are not needed.
        known = {name: record[name] for name in entries if name in record}
        config = checked(cls, without_noise_keys(known), remedy=again)
        with errors_at("image_sizes: "):
            config = replace(config, image_sizes=sizes_of(config.image_sizes))
        return config if base is None else replace(config, backbone=config.recipe.on(base).backbone)


def without_noise_keys(value: Any) -> Any:
    """Return a record without the choice, of earlier versions, that images of a prompt share their noise."""
    if not isinstance(value, dict):
        return value
    return {name: without_noise_keys(one) for name, one in value.items() if (name, one) != ("noise_key", "prompt")}


def is_model_folder(place: Path) -> bool:
    """Tell whether ``place`` is a model folder; one of its files is enough, and loading reports missing files."""
    if (place / HEAD).is_file():
        return True
    if not (place / CONFIG).is_file() or any(place.glob("*.ckpt")):
        return False
    try:
        return read_config(place / CONFIG).get("format") == FORMAT
    except InputError:
        return True  # a damaged config.json: loading reports the damage


class PretrainedReward(StoredReward):
    """Stored reward in a model folder, as :meth:`~latentreward.reward.RewardModel.save_pretrained` writes it.

    ``base`` is loaded in place of the base pipeline that ``config.json`` names; its weights must be equal. ``trusted``
    is whether ``config.json`` may name classes that are not registered; see :mod:`.recipe`.
    """

    recipe: ModelRecipe

    def __init__(self, folder: Path, base: str | None = None, trusted: bool = False) -> None:
        self.folder = existing_folder(folder, CONFIG, HEAD, BASE)
        path = folder / CONFIG
        try:
            self.config = config = FolderConfig.of_record(read_config(path), base)
            check_class("backbone", config.backbone, trusted)
            check_class("head", config.head, trusted)
        except InputError as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        self.recipe, self.exif, self.image_sizes = config.recipe, config.exif, config.image_sizes
        self.edits, self.places = config.edits, adapter_folders(config.adapters)
        for name in sorted(self.places.values()):
            existing_folder(folder / name, "adapter_config.json", ADAPTER_WEIGHTS)
        existing_folder(folder, *([BACKBONE] if config.own_weights else []))
        wanted = {*self.places.values()} | ({BACKBONE} if config.own_weights else set())
        extra = {path.name for pattern in ("adapter*", BACKBONE) for path in folder.glob(pattern)} - wanted
        if extra:
            raise InputError(f"{path} does not name {min(extra)}, which lies beside it; download the folder again")

    def _intact(self, name: str) -> Path:
        """Return the path of a file of weights, after comparing it with the checksum in ``config.json``."""
        return check_hash(self.folder / name, self.config.sha256.get(name), "download it again")

    @property
    def _stores_networks(self) -> bool:
        """Whether the folder holds network and text encoders in full."""
        return is_ours(self.recipe.backbone) and {"text_encoder"} < {*self.recipe.own}

    def check_base_is_here(self) -> None:
        """Raise InputError if the base is the name of a folder on the author's machine, which does not exist here."""
        recipe = self.recipe
        if is_ours(recipe.backbone) and recipe.local_name and not Path(recipe.local_name).exists():
            raise InputError(
                f"{self.folder / CONFIG}: the base {recipe.local_name!r} is the name of a folder of whoever published "
                "the model; give your copy as --base FOLDER (in Python base=FOLDER)"
            )

    def backbone(self) -> DiffusionBackbone:
        part, place = self.recipe.backbone, f"{self.folder / CONFIG}: "
        self.check_base_is_here()
        with errors_at(place):
            for name in ONLY_IN_TRAINING:
                if is_ours(part) and name in part.init_args:
                    raise InputError(f"backbone.init_args.{name} is for training alone; remove it")
            # The base's weights are not read, nor need they be there, if the folder stores all networks.
            given = {"pretrained": False} if self._stores_networks else {}
            backbone = build_backbone(part, self.folder, **given)
        backbone.requires_grad_(False)
        modules = {name for name, _ in backbone.named_modules()}
        known = modules | {*backbone.state_dict()}
        if unknown := [*({*self.places} - modules), *({*self.recipe.own} - known)]:
            raise InputError(f"{place}the backbone has no part {unknown[0]!r}")
        for name, folder in self.places.items():
            network = backbone.get_submodule(name)
            if not lora_layers(network):
                inject_adapter(network, self.folder / folder)
            for adapter in names_in_file(network).values():
                network.get_parameter(adapter).requires_grad_(True)
        for name, weight in backbone.named_parameters():
            weight.requires_grad_(weight.requires_grad or name.partition(".")[0] in self.recipe.own)
        if (found := adapters_of(backbone)) != self.config.adapters:
            held = f"the folder holds {list(self.config.adapters)}"
            raise InputError(f"{place}the backbone has adapters in {list(found)}, but {held}")
        return backbone

    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        stored = read_safetensors(self._intact(HEAD))
        with errors_at(f"{self.folder / CONFIG}: "):
            head = build_head(self.recipe.head, backbone.feature_spec, self.folder, stored)
        load_exactly(head, stored, self.folder / HEAD)
        return head

    def reading(self) -> AbstractContextManager[Any]:
        return settling_later(undrawn=self._stores_networks)

    def fill(self, model: RewardModel) -> None:
        backbone, own, calibration = model.backbone, self.recipe.own, self.config.calibration
        if own:
            weights = map_weights([path := self._intact(BACKBONE)])
            compare_tensors(dict(own_weights(backbone, own)), weights, path)
            assign(backbone, weights)
        self._check_base(backbone)
        for name in self.places:
            network = backbone.get_submodule(name)
            fill_adapter(network, self._adapter(name, network))
        backbone.drop_unread(model.head.reads_text, model.head.reads_temb)
        if calibration is not None and calibration.axes != (axes := model.head.axis_weights):
            logging.getLogger(__name__).warning(
                "%s: the calibration is of scores with the axes weighed %s, and these are %s now; it is left out, "
                "publish calibrates again", self.folder, list(calibration.axes or ()), list(axes or ()),
            )  # fmt: skip
            calibration = None
        model.noise, model.calibration = self.config.noise, calibration

    def _check_base(self, backbone: DiffusionBackbone) -> None:
        """Compare the base's weights with ``base.safetensors``; raise InputError if one is missing or differs."""
        recorded, path = self.base_values(), self.folder / BASE
        ours, factory = dict(base_samples(backbone, self.recipe.own)), self.recipe.backbone
        for kind, names in (("lacks", recorded.keys() - ours), ("has another weight,", ours.keys() - recorded.keys())):
            if names:
                raise InputError(
                    f"{path}: the base {backbone.source or self.recipe.source!r} {kind} {min(names)} "
                    f"({len(names)} in all); give the base that the model was trained on as base"
                )
        for name, values in recorded.items():
            if values.shape != (VALUES,) or not same_values(ours[name], values):
                random = "" if is_ours(factory) else f", unless {factory.name} draws it at random at each start"
                raise InputError(
                    f"{path}: the model belongs to the base {self.config.base or 'of its backbone'}, whose "
                    f"{name} differs from that of {backbone.source or 'this one'}; give that base as base{random}"
                )

    def _adapter(self, part: str, network: torch.nn.Module) -> dict[str, Tensor]:
        return read_lora(self._intact(f"{self.places[part]}/{ADAPTER_WEIGHTS}").parent, network)

    def adapter(self, backbone: DiffusionBackbone) -> dict[str, Tensor]:
        name = backbone.network_name
        return self._adapter(name, backbone.get_submodule(name)) if name in self.places else {}

    def base_values(self) -> Mapping[str, Tensor]:
        return read_safetensors(self._intact(BASE))


def adapter_folders(parts: Sequence[str]) -> dict[str, str]:
    """Return the folder name of each module's adapter: ``adapter`` of the first of the backbone's own modules."""
    networks = [part for part in parts if "." not in part]
    return {part: "adapter" if part in networks[:1] else f"adapter_{part.rpartition('.')[2]}" for part in parts}


def adapters_of(backbone: DiffusionBackbone) -> tuple[str, ...]:
    """Return the names of the backbone's modules that have a LoRA adapter; text encoders are listed one by one."""
    parts = [name for name, _ in backbone.named_children() if name not in ("vae", "text_encoder")]
    if backbone.text_encoder is not None:
        parts += [f"text_encoder.{name}" for name, _ in backbone.text_encoder.named_children()]
    return tuple(part for part in parts if lora_layers(backbone.get_submodule(part)))


def own_weights(backbone: DiffusionBackbone, own: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers that the model stores in full, by their names in the backbone."""
    return (item for item in backbone.state_dict().items() if item[0].partition(".")[0] in own)


def base_samples(backbone: DiffusionBackbone, own: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield samples of the parameters that come from the base pipeline, by their names without adapters."""
    names = [name for name, _ in backbone.named_parameters() if name.partition(".")[0] not in own]
    return without_adapters((name, sample_in(backbone, name)) for name in names)
