"""Recipe of a reward model: classes and settings of backbone and head, from which the model is built again.

Classes that a file names must pass :func:`check_class` before they are built here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor

from latentreward.core.contracts import FeatureSpec
from latentreward.core.errors import InputError, did_you_mean, errors_at, first_line, where
from latentreward.core.public_names import public_names
from latentreward.core.registry import Construction, backbone_names, find_modules_here, of_this_package
from latentreward.core.settings.errors import leaves
from latentreward.core.settings.functions import reworded
from latentreward.core.storage.json_files import STRICT, check_arguments
from latentreward.diffusion import DiffusionBackbone, LoRA, import_family, is_foreign
from latentreward.diffusion.backbones.loading import SHIPPED
from latentreward.reward.heads.base import RewardHead

ONLY_IN_TRAINING = ("lora", "gradient_checkpointing", "attention_backend", "quantization")
"""Settings of this package's factories that do not change the features of a trained backbone."""
BUILD_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError, OSError)
"""Errors by which constructors reject settings."""
SETTINGS = "reward_settings"
"""Key of a checkpoint with the settings of backbone and head, for runs without a ``config.yaml``."""
SMALL = 10_000_000
"""Number of weights up to which a head is built whatever its file holds; comparing names and shapes refuses it."""
REMEDY = (
    "if you trust its author, give --trust_remote_code=true (in a YAML trust_remote_code: true beside its path, "
    "in Python trust_remote_code=True)"
)


@dataclass(frozen=True)
class ModelPart:
    """Class or factory with its settings."""

    __pydantic_config__ = STRICT
    # Short name of a registered class or factory; import path of any other
    name: Annotated[str, Field(alias="class")]
    init_args: dict[str, Any] = field(default_factory=dict)  # settings, in types that JSON has

    def record(self) -> dict[str, Any]:
        """Return the part as values for JSON."""
        return {"class": self.name, "init_args": self.init_args}


@dataclass(frozen=True)
class ModelRecipe:
    """All that is needed beside the weights to build a reward model again."""

    backbone: ModelPart  # factory of the backbone; ``source`` and ``revision`` in its settings name the base pipeline
    head: ModelPart  # class of the head
    # Names of the backbone's modules, parameters and buffers that the model stores in full (``unet``, ``transformer``,
    # ``text_encoder``, ...). Of all other modules the model stores only LoRA adapters; their pretrained weights come
    # from the base pipeline
    own: tuple[str, ...] = ()
    # Information on the training for the model card: module, data, steps
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Base pipeline as ``source`` or ``source@revision``; empty if the factory's settings name none."""
        source, revision = (self.backbone.init_args.get(name) for name in ("source", "revision"))
        return "" if source is None else str(source) if revision is None else f"{source}@{revision}"

    @property
    def local_name(self) -> str:
        """Base pipeline if it is the bare name of a local folder, which means nothing elsewhere; otherwise empty."""
        source = str(self.backbone.init_args.get("source") or "")
        return "" if "/" in source or source in SHIPPED else source

    def with_own(self, own: Iterable[str]) -> Self:
        """Return a recipe with more names in :attr:`own`, and the backbone's tuning settings changed accordingly."""
        if {*own} <= {*self.own}:
            return self
        parts = in_order({*self.own, *own})
        backbone = self.backbone
        if is_ours(backbone):
            backbone = replace(backbone, init_args=without_training(backbone.init_args, parts))
        return replace(self, backbone=backbone, own=parts)

    def on(self, base: str, revision: str | None = None) -> Self:
        """Return a copy whose base pipeline is the folder or hub id ``base`` at ``revision`` (None: default)."""
        settings = {**self.backbone.init_args, "source": base, "revision": revision}
        if revision is None and not is_ours(self.backbone):  # another package's factory may lack this parameter
            del settings["revision"]
        return replace(self, backbone=replace(self.backbone, init_args=settings))


def backbone_part(name: str, init_args: Mapping[str, Any], own: tuple[str, ...]) -> ModelPart:
    """Return factory and settings that rebuild a trained backbone for scoring, from a short name or import path."""
    factory = imported(backbone_names().get(name, name))
    path = f"{factory.__module__}.{factory.__qualname__}"
    # A plug-in's short name is known only after its module was imported; its path works in any process.
    name = registered_name("backbone", path) if of_this_package(path) else path
    part = ModelPart(name, dict(init_args))
    return replace(part, init_args=without_training(init_args, own)) if is_ours(part) else part


