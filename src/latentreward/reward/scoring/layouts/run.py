"""Reading of a training checkpoint of this program as a reward model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from latentreward.core.checkpoints.base_weights import BaseSample, problem_of_record, sample, without_adapters
from latentreward.core.checkpoints.shards import check_weights, damaged, read_checkpoint
from latentreward.core.errors import InputError, errors_at, first_line
from latentreward.core.registry import backbone_names
from latentreward.core.settings.rewriting import check_yaml, rewrite_settings
from latentreward.core.storage.json_files import checked
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import ExifOrientation
from latentreward.diffusion import DiffusionBackbone
from latentreward.diffusion.backbones.tuning import check_settings
from latentreward.diffusion.backbones.weights import assign, settling_later
from latentreward.reward.heads.base import RewardHead
from latentreward.reward.scoring.files import not_dense, settings_beside
from latentreward.reward.scoring.layouts.base import Network, StoredReward
from latentreward.reward.scoring.layouts.model_folder import sizes_of
from latentreward.reward.scoring.layouts.recipe import (
    ONLY_IN_TRAINING,
    SETTINGS,
    ModelPart,
    ModelRecipe,
    backbone_part,
    build_backbone,
    build_head,
    check_class,
    check_family,
    check_masked,
    head_part,
    is_ours,
    masked,
    own_parts,
    registered_name,
)
from latentreward.reward.scoring.network import RewardNetwork

PARTS = ("backbone", "head")  # names of the settings of a run that describe the reward model


@dataclass(frozen=True)
class Content:
    """Contents of a training checkpoint that the reward model needs."""

    weights: dict[str, Tensor]  # weights of the model, by their names in the training module
    # Sampled values of the frozen weights that the checkpoint leaves out; None if it has no such record
    base: dict[str, Any] | None
    steps: int | None  # number of optimiser steps at the time of the checkpoint


class TrainedReward(StoredReward):
    """Stored reward in a checkpoint of a reward's training run, together with the settings of the run.

    Of the settings only backbone and head are used. Weights that the checkpoint leaves out are loaded from the
    backbone's ``source``.

    Without the run's ``config`` the file is looked for beside the checkpoint and one folder up; then the settings are
    read that the checkpoint of a Python script without ``latentreward fit`` contains. ``average`` takes the weights
    that the callback ``TrainableEMA`` averaged, if the checkpoint has them. ``base`` is loaded in place of the pipeline
    that the settings name. ``trusted`` settings may name classes that are not registered, and contain ``${...}`` for
    OmegaConf to resolve; see :mod:`.recipe`.
    """

    recipe: ModelRecipe

    def __init__(
        self,
        checkpoint: Path,
        config: Path | None = None,
        average: bool = True,
        base: str | None = None,
        trusted: bool = False,
    ) -> None:
        self.checkpoint, self.average = checkpoint, average
        found = config or settings_beside(checkpoint)
        self.config = found or checkpoint
        settings = noted_settings(checkpoint) if found is None else model_settings(found, trusted)
        if base is not None:
            arguments = settings["backbone"]["init_args"]
            arguments |= {"source": base, **dict.fromkeys({"revision"} & arguments.keys())}
        parts: dict[str, ModelPart] = {}
        with errors_at(f"{self.config}: model."):
            for kind in PARTS:
                name = registered_name(kind, str(settings[kind].get("class_path")))
                check_class(kind, name, trusted)
                parts[kind] = ModelPart(name, settings[kind]["init_args"])
            check_family(parts["backbone"].init_args, trusted)
        self.recipe = ModelRecipe(**parts, training=settings["training"])

    def backbone(self) -> DiffusionBackbone:
        part = self.recipe.backbone
        if is_ours(part):  # attention backend and compilation were chosen for the machine of the run
            settings = {n: v for n, v in part.init_args.items() if n == "lora" or n not in ONLY_IN_TRAINING}
            part = ModelPart(part.name, settings)
        with errors_at(f"{self.config}: model."):
            return build_backbone(part)

    @cached_property
    def _content(self) -> Content:
        """Contents of the checkpoint, read once, after a comparison with its checksums."""
        return self._reward(read_checkpoint(self.checkpoint))

    @cached_property
    def _shapes(self) -> Content:
        """Contents of the checkpoint with tensors on the meta device."""
        return self._reward(self._recorded, meta=True)

    def _reward(self, content: Mapping[str, Any], meta: bool = False) -> Content:
        """Take from a checkpoint what a reward needs; raise InputError if it is damaged, or not that of a reward.

        Args:
            content: Contents of the checkpoint.
            meta: Whether the tensors are on the meta device, so that their values are not checked.
        """
        state = dict(content["state_dict"])
        if not any(str(name).startswith("model.head.") for name in state):
            nothing = f"checkpoint {self.checkpoint} holds no weights of a reward (model.head.…)"
            raise InputError(f"{nothing}; give one that training of a reward wrote")
        callbacks, steps, base = (content.get(name) for name in ("callbacks", "global_step", "base"))
        for callback in callbacks.values() if self.average and isinstance(callbacks, Mapping) else ():
            if isinstance(callback, Mapping) and isinstance(callback.get("average"), Mapping):
                updates = callback.get("updates")
                state |= callback["average"] if isinstance(updates, int) and updates else {}
        weights = {name: tensor for name, tensor in state.items() if str(name).startswith("model.")}
        if name := not_dense(weights, meta):
            raise InputError(damaged(self.checkpoint, f"{name} is not a dense tensor"))
        if not meta and base is not None and (problem := problem_of_record(base)):
            raise InputError(damaged(self.checkpoint, f"base: {problem}"))
        return Content(weights, base, steps if type(steps) is int else None)

    @cached_property
    def _recorded(self) -> dict[str, Any]:
        """Entries of the checkpoint, read without its tensors' values."""
        return read_checkpoint(self.checkpoint, with_tensors=False)

    def _noted(self, entry: str, kind: Any) -> Any:
        """Return what the checkpoint notes of its training's pictures; no tensor is read."""
        with errors_at(f"{self.checkpoint}: "):
            return checked(kind, self._recorded.get(entry), entry)

    exif = property(lambda self: self._noted("exif", ExifOrientation))  # type: ignore[assignment]
    edits = property(lambda self: self._noted("edits", bool | None))  # type: ignore[assignment]

    @property
    def image_sizes(self) -> ImageSizes | None:  # type: ignore[override]
        """Rule for image sizes that the checkpoint notes."""
        with errors_at(f"{self.checkpoint}: image_sizes: "):
            return sizes_of(self._recorded.get("image_sizes"))

    def _fitting(self, backbone: DiffusionBackbone, kind: type[Network]) -> tuple[Network, nn.ModuleDict]:
        """Build the model with initial weights, and check that the checkpoint's names and shapes fit.

        Returns:
            The model, and a module that contains it under the name that the checkpoint's keys begin with.
        """
        state = self._shapes.weights
        with errors_at(f"{self.config}: model."):
            part = self.recipe.head
            if part.init_args.get("text_projection_source") is not None:  # its weights are in the checkpoint
                width = len(state.get("model.head.visual_projection.weight", ()))
                part = ModelPart(part.name, {**part.init_args, "text_projection_source": None, "embed_dim": width})
            head = build_head(part, backbone.feature_spec, stored=state)
        model = kind(backbone, head)
        backbone.drop_unread(head.reads_text, head.reads_temb)
        as_trained = nn.ModuleDict({"model": model})
        with errors_at(f"{self.checkpoint} with {self.config}: "):
            check_weights(as_trained, {name: tensor.shape for name, tensor in state.items()})
        return model, as_trained

    def load(self, kind: type[Network]) -> Network:
        state, recipe = self._shapes.weights, self.recipe
        lora = recipe.backbone.init_args.get("lora")
        if is_ours(recipe.backbone) and isinstance(lora, Mapping) and "rank" in lora:
            stored = [len(tensor) for name, tensor in state.items() if ".lora_A." in name]
            check_settings({"r": lora["rank"]}, stored, f"cannot load {self.config}")
        with settling_later():
            with torch.random.fork_rng(devices=[]):  # initial values are random but overwritten below
                model, as_trained = self._fitting(self.backbone(), kind)
            own = as_trained.state_dict()
            for name in state.keys() & own.keys():
                if own[name].is_floating_point() and not state[name].is_floating_point():
                    problem = f"{name} is {state[name].dtype}, expected floating point"
                    raise InputError(damaged(self.checkpoint, problem))
            assign(as_trained, self._content.weights)
        base = self._content.base
        if base is not None:
            with errors_at(f"{self.checkpoint} with {self.config}: "):
                BaseSample.of(as_trained, model.backbone.source).check(base)
        untrained = recipe.backbone.init_args.get("pretrained") is False
        own_names = own_parts(model.backbone, untrained)  # before the model is frozen
        for_scoring = ModelRecipe(
            backbone_part(recipe.backbone.name, recipe.backbone.init_args, own_names),
            head_part(model.head, recipe.head.init_args),
            own_names,
            {**recipe.training, "steps": self._content.steps},
        )
        return self.finished(model, for_scoring)

    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        head, prefix = self._fitting(backbone, RewardNetwork)[0].head, "model.head."
        state = {name.removeprefix(prefix): t for name, t in self._content.weights.items() if name.startswith(prefix)}
        head.load_state_dict(state, strict=False)  # _fitting has compared names and shapes
        return head

    def adapter(self, backbone: DiffusionBackbone) -> dict[str, Tensor]:
        prefix = f"model.backbone.{backbone.network_name}."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._content.weights.items()
            if name.startswith(prefix) and ".lora_" in name
        }

    def base_values(self) -> Mapping[str, Tensor]:
        state, base, prefix = self._content.weights, self._content.base, "model.backbone."
        values = dict(zip(base["names"], base["values"], strict=True)) if base is not None else {}
        values |= {name: sample(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
        inside = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        return dict(without_adapters(inside.items()))


def noted_settings(checkpoint: Path) -> dict[str, Any]:
    """Read the settings of a reward from the checkpoint itself, in the form that :func:`model_settings` returns.

    Interpolations ``${...}`` are not resolved.
    """
    noted = read_checkpoint(checkpoint, with_tensors=False).get(SETTINGS)
    if noted is None:
        remedy = "give the one of the reward's run as config, on the command line --run_config FILE"
        raise InputError(f"no config.yaml lies beside {checkpoint} or in the folder above it; {remedy}")
    try:
        parts = {p: {"class_path": noted[p]["class_path"], "init_args": dict(noted[p]["init_args"])} for p in PARTS}
        return json.loads(json.dumps({"training": dict(noted["training"]), **parts}))
    except (TypeError, LookupError, ValueError, RuntimeError, RecursionError) as error:
        raise InputError(f"{checkpoint}: {SETTINGS} is of another version ({first_line(error)})") from error


def model_settings(path: Path, trusted: bool = False) -> dict[str, Any]:
    """Read the settings of a reward from a run's ``config.yaml``, or from a file such as ``configs/model/*.yaml``.

    If ``trusted``, ``${...}`` in the settings of backbone and head is resolved.

    Returns:
        A dict with three keys. ``backbone`` and ``head`` hold ``class_path`` and ``init_args``. ``training`` holds
        ``module`` and ``data_module``, the class paths of the run's module and data module, and ``data``, the names of
        the readers of training pairs.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        check_yaml(text := path.read_text(encoding="utf-8"))
        run = rewrite_settings(OmegaConf.to_container(OmegaConf.load(io.StringIO(text))), backbone_names())
        model = OmegaConf.create(run if trusted else masked(run)).get("model")
        name = str(model.get("class_path") or "") if OmegaConf.is_dict(model) else ""
        arguments = (model.get("init_args") or {}) if name else {}
        parts = {part: class_and_arguments(arguments[part]) for part in PARTS if arguments.get(part)}
        check_masked(parts)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); give the config.yaml of a run") from error
    if "policy" in arguments:
        aligned = f"{name.rpartition('.')[2]}, which aligns a policy"
        raise InputError(f"{path} is of {aligned}; give a checkpoint that training of a reward wrote")
    for part in PARTS:
        if part not in parts:
            raise InputError(f"{path} names no model.init_args.{part}; give the config.yaml of a reward's run")
    data = run["data"] if isinstance(run.get("data"), Mapping) else {}
    given = data.get("init_args")
    readers = [*class_names(given.get("train"))] if isinstance(given, Mapping) else []
    read_by = readers or [*class_names({"class_path": data.get("class_path")})]
    training = {"module": name, "data_module": data.get("class_path"), "data": ", ".join(read_by) or None}
    return {"training": training, **parts}


def class_names(settings: Any) -> Iterator[str]:
    """Yield the names of all classes in nested settings, outer classes first, without their packages."""
    if isinstance(settings, Mapping):
        name = str(settings.get("class_path") or "").rpartition(".")[2]
        if name.isidentifier():
            yield name
        for value in settings.values():
            yield from class_names(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from class_names(value)


def class_and_arguments(settings: Any) -> dict[str, Any]:
    """Return class path and resolved arguments of a class in OmegaConf settings; a text is taken as the class path."""
    from omegaconf import OmegaConf

    if isinstance(settings, str):
        return {"class_path": settings, "init_args": {}}
    resolved: Any = OmegaConf.to_container(settings, resolve=True)
    return {**resolved, "init_args": dict(resolved.get("init_args") or {})}
