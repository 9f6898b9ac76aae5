"""Results of pilots: JSON files that are small enough to be committed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pyarrow import parquet
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from latentreward.apps.pilot.checks import GB
from latentreward.apps.pilot.plans import BESIDE, CUT, JUDGED, MEASURED, Pilot
from latentreward.apps.steps.running import TaskRunner, starts
from latentreward.apps.steps.sources import commit, computed_with, machine
from latentreward.apps.steps.tasks import Task
from latentreward.errors import InputError
from latentreward.reports.report import JSON
from latentreward.storage.digests import digest
from latentreward.storage.durable import write_file
from latentreward.storage.json_files import STRICT, checked, read_config

VERSION = 1
Count = Annotated[int, Field(ge=0)]


class Estimate(TypedDict):
    """Form of a measured number, which has no further entries."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    value: float
    low: float
    high: float
    groups: Count | None


ENTRIES: dict[str, Any] = {
    "settings": {"digest": str, "pairs": Count, "seed": Count, "quick": bool},
    "cut": {"pairs": Count, "digest": str},
    "accuracy": [{"model": str, "benchmark": str, "protocol": str, "estimate": Estimate, "pairs": Count}],
    "averages": [{"model": str, "estimate": Estimate}],
    "pictures": [
        {"score": str, "prompts": Count, **dict.fromkeys(("before", "after", "difference", "win_rate"), Estimate)}
    ],
    "stages": {
        ...: {"key": str, "starts": Count, "seconds": FiniteFloat, "cpu_seconds": FiniteFloat, "gpu_gb": FiniteFloat}
    },
    "machine": {"processor": str, "gpu": NotRequired[str | None], "gpu_gb": NotRequired[FiniteFloat | None]},
    "versions": {"latentreward": str, "torch": str, "diffusers": str},
}
"""Form of a result's entries: ``...`` stands for any name, and a mapping may have further ones."""


@dataclass(frozen=True)
class PilotResult:
    """Numbers of one run of a pilot, and what they were measured with.

    An estimate is a mapping of ``value``, ``low``, ``high`` (95 % interval) and ``groups`` (independent groups).
    """

    __pydantic_config__ = STRICT
    version: int  # version of this schema
    pilot: str  # name of the pilot
    # ``digest`` of all but folders of this machine, ``pairs``, ``seed``, and ``quick`` (a trial)
    settings: Mapping[str, Any]
    cut: Mapping[str, Any]  # number of ``pairs`` of the cut that were cached, and ``digest`` of their names
    # Results of the benchmark: ``model`` (``pilot`` or the name of another), ``benchmark``, ``protocol``, ``estimate``,
    # ``pairs``
    accuracy: Sequence[Mapping[str, Any]]
    averages: Sequence[Mapping[str, Any]]  # mean accuracy over the four test sets: ``model``, ``estimate``
    # Results before and after the alignment by score: ``score``, ``before``, ``after`` (estimates), ``difference`` and
    # ``win_rate`` (estimates, after against before), ``prompts``
    pictures: Sequence[Mapping[str, Any]]
    # Stage → ``key`` (digest of its settings), ``starts`` of its process, and ``seconds``, ``cpu_seconds`` and
    # ``gpu_gb`` (peak of PyTorch's allocations) of the last start
    stages: Mapping[str, Mapping[str, Any]]
    machine: Mapping[str, Any]  # processor, system and GPU
    versions: Mapping[str, str]  # versions of Python and packages
    commit: str  # commit of the checkout; ``+`` at its end if files differed; empty outside a checkout
    weights: str = ""  # Hub id under which the reward was published; empty if it was not


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
    judged, stages = read_config(outputs[JUDGED] / JSON), dict[str, Any]()
    after, before = judged["policies"]
    means = {(one["policy"], one["score"]): one["mean"] for one in judged["scores"]}
    for name, task in tasks.items():
        done = runner.done(task)
        assert done is not None
        spent = {"seconds": done.seconds, "cpu_seconds": done.cpu_seconds, "gpu_gb": round(done.gpu_bytes / GB, 2)}
        stages[name] = {"key": task.key, "starts": starts(runner.log(task)), **spent}
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
        pictures=[
            {
                "score": one["score"],
                "before": means[before, one["score"]],
                "after": means[after, one["score"]],
                **{key: one[key] for key in ("difference", "win_rate", "prompts")},
            }
            for one in judged["comparisons"]
            if not one["group"]
        ],
        stages=stages,
        machine={**machine(), **gpu},
        versions=computed_with(),
        commit=commit(),
    )


def write_result(path: Path, result: PilotResult) -> None:
    """Write a result atomically; a file keeps the weights that it names unless the result names others.

    A file that has the result already stays, whatever machine and versions it names: those were the run's. A file that
    is damaged is refused: the weights that it names would be lost.
    """
    if path.is_file():
        found = read_result(path)
        result = replace(result, weights=result.weights or found.weights)
        if replace(found, machine=result.machine, versions=result.versions, commit=result.commit) == result:
            return
    write_file(path, json.dumps(vars(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_result(path: Path) -> PilotResult:
    """Read a result; raise InputError if the file is damaged, lacks an entry, or has another version."""
    content = read_config(path, remedy="restore it, or remove it and run the pilot again")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise InputError(f"{path}: its version is {content.get('version')!r}; this program reads {VERSION}")
    result: PilotResult = checked(PilotResult, content, f"{path}: ", "give a file that `pilot` wrote")
    checked(typed(ENTRIES), content, f"{path}: ", "give a file that `pilot` wrote")
    return result


def typed(form: Any) -> Any:
    """Return the type of a form like :data:`ENTRIES`."""
    if isinstance(form, list):
        return list[typed(form[0])]  # type: ignore[misc]
    if not isinstance(form, dict):
        return form
    if ... in form:
        return Annotated[dict[str, typed(form[...])], Field(min_length=1)]  # type: ignore[misc]
    return TypedDict("Entries", {name: typed(one) for name, one in form.items()})  # type: ignore[misc, operator]
