"""How a reward model is put together: which backbone and head, by what settings, and what of the weights is its own.

Registered classes are called with plain values; others are imported, which :mod:`.trust` must have allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from latentreward.backbones import DiffusionBackbone, LoRA, backbone_names
from latentreward.construction import Construction
from latentreward.contracts import FeatureSpec
from latentreward.errors import InputError, errors_at, first_line
from latentreward.heads import RewardHead
from latentreward.programs import find_modules_here
from latentreward.scoring.layouts.trust import guarded_imports, registered_heads, registered_name
from latentreward.settings.errors import summarise
from latentreward.settings.functions import check_functions, input_error_behind
from latentreward.settings.ranges import leaves

ONLY_IN_TRAINING = ("lora", "gradient_checkpointing", "attention_backend", "compile_blocks")
"""Settings of our own factories that do not change what a trained backbone reads."""
BUILD_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError, OSError)
"""What constructors raise over settings that do not fit."""


@dataclass(frozen=True)
class ModelPart:
    """A class or factory, and its settings.

    Attributes:
        name: Short name of what is registered, class path of anything else.
        init_args: Settings, plain values.
    """

    name: str
    init_args: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"class": self.name, "init_args": self.init_args}

    @classmethod
    def of_record(cls, name: str, record: Any) -> Self:
        """The part ``name`` of a model folder's ``config.json``.

        Raises:
            InputError: If it is none.
        """
        known = isinstance(record, Mapping) and isinstance(record.get("class"), str)
        if not known or not isinstance(record.get("init_args", {}), dict) or set(record) - {"class", "init_args"}:
            raise InputError(f'{name} is no {{"class": ..., "init_args": {{...}}}}')
        return cls(record["class"], record.get("init_args", {}))


@dataclass(frozen=True)
class ModelRecipe:
    """What must be known of a reward model beside its weights to build it again.

    Attributes:
        backbone: Factory of the backbone, with the base in ``source`` and ``revision``.
        head: Class of the head.
        own: Parts of the backbone (``unet``, ``transformer``, ``text_encoder``, or a parameter or buffer of its own)
            whose every weight belongs to the model; of the others only adapters do, and the rest comes from the base.
        training: What is known of its training: data, steps, versions.
    """

    backbone: ModelPart
    head: ModelPart
    own: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Base, with its revision; empty where the factory has one of its own."""
        source, revision = (self.backbone.init_args.get(name) for name in ("source", "revision"))
        return "" if source is None else str(source) if revision is None else f"{source}@{revision}"

    def with_own(self, own: Iterable[str]) -> Self:
        """The same where more parts of the backbone are found to be the model's own."""
        if not {*own} - {*self.own}:
            return self
        parts = in_order({*self.own, *own})
        settings = without_training(self.backbone.init_args, parts) if is_ours(self.backbone) else None
        backbone = self.backbone if settings is None else replace(self.backbone, init_args=settings)
        return replace(self, backbone=backbone, own=parts)

    def on(self, base: str, revision: str | None = None) -> Self:
        """The same on another copy of the base."""
        settings = {**self.backbone.init_args, "source": base, "revision": revision}
        if revision is None and not is_ours(self.backbone):  # a factory from elsewhere may not know the setting
            del settings["revision"]
        return replace(self, backbone=replace(self.backbone, init_args=settings))


def backbone_part(class_path: str, init_args: Mapping[str, Any], own: tuple[str, ...]) -> ModelPart:
    """The factory of a trained backbone, by settings that read its weights and train nothing."""
    factory = imported(class_path)
    path = f"{factory.__module__}.{factory.__qualname__}"
    name = registered_name("backbone", path) if path.startswith("latentreward.") else path  # others' need an import
    ours = path.startswith("latentreward.backbones.")
    return ModelPart(name, without_training(init_args, own) if ours else dict(init_args))


def without_training(init_args: Mapping[str, Any], own: tuple[str, ...]) -> dict[str, Any]:
    """Settings of our own factories without what concerns training alone."""
    settings = {name: value for name, value in init_args.items() if name not in ONLY_IN_TRAINING}
    settings["tuning"] = "full" if {"unet", "transformer"} & {*own} else "frozen"
    settings["text_encoder_tuning"] = "full" if "text_encoder" in own else "frozen"
    return settings


def recipe_in_python(backbone: DiffusionBackbone, head: RewardHead) -> ModelRecipe:
    """How to build a model again that was put together in Python, from how its backbone and head were made.

    Raises:
        InputError: If one of the two was not made from plain values.
    """
    built, made = built_from_plain_values("backbone", backbone), built_from_plain_values("head", head)
    own = own_parts(backbone, built.init_args.get("pretrained") is False)  # of which no base has any
    return ModelRecipe(backbone_part(built.class_path, built.init_args, own), head_part(head, made.init_args), own)