def without_training(init_args: Mapping[str, Any], own: tuple[str, ...]) -> dict[str, Any]:
    """Return settings of one of this package's factories for scoring: no LoRA, and ``full`` tuning of ``own``."""
    settings = {name: value for name, value in init_args.items() if name not in ONLY_IN_TRAINING}
    settings["tuning"] = "full" if {"unet", "transformer"} & {*own} else "frozen"
    settings["text_encoder_tuning"] = "full" if "text_encoder" in own else "frozen"
    return settings


def recipe_in_python(backbone: DiffusionBackbone, head: RewardHead) -> ModelRecipe:
    """Return the recipe of a model that was built in Python; raise InputError if a part has no record of its call."""
    built, made = built_from_plain_values("backbone", backbone), built_from_plain_values("head", head)
    own = own_parts(backbone, built.init_args.get("pretrained") is False)
    return ModelRecipe(backbone_part(built.class_path, built.init_args, own), head_part(head, made.init_args), own)


def built_from_plain_values(part: str, module: DiffusionBackbone | RewardHead) -> Construction:
    """Return the recorded call that built a part; raise InputError without one that can be imported by name."""
    if module.built_by is None or "<locals>" in module.built_by.class_path:
        raise InputError(
            f"how the {part} {type(module).__qualname__} was made cannot be written to a file; make it from numbers, "
            "texts, lists and dictionaries, with a class or function that can be imported from a module (for a "
            "backbone: one with @register_backbone)"
        )
    return module.built_by


def head_part(head: RewardHead, init_args: Mapping[str, Any]) -> ModelPart:
    """Return class and settings that rebuild a trained head without reading other files than its own weights."""
    kind, settings = type(head), dict(init_args)
    if settings.pop("text_projection_source", None) is not None:  # it set the width and the initial weights
        settings["embed_dim"] = len(head.get_submodule("visual_projection").weight)
    path = f"{kind.__module__}.{kind.__qualname__}"
    return ModelPart(kind.__name__ if head_paths().get(kind.__name__) == path else path, settings)


def is_ours(backbone: ModelPart) -> bool:
    """Tell whether a backbone's factory belongs to this package, so that its settings are known here."""
    return of_this_package(backbone_names().get(backbone.name))


def own_parts(backbone: DiffusionBackbone, untrained: bool = False) -> tuple[str, ...]:
    """Return the names of a backbone's modules that the model must store in full; see :attr:`ModelRecipe.own`.

    These are the modules with trainable weights other than LoRA, so that this must be called before the backbone is
    frozen. Parameters and persistent buffers of the backbone itself are included, because no base pipeline has them.
    ``untrained`` is whether the backbone started without pretrained weights (``pretrained=False``): no base has its
    weights then, and every module but the VAE is included.
    """
    named = [name for name, weight in backbone.named_parameters() if untrained or weight.requires_grad]
    own = {name.partition(".")[0] for name in named if ".lora_" not in name} - ({"vae"} if untrained else set())
    return in_order(own | {name for name in backbone.state_dict() if "." not in name})


def in_order(parts: Iterable[str]) -> tuple[str, ...]:
    """Return names of modules in alphabetical order, with ``text_encoder`` last."""
    return tuple(sorted(parts, key=lambda part: (part == "text_encoder", part)))


def build_backbone(part: ModelPart, folder: Path | None = None, **overrides: Any) -> DiffusionBackbone:
    """Build the backbone of a recipe with the base pipeline's weights; on the meta device it has shapes alone.

    ``overrides`` replace settings of a registered factory. Nothing may be imported from ``folder``, the model's.
    """
    path = backbone_names().get(part.name)
    settings = {**part.init_args, **overrides}
    with errors_at("backbone: "):
        if path is None:
            return instantiated(DiffusionBackbone, part, folder)
        if isinstance(settings.get("lora"), Mapping):
            with errors_at("init_args.lora: "):
                settings["lora"] = called(LoRA, settings["lora"])
        if is_foreign(family := settings.get("family")):
            with guarded_imports(folder):
                import_family(family)
        return called(imported(path), settings)


def build_head(
    part: ModelPart, spec: FeatureSpec, folder: Path | None = None, stored: Mapping[str, Tensor] | None = None
) -> RewardHead:
    """Build the head of a recipe with initial weights; raise InputError if the class rejects the settings.

    Nothing may be imported from ``folder``, the model's. ``stored`` are the weights that the head is going to load, by
    name, if there are any yet: a registered class then allocates no memory for a head that is far larger.
    """
    path = head_paths().get(part.name)
    with errors_at("head: "):
        if path is None:
            return instantiated(Callable[[FeatureSpec], RewardHead], part, folder)(spec)
        kind, settings = imported(path), {"spec": spec, **part.init_args}
        if stored is not None:
            if settings.get("text_projection_source") is not None:  # its weights are among the stored ones
                width = len(stored.get("visual_projection.weight", ()))
                settings |= {"text_projection_source": None, "embed_dim": width}
            with torch.device("meta"):
                numbers = sum(weight.numel() for weight in called(kind, settings).state_dict().values())
            if numbers > SMALL + 4 * (held := sum(weight.numel() for weight in stored.values())):
                raise InputError(f"its settings make {numbers} weights, but the file holds {held}")
        return called(kind, settings)


