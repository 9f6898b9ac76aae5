"""Which golden cases there are, which files belong to them, and what of them the tests have read.

The set lies in the folder named by ``LATENTREWARD_GOLDEN_DIR`` (default: ``data`` beside this file), with sub-folders
``lpo``, ``dina``, ``algos``, ``algos2`` and ``editing``. A case is found by its JSON file, whatever its seed, shape or
options:

* ``lpo``: the group is the two digits after ``case``; ``caseNN*/data.json`` with everything in that folder, or a file
  ``caseNN*.json`` with the files of the same stem, and with tensor files of the group that have no JSON.
* ``algos``, ``algos2``, ``editing``: ``*.json`` with the tensor file of the same stem; each is a group.
* ``dina``: the patterns of :data:`DINA_CASES`, with the files of the same stem, those the JSON names under keys that
  end in ``_file`` or ``_dir``, and all files of a folder that a case has to itself.

Every test reads through :class:`Case`, which keeps a record; ``test_accounting.py`` compares it with the folder.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(os.environ.get("LATENTREWARD_GOLDEN_DIR") or Path(__file__).with_name("data")).resolve()
COVERED = (
    "lpo/01",
    "lpo/02",
    "lpo/03",
    "lpo/04",
    "lpo/05",
    "lpo/06",
    "lpo/07",
    "lpo/08",
    "lpo/09",
    "lpo/10",
    "lpo/11",
    "lpo/12",
    "lpo/13",
    "dina/head",
    "dina/backbone",
    "dina/loss",
    "dina/noise",
    "dina/metric",
    "dina/prompt",
    "dina/dataset",
    "algos/advantages",
    "algos/awm_loss",
    "algos/drm_head",
    "algos/euphonium",
    "algos/grpo_losses",
    "algos/linear_dpo",
    "algos/nft_loss",
    "algos/nft_schedule",
    "algos/sde_steps",
    "algos/tp_grpo",
    "algos/pavrm_head",
    "algos/tie_losses",
    "algos2/distillation",
    "algos2/group_preference",
    "algos2/opsd",
    "algos2/pnapo",
    "algos2/pruning",
    "algos2/ram",
    "editing/kontext",
    "editing/klein",
    "editing/qwen_edit",
    "editing/qwen_edit_zero_cond_t",
    "editing/ip2p",
    "editing/sizes",
)
DINA_CASES = {
    "head": ("*.json",),
    "backbone": ("*/case.json",),
    "loss": ("losses_*.json",),
    "noise": ("noising*.json", "timestep_sampling*.json"),
    "metric": ("metrics*.json", "vae*.json"),
    "prompt": ("prompt_encoding*.json",),
    "dataset": ("expected.json",),
}
ALGOS = ("algos", "algos2", "editing")
SHARED_FOLDERS = {"prompt": ("clip_l", "clip_g", "t5")}
TENSOR_FILES = (".safetensors", ".npz")

FILES_READ: set[Path] = set()
"""Files that a test has read, or handed to one of the library's loaders."""

TENSORS_READ: dict[Path, set[str]] = {}
"""Names that a test has looked up, for each tensor file of a case."""


class Tensors(Mapping[str, Tensor]):
    """The arrays of one file; looking one up is recorded."""

    def __init__(self, path: Path) -> None:
        self._path, self._tensors = path, dict(_load_arrays(path))
        FILES_READ.add(path)
        TENSORS_READ.setdefault(path, set())

    def __getitem__(self, name: str) -> Tensor:
        TENSORS_READ[self._path].add(name)
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __len__(self) -> int:
        return len(self._tensors)

    def below(self, prefix: str) -> list[str]:
        """What follows ``prefix`` in the names that start with it."""
        return [name.removeprefix(prefix) for name in self if name.startswith(prefix)]