def built_from_plain_values(part: str, module: DiffusionBackbone | RewardHead) -> Construction:
    """How a backbone or head was made.

    Raises:
        InputError: If a file cannot tell it.
    """
    if module.built_by is None or "<locals>" in module.built_by.class_path:
        raise InputError(
            f"how the {part} {type(module).__qualname__} was made cannot be written to a file; make it from numbers, "
            "texts, lists and dictionaries, by a class or function of a module, which for a backbone has "
            "@register_backbone"
        )
    return module.built_by


def head_part(head: RewardHead, init_args: Mapping[str, Any]) -> ModelPart:
    """The class of a trained head, by settings that need nothing but its own weights."""
    kind, settings = type(head), dict(init_args)
    if settings.pop("text_projection_source", None) is not None:  # it gave the width, and the initial weights
        settings["embed_dim"] = len(head.get_submodule("visual_projection").weight)
    registered = registered_heads().get(kind.__name__) is kind
    return ModelPart(kind.__name__ if registered else f"{kind.__module__}.{kind.__qualname__}", settings)


def is_ours(backbone: ModelPart) -> bool:
    """Whether a backbone is made by a factory of this package, whose settings are known."""
    return backbone_names().get(backbone.name, "").startswith("latentreward.backbones.")


def own_parts(backbone: DiffusionBackbone, untrained: bool = False) -> tuple[str, ...]:
    """Parts of a backbone, not yet frozen, that train as a whole, or all; see :attr:`ModelRecipe.own`.

    Parameters and persistent buffers of the backbone itself, outside its networks, are among them: no base has them.
    """
    named = [name for name, weight in backbone.named_parameters() if untrained or weight.requires_grad]
    own = {name.partition(".")[0] for name in named if ".lora_" not in name} - ({"vae"} if untrained else set())
    own |= {name for name in backbone.state_dict() if "." not in name}
    return in_order(own)


def in_order(parts: Iterable[str]) -> tuple[str, ...]:
    """Names of parts, text encoders last."""
    return tuple(sorted(parts, key=lambda part: (part == "text_encoder", part)))


def build_backbone(part: ModelPart, folder: Path | None = None, **overrides: Any) -> DiffusionBackbone:
    """The backbone of a recipe, with the base's weights; under ``torch.device("meta")`` it has shapes alone.

    Args:
        part: Its factory.
        folder: Published folder, from which nothing is imported.
        overrides: Settings that replace those of a registered factory.

    Raises:
        InputError: If the settings do not fit, or the base is not to be had.
    """
    path = backbone_names().get(part.name)
    settings = {**part.init_args, **overrides}
    with errors_at("backbone: "):
        if path is None:
            return instantiated(DiffusionBackbone, part, folder)
        if isinstance(settings.get("lora"), Mapping):
            with errors_at("init_args.lora: "):
                settings["lora"] = called(LoRA, settings["lora"])
        return called(imported(path), settings)


def build_head(part: ModelPart, spec: FeatureSpec, folder: Path | None = None) -> RewardHead:
    """The head of a recipe for features of ``spec``, with initial weights.

    Args:
        part: Its class.
        spec: Features that it reads.
        folder: Published folder, from which nothing is imported.

    Raises:
        InputError: If the settings do not fit.
    """
    kind = registered_heads().get(part.name)
    with errors_at("head: "):
        if kind is None:
            return instantiated(Callable[[FeatureSpec], RewardHead], part, folder)(spec)
        return called(kind, {"spec": spec, **part.init_args})


def called(target: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """``target(**settings)``, in which whatever does not fit becomes one line."""
    try:
        return target(**settings)
    except InputError:
        raise
    except BUILD_ERRORS as error:
        raise InputError(first_line(error)) from error


def instantiated(kind: Any, part: ModelPart, folder: Path | None) -> Any:
    """An object of type ``kind`` from a class that is imported, by jsonargparse, as a run's ``config.yaml`` names it.

    Raises:
        InputError: If it lies in ``folder`` or the hub's cache, or the settings do not fit.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    settings = {"part": {"class_path": part.name, "init_args": part.init_args}}
    try:
        with guarded_imports(folder):
            find_modules_here([part.name, *(value for _, value in leaves(part.init_args))])
            parsed = parser.parse_object(settings)
            check_functions(parsed)
            return parser.instantiate(parsed)["part"]
    except (ArgumentError, ValueError, ImportError, OSError) as error:
        raise InputError(input_error_behind(error) or summarise(str(error))) from error


def imported(path: str) -> Any:
    """What a dotted path names.

    Raises:
        InputError: If it names nothing.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"class path {path!r} names nothing that can be imported ({first_line(error)})") from error