def called(target: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """Call ``target(**settings)``, and turn an error about the settings into a one-line InputError."""
    with build_errors():
        check_arguments(target, settings)
        return target(**settings)


@contextmanager
def build_errors(place: str = "") -> Iterator[None]:
    """Turn an error about settings inside the block into a one-line InputError that begins with ``place``."""
    try:
        yield
    except InputError:
        raise
    except BUILD_ERRORS as error:
        raise InputError(f"{place}{first_line(error)}{where(error)}") from error


def instantiated(kind: Any, part: ModelPart, folder: Path | None) -> Any:
    """Import and build a class that is not registered, with jsonargparse, as from a run's ``config.yaml``."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    settings = {"part": {"class_path": part.name, "init_args": part.init_args}}
    try:
        with guarded_imports(folder):
            find_modules_here([part.name, *(value for _, value in leaves(part.init_args))])
            return parser.instantiate(parser.parse_object(settings))["part"]
    except (ArgumentError, ValueError, ImportError, OSError) as error:
        raise InputError(reworded(error)) from error


def imported(path: str) -> Any:
    """Import the class or function with the import path ``path``; raise InputError if it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"class path {path!r} cannot be imported ({first_line(error)}){where(error)}") from error


def head_paths() -> dict[str, str]:
    """Return the import path of each head class that ``latentreward.reward`` exports, by name; none is imported."""
    found = {name: f"{module}.{name}" for name, module in public_names().items() if ".reward.heads." in f"{module}."}
    return {name: path for name, path in found.items() if name.endswith("Head") and name != RewardHead.__name__}


def registered_name(kind: str, class_path: str) -> str:
    """Return the registered name for an import path of a registered class; any other path is returned unchanged."""
    known = backbone_names() if kind == "backbone" else head_paths()
    package, _, last = class_path.rpartition(".")
    if package.startswith("latentreward.") and last in known:  # also by a path of an earlier version
        return last
    return {path: name for name, path in known.items()}.get(class_path, class_path)


def check_class(kind: str, part: ModelPart, trusted: bool) -> None:
    """Raise InputError if a part names a class that is not registered, unless ``trusted``; nothing is imported."""
    known = backbone_names() if kind == "backbone" else head_paths()
    if part.name not in known:
        if "." not in part.name:
            raise InputError(f"{kind}: unknown class {part.name!r}{did_you_mean(part.name, known)}")
        if not trusted:
            raise InputError(f"{kind}: class {part.name!r} is not registered and would be imported; {REMEDY}")
    family = part.init_args.get("family") if kind == "backbone" else None
    if not isinstance(family, str | None):
        raise InputError(f"backbone: family={family!r:.80} is no import path; get the model again")
    if not trusted and is_foreign(family):
        raise InputError(f"backbone: family {family!r} is not of this package and would be imported; {REMEDY}")


class FolderGuard:
    """Import hook that raises InputError for modules in the given folders and leaves all others to Python's finders."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = [folder.resolve() for folder in folders]

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Raise InputError if the module ``name`` would be imported from one of the folders."""
        spec = PathFinder.find_spec(name, path, target)
        folders = () if spec is None else spec.submodule_search_locations or ()
        files = [spec and spec.origin, *(f"{folder}/*" for folder in folders)]
        for place in (Path(file).parent.resolve() for file in files if file):  # resolve: the hub's cache holds links
            if any(place.is_relative_to(folder) for folder in self.folders):
                raise InputError(f"module {name!r} lies in {place}, beside a model that came from others; install it")


@contextmanager
def guarded_imports(folder: Path | None = None) -> Iterator[None]:
    """Raise InputError for imports from ``folder`` or the hub's cache inside the block, wherever ``sys.path`` leads."""
    from huggingface_hub import constants

    guard = FolderGuard([Path(constants.HF_HUB_CACHE), *([] if folder is None else [folder])])
    sys.meta_path.insert(0, guard)
    try:
        yield
    finally:
        sys.meta_path.remove(guard)
