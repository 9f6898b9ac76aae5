"""Results of pilots: JSON files that are small enough to be committed."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from pyarrow import parquet

from latentreward.errors import InputError
from latentreward.pilot.checks import GB
from latentreward.pilot.plans import BESIDE, CUT, JUDGED, MEASURED, Pilot
from latentreward.reports.report import JSON
from latentreward.steps.running import TaskRunner, starts
from latentreward.steps.sources import commit, computed_with, machine
from latentreward.steps.tasks import Task
from latentreward.storage.digests import digest
from latentreward.storage.durable import write_file
from latentreward.storage.json_files import read_config

VERSION = 1
ESTIMATE = {"value": float, "low": float, "high": float, "groups": int}
ENTRIES = {
    "pilot": str,
    "settings": {"digest": str, "pairs": int, "seed": int, "quick": bool},
    "cut": {"pairs": int, "digest": str},
    "accuracy": [{"model": str, "benchmark": str, "protocol": str, "estimate": ESTIMATE, "pairs": int}],
    "averages": [{"model": str, "estimate": ESTIMATE}],
    "pictures": [
        {"score": str, "prompts": int, **dict.fromkeys(("before", "after", "difference", "win_rate"), ESTIMATE)}
    ],
    "stages": {...: {"key": str, "starts": int, "seconds": float, "cpu_seconds": float, "gpu_gb": float}},
    "machine": {"processor": str, "gpu": str, "gpu_gb": float},
    "versions": {"latentreward": str, "torch": str, "diffusers": str},
    "commit": str,
    "weights": str,
}
"""Form of a result's entries: ``...`` stands for any name, and a mapping may have further ones."""
OPTIONAL = ("machine.gpu", "machine.gpu_gb")
"""Entries that a result from a machine without a GPU lacks."""


@dataclass(frozen=True)
class PilotResult:
    """Numbers of one run of a pilot, and what they were measured with.

    An estimate is a mapping of ``value``, ``low``, ``high`` (95 % interval) and ``groups`` (independent groups).

    Attributes:
        version: Version of this schema.
        pilot: Name of the pilot.
        settings: ``digest`` of all but folders of this machine, ``pairs``, ``seed``, and ``quick`` (a trial).
        cut: Number of ``pairs`` of the cut that were cached, and ``digest`` of their names.
        accuracy: Results of the benchmark: ``model`` (``pilot`` or the name of another), ``benchmark``, ``protocol``,
            ``estimate``, ``pairs``.
        averages: Mean accuracy over the four test sets: ``model``, ``estimate``.
        pictures: Results before and after the alignment by score: ``score``, ``before``, ``after`` (estimates),
            ``difference`` and ``win_rate`` (estimates, after against before), ``prompts``.
        stages: Stage → ``key`` (digest of its settings), ``starts`` of its process, and ``seconds``, ``cpu_seconds``
            and ``gpu_gb`` (peak of PyTorch's allocations) of the last start.
        machine: Processor, system and GPU.
        versions: Versions of Python and packages.
        commit: Commit of the checkout; ``+`` at its end if files differed; empty outside a checkout.
        weights: Hub id under which the reward was published; empty if it was not.
    """

    version: int
    pilot: str
    settings: Mapping[str, Any]
    cut: Mapping[str, Any]
    accuracy: Sequence[Mapping[str, Any]]
    averages: Sequence[Mapping[str, Any]]
    pictures: Sequence[Mapping[str, Any]]
    stages: Mapping[str, Mapping[str, Any]]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str
    weights: str = ""


