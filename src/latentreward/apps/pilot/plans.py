"""Pilots, read from YAML: what they need and the commands of their stages."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from latentreward.apps.steps.tasks import Step, Task, check_steps, load_yaml, resolve
from latentreward.errors import InputError, did_you_mean
from latentreward.settings.rewriting import shipped_configs
from latentreward.storage.digests import digest
from latentreward.storage.json_files import STRICT, checked

FOLDER, OURS = "pilot/", "latentreward."
CUT, TRAINED, BESIDE, MEASURED, ALIGNED, JUDGED = STAGES = (
    "cache", "train", "published", "benchmark", "align", "judged",
)  # fmt: skip
"""Stages that every pilot has; the result reads their outputs."""


@dataclass(frozen=True)
class Source:
    """Model or data set that a pilot reads, named by an environment variable."""

    __pydantic_config__ = STRICT
    licence: str  # licence or terms, see docs/licences.md
    hub: str = ""  # Hub id of the model that is taken if the variable is not set; empty for data
    data: str = ""  # data set whose folder the variable must name; empty for a model
    gigabytes: float = 0.0  # size of the download
    gated: bool = False  # whether the hub gives the model only to users who accepted its terms
    reward: bool = False  # whether the model is a published reward, whose hub id may need the name of a folder


@dataclass(frozen=True)
class Pilot:
    """Pilot with its stages."""

    __pydantic_config__ = STRICT
    name: str  # name of the YAML file
    title: str  # title in the table of models
    reward: str  # name of the reward in the table of models and among published numbers
    policy: str  # name of the aligned generator in the table of models
    pairs: int  # default number of pairs to train on
    image_bytes: int  # size of the cached latents of one image
    device: Literal["gpu", "cpu"]  # device that the trainings need
    stages: Mapping[str, Step]  # name → command, in any order; :data:`STAGES` are required
    sources: Mapping[str, Source]  # environment variable → model or data set

    def values(self) -> dict[str, str]:
        """Return variable → folder or hub id; data sets whose variable is not set are left out."""
        found = {name: os.environ.get(name) or source.hub for name, source in self.sources.items()}
        return {name: value for name, value in found.items() if value}

    def digest(self, pairs: int, seed: int, quick: bool) -> str:
        """Digest all settings of the stages; the same on every machine, wherever the sources are."""
        tasks = self.tasks(pairs, seed, quick, anywhere=True)
        return digest([repr(sorted((name, task.key) for name, task in tasks.items()))])

    def tasks(self, pairs: int, seed: int, quick: bool, anywhere: bool = False) -> dict[str, Task]:
        """Resolve all stages, each after those that it reads.

        Their keys depend on the settings and, unless ``anywhere``, on the folders and hub ids of the sources.
        """
        context = [] if anywhere else [f"{name}={value}" for name, value in sorted(self.values().items())]
        steps = {
            name: replace(step, run=tuple(argument.replace("{pairs}", str(pairs)) for argument in step.run))
            for name, step in self.stages.items()
        }
        last = [resolve(steps, name, seed, quick=quick, context=context) for name in steps]
        return {task.name: task for one in last for task in one.needed()}


def all_pilots() -> dict[str, Pilot]:
    """Read all shipped pilots by name."""
    names = [name for name in shipped_configs() if name.startswith(FOLDER) and name.count("/") == 1]
    return {pilot.name: pilot for pilot in (read_pilot(f"configs/{name}") for name in names)}


def find_pilot(name: str) -> Pilot:
    """Return a shipped pilot by its name, or one that is read from a YAML file."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return read_pilot(name)
    shipped = all_pilots()
    if name not in shipped:
        raise InputError(f"name: there is neither a pilot nor a YAML file {name!r}{did_you_mean(name, shipped)}")
    return shipped[name]


def read_pilot(path: str) -> Pilot:
    """Read and check a pilot's YAML file."""
    content, name = load_yaml(path), Path(path).stem
    if isinstance(content, Mapping) and "name" in content:
        raise InputError(f"{path}: name is that of the file; remove it")
    pilot: Pilot = checked(Pilot, {"name": name, **content} if isinstance(content, Mapping) else content, f"{name}: ")
    check_steps(f"{name}: stages", pilot.stages, also=["pairs"])
    for name, step in pilot.stages.items():
        if step.module and not step.module.startswith(OURS):  # `timeit` would run whatever text the file gives it
            raise InputError(f"{pilot.name}: stages.{name}.module is {step.module!r}; a stage runs modules of {OURS}*")
    if lacking := [name for name in STAGES if name not in pilot.stages]:
        raise InputError(f"{pilot.name}: stages lacks {', '.join(lacking)}")
    for name, source in pilot.sources.items():
        if bool(source.hub) == bool(source.data):
            raise InputError(f"{pilot.name}: sources.{name}: give either hub, for a model, or data")
    return pilot