@cache
def _load_arrays(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class Case:
    """One golden case: its JSON file and what belongs to it."""

    group: str
    path: Path
    files: frozenset[Path]

    @property
    def name(self) -> str:
        """Path below the set's folder, without the JSON's suffix."""
        return str(self.path.relative_to(ROOT).with_suffix(""))

    @property
    def options(self) -> dict[str, Any]:
        """The JSON file."""
        return json.loads(self.file(self.path.name).read_text())

    def tensors(self) -> Tensors:
        """The tensor file beside the JSON."""
        for suffix in TENSOR_FILES:
            if self.path.with_suffix(suffix) in self.files:
                return Tensors(self.path.with_suffix(suffix))
        raise FileNotFoundError(f"{self.name} has no {' or '.join(TENSOR_FILES)} beside its JSON")

    def file(self, name: str) -> Path:
        """A file beside the JSON, counted as read."""
        path = _inside(self.path.parent, name)
        assert path in self.files, f"{self.name}: {name} is missing or belongs to no case"
        FILES_READ.add(path)
        return path

    def folder(self, name: str) -> Path:
        """A folder beside the JSON that one of the library's loaders takes, its config and weights counted as read."""
        folder = _inside(self.path.parent, name)
        FILES_READ.update(path for path in self.files if path.parent == folder and _is_model_file(path))
        return folder


def _inside(folder: Path, name: str) -> Path:
    return Path(os.path.normpath(folder / name))


def _is_model_file(path: Path) -> bool:
    configs = r"(scheduler_|adapter_)?config\.json"
    weights = r"(diffusion_pytorch_|adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    return re.fullmatch(f"{configs}|{weights}", path.name) is not None


def is_no_case(path: Path) -> bool:
    """Descriptions, and the list of sizes of the real model."""
    return path.suffix == ".md" or (path.name.startswith("real_sizes_") and path.suffix == ".json")


@cache
def group_of(path: Path) -> str:
    """Group of a file: ``lpo/NN``, ``dina/folder``, ``algos/stem``, ``algos2/stem`` or ``editing/stem``."""
    family, *inner = path.relative_to(ROOT).parts
    if family in ALGOS:
        return f"{family}/{path.stem}"
    if family == "lpo":
        number = re.match(r"case(\d\d)", inner[0])
        return f"lpo/{number[1] if number else inner[0]}"
    return f"{family}/{inner[0]}"


@cache
def all_files() -> tuple[Path, ...]:
    """Every file of the set that could belong to a case."""
    found = (path for family in ("lpo", "dina", *ALGOS) for path in (ROOT / family).rglob("*") if path.is_file())
    return tuple(sorted(path for path in found if not is_no_case(path)))


def _everything_in(folder: Path) -> set[Path]:
    return {path for path in all_files() if folder in path.parents}


def _beside(path: Path) -> set[Path]:
    return {file for suffix in TENSOR_FILES if (file := path.with_suffix(suffix)) in all_files()}


def _named_in(path: Path) -> set[Path]:
    named: set[Path] = set()
    for key, value in json.loads(path.read_text()).items():
        if isinstance(value, str) and key.endswith(("_file", "_dir")):
            target = _inside(path.parent, value)
            named |= {target} & set(all_files()) | _everything_in(target)
    return named


def _lpo_cases() -> Iterator[Case]:
    for entry in sorted((ROOT / "lpo").glob("case[0-9][0-9]*")):
        if (entry / "data.json").is_file():
            yield Case(group_of(entry), entry / "data.json", frozenset(_everything_in(entry)))
        elif entry.suffix == ".json":
            files = {entry} | _beside(entry) | _named_in(entry) | _without_json(group_of(entry))
            yield Case(group_of(entry), entry, frozenset(files))


def _without_json(group: str) -> set[Path]:
    """Tensor files of a group that stand alone; they belong to all its cases."""
    files = {path for path in all_files() if path.parent == ROOT / "lpo" and group_of(path) == group}
    return {path for path in files if path.suffix in TENSOR_FILES and path.with_suffix(".json") not in files}


def _dina_cases() -> Iterator[Case]:
    for folder, patterns in DINA_CASES.items():
        for path in sorted({path for pattern in patterns for path in (ROOT / "dina" / folder).glob(pattern)}):
            files = {path} | _beside(path) | _named_in(path)
            if path.parent.name != folder or folder == "dataset":
                files |= _everything_in(path.parent)
            for shared in SHARED_FOLDERS.get(folder, ()):
                files |= _everything_in(path.parent / shared)
            yield Case(f"dina/{folder}", path, frozenset(files))


def _algos_cases() -> Iterator[Case]:
    for path in sorted(path for family in ALGOS for path in (ROOT / family).glob("*.json")):
        yield Case(group_of(path), path, frozenset({path} | _beside(path)))


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of the set, of covered groups and others."""
    return (*_lpo_cases(), *_dina_cases(), *_algos_cases())


def other_groups() -> list[str]:
    """Groups that the set has files of and that no test covers yet."""
    return sorted({group_of(path) for path in all_files()} - set(COVERED))


def cases(group: str, stem: str = "") -> list[Case]:
    """Cases of a group whose JSON file's name starts with ``stem``."""
    return [case for case in all_cases() if case.group == group and case.path.name.startswith(stem)]