def collect(pilot: Pilot, tasks: Mapping[str, Task], runner: TaskRunner, settings: Mapping[str, Any]) -> PilotResult:
    """Read the result of a pilot from the outputs of its finished stages.

    ``settings`` are the number of pairs, the seed, and whether the run was a trial.
    """
    outputs = {name: task.output(runner.folder) for name, task in tasks.items()}
    gpu: dict[str, Any] = {}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        gpu = {"gpu": found.name, "gpu_gb": round(found.total_memory / GB, 1)}
    names = parquet.read_table(outputs[CUT] / "pairs.parquet", columns=["pair_id"])["pair_id"].to_pylist()
    reports = [read_config(outputs[stage] / JSON) for stage in (BESIDE, MEASURED)]
    return PilotResult(
        version=VERSION,
        pilot=pilot.name,
        settings={"digest": pilot.digest(**settings), **settings},
        cut={"pairs": len(names), "digest": digest(["\n".join(names)])},
        accuracy=[
            {"model": one["scorer"], **{key: one[key] for key in ("benchmark", "protocol", "estimate", "pairs")}}
            for report in reports
            for one in report["protocols"]
        ],
        averages=[
            {"model": one["scorer"], "estimate": one["estimate"]} for report in reports for one in report["averages"]
        ],
        pictures=_pictures(read_config(outputs[JUDGED] / JSON)),
        stages={name: _stage(task, runner) for name, task in tasks.items()},
        machine={**machine(), **gpu},
        versions=computed_with(),
        commit=commit(),
    )


def _pictures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    after, before = report["policies"]
    means = {(one["policy"], one["score"]): one["mean"] for one in report["scores"]}
    return [
        {
            "score": one["score"],
            "before": means[before, one["score"]],
            "after": means[after, one["score"]],
            **{key: one[key] for key in ("difference", "win_rate", "prompts")},
        }
        for one in report["comparisons"]
        if not one["group"]
    ]


def _stage(task: Task, runner: TaskRunner) -> dict[str, Any]:
    done = runner.done(task)
    assert done is not None
    return {
        "key": task.key,
        "starts": starts(runner.log(task)),
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "gpu_gb": round(done.gpu_bytes / GB, 2),
    }


def write_result(path: Path, result: PilotResult) -> None:
    """Write a result atomically; a file keeps the weights that it names unless the result names others.

    A file that has the result already stays, whatever machine and versions it names: those were the run's.

    Raises:
        InputError: If there is a file that is damaged: the weights that it names would be lost.
    """
    if path.is_file():
        found = read_result(path)
        result = replace(result, weights=result.weights or found.weights)
        if replace(found, machine=result.machine, versions=result.versions, commit=result.commit) == result:
            return
    write_file(path, json.dumps(vars(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_result(path: Path) -> PilotResult:
    """Read a result.

    Raises:
        InputError: If the file is damaged, lacks an entry, or has another version.
    """
    content = read_config(path, remedy="restore it, or remove it and run the pilot again")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise InputError(f"{path}: its version is {content.get('version')!r}; this program reads {VERSION}")
    if (names := {field.name for field in fields(PilotResult)}) != content.keys():
        differing = ", ".join(sorted(names ^ content.keys()))
        raise InputError(f"{path}: entries are missing or unknown: {differing}; give a file that `pilot` wrote")
    if place := misfit(content, ENTRIES) or ("" if content["stages"] else "stages"):
        raise InputError(f"{path}: {place} is missing or has another form; give a file that `pilot` wrote")
    return PilotResult(**content)


def misfit(value: Any, form: Any, place: str = "") -> str | None:
    """Return the place of the first part of a value from JSON that does not have a form like :data:`ENTRIES`."""
    if not isinstance(form, dict | list):
        unknown = value is None and (place.endswith(".groups") or place in OPTIONAL)
        return None if unknown or is_of(value, form) else place
    if not isinstance(value, type(form)) or (form is ESTIMATE and value.keys() != form.keys()):
        return place
    if isinstance(form, list):
        parts = [(f"{place}[{index}]", one, form[0]) for index, one in enumerate(value)]
    else:
        forms = dict.fromkeys(value, form[...]) if ... in form else form
        parts = [(f"{place}.{name}".lstrip("."), value.get(name), one) for name, one in forms.items()]
    return next((found for inside, one, kind in parts if (found := misfit(one, kind, inside))), None)


def is_of(value: Any, kind: type) -> bool:
    """Tell whether a value from JSON is of a kind: numbers are finite, and whole numbers not negative."""
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # compares whole numbers of any length
    return type(value) is kind and (kind is not int or value >= 0)
