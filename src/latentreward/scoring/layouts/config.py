"""``config.json`` of a model folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Self, get_args

from latentreward.data.images import ExifOrientation
from latentreward.errors import InputError, did_you_mean
from latentreward.scoring.calibration import Calibration
from latentreward.scoring.image_sizes import ImageSizes, NearestBucket, OneSize
from latentreward.scoring.layouts.recipe import ModelPart, ModelRecipe
from latentreward.scoring.scoring_noise import ScoringNoise

FORMAT = "latentreward-reward-model"
VERSION = 1
PACKAGES = ("latentreward", "torch", "diffusers", "transformers", "peft")
"""Packages whose versions are noted."""
IMAGE_SIZES: dict[str, type[ImageSizes]] = {"OneSize": OneSize, "NearestBucket": NearestBucket}
NEEDED = ("backbone", "head", "own_weights", "adapters", "base", "noise", "image_sizes", "calibration", "training")


@dataclass(frozen=True)
class FolderConfig:
    """What a model folder says beside its weights.

    Attributes:
        recipe: Backbone and head.
        adapters: Parts of the backbone that have an adapter, by their names in it.
        noise: Levels and draws of a score where none are given.
        image_sizes: To which size images are brought; None leaves it to the backbone.
        calibration: On a reference set, if there is one.
        exif: Whether images are turned upright by EXIF; folders of earlier versions do not say, and were trained
            ignoring it.
        trained_on: Base that the model was trained on, with its revision; for messages.
    """

    recipe: ModelRecipe
    adapters: tuple[str, ...]
    noise: ScoringNoise
    image_sizes: ImageSizes | None = None
    calibration: Calibration | None = None
    trained_on: str = ""
    exif: ExifOrientation = "ignore"

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sizes = self.image_sizes
        if sizes is not None and IMAGE_SIZES.get(type(sizes).__name__) is not type(sizes):
            raise InputError(
                f"image_sizes={sizes} is no {' or '.join(IMAGE_SIZES)} and cannot be saved; set one of them"
            )
        return {
            "format": FORMAT,
            "format_version": VERSION,
            "backbone": self.recipe.backbone.record(),
            "head": self.recipe.head.record(),
            "own_weights": list(self.recipe.own),
            "adapters": list(self.adapters),
            "base": self.trained_on,
            "noise": asdict(self.noise),
            "image_sizes": None if sizes is None else ModelPart(type(sizes).__name__, asdict(sizes)).record(),  # type: ignore[call-overload]
            "exif": self.exif,
            "calibration": None if self.calibration is None else self.calibration.record(),
            "training": self.recipe.training,
            "versions": {package: version(package) for package in PACKAGES},
        }

    def text(self) -> str:
        """The file: a line for each entry."""
        lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in self.record().items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def of_record(cls, record: Mapping[str, Any], base: str | None = None) -> Self:
        """The config behind a :meth:`record`, on another copy of the base if ``base`` is given.

        Raises:
            InputError: If it is of another format or a newer version, or an entry is missing or of another kind.
        """
        check_version(record)
        missing = [name for name in NEEDED if name not in record]
        if missing:
            raise InputError(f"{missing[0]} is missing; download it again")
        recipe = ModelRecipe(
            ModelPart.of_record("backbone", record["backbone"]),
            ModelPart.of_record("head", record["head"]),
            names("own_weights", record["own_weights"], r"\w+"),
            record["training"] if isinstance(record["training"], dict) else {},
        )
        noise, calibration = record["noise"], record["calibration"]
        return cls(
            recipe if base is None else recipe.on(base),
            names("adapters", record["adapters"], r"\w+(\.\w+)?"),
            settings_of("noise", ScoringNoise, noise),
            sizes_of(record["image_sizes"]),
            None if calibration is None else Calibration.of_record(calibration),
            str(record["base"]),
            exif_of(record.get("exif", "ignore")),
        )


def check_version(record: Mapping[str, Any]) -> None:
    """Raise InputError if this version cannot read the format."""
    if record.get("format") != FORMAT:
        raise InputError(f"format is {record.get('format')!r}, not {FORMAT!r}: this is no reward model of latentreward")
    number = record.get("format_version")
    if not isinstance(number, int) or number < 1:
        raise InputError(f"format_version is {number!r}; download it again")
    if number > VERSION:
        raise InputError(
            f"format_version is {number}, but this latentreward reads up to {VERSION}; update latentreward"
        )


def exif_of(value: Any) -> ExifOrientation:
    """The entry ``exif``.

    Raises:
        InputError: If it is neither ``apply`` nor ``ignore``.
    """
    if value not in get_args(ExifOrientation):
        raise InputError(f"exif is {value!r}, neither apply nor ignore")
    return value


def names(entry: str, value: Any, pattern: str) -> tuple[str, ...]:
    """A list of names, each of which matches ``pattern``.

    Raises:
        InputError: If it is none.
    """
    known = isinstance(value, list) and all(isinstance(name, str) and re.fullmatch(pattern, name) for name in value)
    if not known or len({*value}) < len(value):
        raise InputError(f"{entry} is {value!r}, no list of names, each once")
    return tuple(value)


def sizes_of(record: Any) -> ImageSizes | None:
    """The rule for image sizes behind a record.

    Raises:
        InputError: If it is of no known class.
    """
    if record is None:
        return None
    part = ModelPart.of_record("image_sizes", record)
    if part.name not in IMAGE_SIZES:
        raise InputError(f"image_sizes: unknown class {part.name!r}{did_you_mean(part.name, IMAGE_SIZES)}")
    settings = {name: frozen(value) for name, value in part.init_args.items()}
    sizes = settings_of("image_sizes", IMAGE_SIZES[part.name], settings)
    settings_of("image_sizes", sizes.loader, {"height": 100, "width": 100})  # shows that the numbers are some
    return sizes


def frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def settings_of(entry: str, kind: Any, settings: Any) -> Any:
    """``kind`` called with the settings of an entry, in which whatever does not fit becomes one line."""
    if not isinstance(settings, Mapping):
        raise InputError(f"{entry} is {settings!r}, no settings")
    try:
        return kind(**settings)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{entry}: {error}") from error
