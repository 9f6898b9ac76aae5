"""Reading and writing of a model folder's ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from typing import Annotated, Any, Self

from pydantic import Field

from latentreward import __version__
from latentreward.core.errors import InputError, did_you_mean, errors_at
from latentreward.core.storage.json_files import checked
from latentreward.data.clips import check_clips
from latentreward.data.image_sizes import ImageSizes, NearestBucket, OneSize
from latentreward.data.images import MAX_PIXELS, ExifOrientation
from latentreward.reward.scoring.calibration import Calibration
from latentreward.reward.scoring.layouts.recipe import ModelPart, ModelRecipe, called
from latentreward.reward.scoring.scoring_noise import ScoringNoise

FORMAT = "latentreward-reward-model"
VERSION = 1
IMAGE_SIZES: dict[str, type[ImageSizes]] = {"OneSize": OneSize, "NearestBucket": NearestBucket}
NEEDED = (
    *("backbone", "head", "own_weights", "adapters", "base", "noise", "image_sizes", "exif"),
    *("calibration", "training", "sha256"),
)


@dataclass(frozen=True)
class FolderConfig:
    """Contents of a model folder's ``config.json``."""

    recipe: ModelRecipe  # classes and settings of backbone and head
    adapters: tuple[str, ...]  # names of the backbone's modules that have a LoRA adapter
    noise: ScoringNoise  # default noise levels and seeds of a score
    image_sizes: ImageSizes | None = None  # rule by which images are resized; None takes the backbone's default
    # Mean and quantiles of scores on a reference set; None if the model was not calibrated
    calibration: Calibration | None = None
    trained_on: str = ""  # base pipeline that the model was trained on, with its revision; for messages
    exif: ExifOrientation = "ignore"  # whether images are turned upright by their EXIF orientation
    sha256: Mapping[str, str] = field(default_factory=dict)  # path of each file of weights in the folder → its SHA-256
    edits: bool | None = None  # whether the training's images were edits of pictures; None if not recorded

    def record(self) -> dict[str, Any]:
        """Return the contents as values for JSON; the inverse of :meth:`of_record`."""
        return {
            "format": FORMAT,
            "format_version": VERSION,
            "backbone": self.recipe.backbone.record(),
            "head": self.recipe.head.record(),
            "own_weights": list(self.recipe.own),
            "adapters": list(self.adapters),
            "base": self.trained_on,
            "noise": asdict(self.noise),
            "image_sizes": sizes_record(self.image_sizes),
            "exif": self.exif,
            **({} if self.edits is None else {"edits": self.edits}),
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "training": self.recipe.training,
            "sha256": dict(self.sha256),
            "versions": {"latentreward": __version__}
            | {package: version(package) for package in ("torch", "diffusers", "transformers", "peft")},
        }

    def text(self) -> str:
        """Return the text of the file, with one entry per line."""
        lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in self.record().items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def of_record(cls, record: Mapping[str, Any], base: str | None = None) -> Self:
        """Build the config from the contents of a ``config.json``, with the base pipeline ``base`` unless it is None.

        Raises:
            InputError: If the format is unknown or the version newer than this one, or an entry is missing or invalid.
        """
        check_version(record)
        missing = [name for name in NEEDED if name not in record]
        if missing:
            raise InputError(f"{missing[0]} is missing; download it again")
        recipe = ModelRecipe(
            ModelPart.of_record("backbone", record["backbone"]),
            ModelPart.of_record("head", record["head"]),
            names("own_weights", record["own_weights"], r"\w+"),
            checked(dict[str, Any], record["training"], "training", "download it again"),
        )
        return cls(
            recipe if base is None else recipe.on(base),
            names("adapters", record["adapters"], r"\w+(\.\w+)?"),
            settings_of("noise", ScoringNoise, record["noise"]),
            sizes_of(record["image_sizes"]),
            calibration_of(record["calibration"]),
            checked(str, record["base"], "base", "download it again"),
            checked(ExifOrientation, record["exif"], "exif"),
            checked(dict[str, str], record["sha256"], "sha256", "download it again"),
            checked(bool | None, record.get("edits"), "edits"),
        )


