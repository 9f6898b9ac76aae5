"""Model folder, this program's own layout of a reward model: all weights but the pretrained ones of the base pipeline.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from latentreward import __version__
from latentreward.core.checkpoints.base_weights import VALUES, same_values, sample_in, without_adapters
from latentreward.core.errors import InputError, did_you_mean, errors_at
from latentreward.core.storage.digests import check_hash
from latentreward.core.storage.json_files import STRICT, checked, read_config
from latentreward.core.storage.weight_files import map_weights
from latentreward.data.clips import check_clips
from latentreward.data.image_sizes import ImageSizes, NearestBucket, OneSize
from latentreward.data.images import MAX_PIXELS, ExifOrientation
from latentreward.diffusion import DiffusionBackbone
from latentreward.diffusion.backbones.weights import assign, settling_later
from latentreward.reward.heads.base import RewardHead
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
from latentreward.reward.scoring.layouts.base import Network, StoredReward
from latentreward.reward.scoring.layouts.recipe import (
    ONLY_IN_TRAINING,
    ModelPart,
    ModelRecipe,
    build_backbone,
    build_head,
    called,
    check_class,
    check_family,
    is_ours,
)
from latentreward.reward.scoring.scoring_noise import Calibration, ScoringNoise

FORMAT = "latentreward-reward-model"
VERSION = 1
IMAGE_SIZES: dict[str, type[ImageSizes]] = {"OneSize": OneSize, "NearestBucket": NearestBucket}


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
        ours = {"backbone": self.backbone.record(), "head": self.head.record()}
        versions = {package: version(package) for package in ("torch", "diffusers", "transformers", "peft")}
        record = {
            "format": FORMAT,
            "format_version": VERSION,
            **asdict(self),
            **ours,
            "image_sizes": sizes_record(self.image_sizes),
            "versions": {"latentreward": __version__, **versions},
        }
        lines = (f"  {json.dumps(n)}: {json.dumps(v)}" for n, v in record.items() if (n, v) != ("edits", None))
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def of_record(cls, record: Mapping[str, Any], base: str | None = None) -> Self:
        """Build the config from the contents of a ``config.json``, on the pipeline ``base`` unless that is None."""
        check_version(record)
        entries = [one.name for one in fields(cls)]
        if missing := [name for name in entries if name not in record and name != "edits"]:
            raise InputError(f"{missing[0]} is missing; download it again")
        # Entries that a later version adds under the same number are not needed.
        config = checked(cls, {name: record[name] for name in entries if name in record}, remedy="download it again")
        with errors_at("image_sizes: "):
            config = replace(config, image_sizes=sizes_of(config.image_sizes))
        return config if base is None else replace(config, backbone=config.recipe.on(base).backbone)


def check_version(record: Mapping[str, Any]) -> None:
    """Raise InputError if the file has another format, or a version that this program cannot read."""
    if record.get("format") != FORMAT:
        raise InputError(f"format is {record.get('format')!r}, not {FORMAT!r}, a reward model of latentreward")
    number = checked(PositiveInt, record.get("format_version"), "format_version", "download it again")
    if number > VERSION:
        raise InputError(f"format_version is {number}, but this program reads up to {VERSION}; update latentreward")


CONFIG, HEAD, BACKBONE, BASE = "config.json", "head.safetensors", "backbone.safetensors", "base.safetensors"


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
    """Stored reward in a folder that :meth:`~latentreward.reward.RewardModel.save_pretrained` wrote.

    ``base`` is loaded in place of the base pipeline that ``config.json`` names; its weights must be equal. ``trusted``
    is whether ``config.json`` may name classes that are not registered; see :mod:`.recipe`.
    """

    recipe: ModelRecipe

    def __init__(self, folder: Path, base: str | None = None, trusted: bool = False) -> None:
        self.folder = existing_folder(folder, CONFIG, HEAD, BASE)
        path = folder / CONFIG
        try:
            self.config = config = FolderConfig.of_record(read_config(path), base)
            check_class("backbone", config.recipe.backbone.name, trusted)
            check_class("head", config.recipe.head.name, trusted)
            check_family(config.recipe.backbone.init_args, trusted)
        except InputError as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        self.recipe, self.exif, self.image_sizes = config.recipe, config.exif, config.image_sizes
        self.edits = config.edits
        adapters = {*adapter_folders(self.config.adapters).values()}
        for name in sorted(adapters):
            existing_folder(folder / name, "adapter_config.json", ADAPTER_WEIGHTS)
        if self.recipe.own:
            existing_folder(folder, BACKBONE)
        wanted = adapters | ({BACKBONE} if self.recipe.own else set())
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

    def backbone(self) -> DiffusionBackbone:
        recipe = self.recipe
        self.check_base_is_here()
        with errors_at(f"{self.folder / CONFIG}: "):
            for name in ONLY_IN_TRAINING:
                if is_ours(recipe.backbone) and name in recipe.backbone.init_args:
                    raise InputError(f"backbone.init_args.{name} is for training alone; remove it")
            # The base's weights are not read, nor need they be there, if the folder stores all networks.
            given = {"pretrained": False} if self._stores_networks else {}
            backbone = build_backbone(recipe.backbone, self.folder, **given)
        backbone.requires_grad_(False)
        modules = {name for name, _ in backbone.named_modules()}
        known = modules | {*backbone.state_dict()}
        if unknown := [*({*self.config.adapters} - modules), *({*recipe.own} - known)]:
            raise InputError(f"{self.folder / CONFIG}: the backbone has no part {unknown[0]!r}")
        for name, place in adapter_folders(self.config.adapters).items():
            network = backbone.get_submodule(name)
            if not lora_layers(network):
                inject_adapter(network, self.folder / place)
            for adapter in names_in_file(network).values():
                network.get_parameter(adapter).requires_grad_(True)
        for name, weight in backbone.named_parameters():
            weight.requires_grad_(weight.requires_grad or name.partition(".")[0] in recipe.own)
        if adapters_of(backbone) != self.config.adapters:
            raise InputError(
                f"{self.folder / CONFIG}: the backbone has adapters in {list(adapters_of(backbone))}, but the folder "
                f"holds {list(self.config.adapters)}"
            )
        return backbone

    def check_base_is_here(self) -> None:
        """Raise InputError if the base is the name of a folder on the author's machine, which does not exist here."""
        recipe = self.recipe
        if is_ours(recipe.backbone) and recipe.local_name and not Path(recipe.local_name).exists():
            raise InputError(
                f"{self.folder / CONFIG}: the base {recipe.local_name!r} is the name of a folder of whoever published "
                "the model; give your copy as --base FOLDER (in Python base=FOLDER)"
            )

    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        stored = read_safetensors(self._intact(HEAD))
        with errors_at(f"{self.folder / CONFIG}: "):
            head = build_head(self.recipe.head, backbone.feature_spec, self.folder, stored)
        load_exactly(head, stored, self.folder / HEAD)
        return head

    def load(self, kind: type[Network]) -> Network:
        adapters = {name: f"{at}/{ADAPTER_WEIGHTS}" for name, at in adapter_folders(self.config.adapters).items()}
        # Initial values are random but overwritten below.
        with torch.random.fork_rng(devices=[]), settling_later(undrawn=self._stores_networks):
            backbone = self.backbone()
            model = kind(backbone, self.head(backbone))
            if self.recipe.own:
                weights = map_weights([path := self._intact(BACKBONE)])
                compare_tensors(dict(own_weights(backbone, self.recipe.own)), weights, path)
                assign(backbone, weights)
        self._check_base(backbone)
        for name, file in adapters.items():
            network = backbone.get_submodule(name)
            fill_adapter(network, read_lora(self._intact(file).parent, network))
        backbone.drop_unread(model.head.reads_text, model.head.reads_temb)
        calibration, axes = self.config.calibration, model.head.axis_weights
        if calibration is not None and calibration.axes != axes:
            logging.getLogger(__name__).warning(
                "%s: the calibration is of scores with the axes weighed %s, and these are %s now; it is left out, "
                "publish calibrates again", self.folder, list(calibration.axes or ()), list(axes or ()),
            )  # fmt: skip
            calibration = None
        model.noise, model.calibration = self.config.noise, calibration
        return self.finished(model, self.recipe)

    def _check_base(self, backbone: DiffusionBackbone) -> None:
        """Compare the base's weights with ``base.safetensors``; raise InputError if one is missing or differs."""
        recorded, path = self.base_values(), self.folder / BASE
        ours, factory = dict(base_samples(backbone, self.recipe.own)), self.recipe.backbone
        random = "" if is_ours(factory) else f", unless {factory.name} draws it at random at each start"
        for kind, names in (("lacks", recorded.keys() - ours), ("has another weight,", ours.keys() - recorded.keys())):
            if names:
                raise InputError(
                    f"{path}: the base {backbone.source or self.recipe.source!r} {kind} {min(names)} "
                    f"({len(names)} in all); give the base that the model was trained on as base"
                )
        for name, values in recorded.items():
            if values.shape != (VALUES,) or not same_values(ours[name], values):
                raise InputError(
                    f"{path}: the model belongs to the base {self.config.base or 'of its backbone'}, whose "
                    f"{name} differs from that of {backbone.source or 'this one'}; give that base as base{random}"
                )

    def adapter(self, backbone: DiffusionBackbone) -> dict[str, Tensor]:
        place = adapter_folders(self.config.adapters).get(backbone.network_name)
        if place is None:
            return {}
        network = backbone.get_submodule(backbone.network_name)
        return read_lora(self._intact(f"{place}/{ADAPTER_WEIGHTS}").parent, network)

    def base_values(self) -> Mapping[str, Tensor]:
        return read_safetensors(self._intact(BASE))


def adapter_folders(parts: Sequence[str]) -> dict[str, str]:
    """Return the folder name of each module's adapter.

    It is ``adapter`` for the first of the backbone's own modules, and ``adapter_NAME`` for others.
    """
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