def check_version(record: Mapping[str, Any]) -> None:
    """Raise InputError if the file has another format, or a version that this program cannot read."""
    if record.get("format") != FORMAT:
        raise InputError(f"format is {record.get('format')!r}, not {FORMAT!r}, a reward model of latentreward")
    number = record.get("format_version")
    if not isinstance(number, int) or number < 1:
        raise InputError(f"format_version is {number!r}, no number from 1 on; download it again")
    if number > VERSION:
        raise InputError(f"format_version is {number}, but this program reads up to {VERSION}; update latentreward")


def names(entry: str, value: Any, pattern: str) -> tuple[str, ...]:
    """Return an entry that lists different names matching ``pattern``; raise InputError if it does not."""
    found: tuple[str, ...] = checked(tuple[Annotated[str, Field(pattern=f"^({pattern})$")], ...], value, entry)
    if len({*found}) < len(found):
        raise InputError(f"{entry} is {value!r}, not a list of names, each once")
    return found


def sizes_record(sizes: ImageSizes | None) -> dict[str, Any] | None:
    """Return the rule for image sizes as values for JSON; the inverse of :func:`sizes_of`.

    Raises:
        InputError: If the rule is of a class that cannot be saved, or :func:`sizes_of` would refuse it.
    """
    if sizes is None:
        return None
    if IMAGE_SIZES.get(type(sizes).__name__) is not type(sizes):
        raise InputError(f"image_sizes={sizes} cannot be saved; set a {' or '.join(IMAGE_SIZES)}")
    settings = asdict(sizes)  # type: ignore[call-overload]
    record = ModelPart(type(sizes).__name__, settings).record()
    sizes_of(record)
    return record


def sizes_of(record: Any) -> ImageSizes | None:
    """Build the rule for image sizes from its entry in ``config.json``; None for null.

    Raises:
        InputError: If the class is unknown, the settings are invalid, or a size has more than ``MAX_PIXELS`` pixels.
    """
    if record is None:
        return None
    part = ModelPart.of_record("image_sizes", record)
    if part.name not in IMAGE_SIZES:
        raise InputError(f"image_sizes: unknown class {part.name!r}{did_you_mean(part.name, IMAGE_SIZES)}")
    settings = {name: frozen(value) for name, value in part.init_args.items()}
    sizes = settings_of("image_sizes", IMAGE_SIZES[part.name], settings)
    for height, width in sizes.buckets if isinstance(sizes, NearestBucket) else [(sizes.height, sizes.width)]:
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            raise InputError(f"image_sizes: {height}x{width} is not a size from 1 to {MAX_PIXELS} pixels")
    if isinstance(sizes, OneSize):
        check_clips("image_sizes.", sizes.frames, sizes.fps)
    settings_of("image_sizes", sizes.loader, {"height": 100, "width": 100})  # raises if there is no bucket
    return sizes


def calibration_of(record: Any) -> Calibration | None:
    """Build the calibration from its entry in ``config.json``, None for null; raise InputError if it is damaged."""
    if record is None:
        return None
    expected = sorted(field.name for field in fields(Calibration))
    if not isinstance(record, Mapping) or sorted(record) != expected:
        raise InputError(f"calibration: expected the entries {', '.join(expected)}")
    settings = {name: frozen(value) for name, value in record.items()}
    settings["noise"] = settings_of("calibration.noise", ScoringNoise, record["noise"])
    return settings_of("calibration", Calibration, settings)


def frozen(value: Any) -> Any:
    """Convert a list to a tuple, and nested lists too; other values are returned unchanged."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def settings_of(entry: str, kind: Any, settings: Any) -> Any:
    """Call ``kind`` with the settings of an entry; raise InputError if it rejects them, or they are no mapping."""
    if not isinstance(settings, Mapping):
        raise InputError(f"{entry} is {settings!r}, not a mapping of settings")
    with errors_at(f"{entry}: "):
        return called(kind, settings)
