"""Results of pilots are checked before their numbers are believed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentreward.apps.commands import pilot as command
from latentreward.apps.evaluation.benchmark.published_numbers import FOUR_BENCHMARKS
from latentreward.apps.pilot.results import PilotResult, read_result, write_result
from latentreward.errors import InputError


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "groups": 400}


def result(pilot: str) -> PilotResult:
    models = {"pilot": 0.6, "published": 0.7}
    return PilotResult(
        version=1,
        pilot=pilot,
        settings={"digest": "0123456789abcdef", "pairs": 20000, "seed": 0, "quick": False},
        cut={"pairs": 20000, "digest": "ab"},
        accuracy=[
            {"model": model, "benchmark": benchmark, "protocol": protocol, "estimate": estimate(value), "pairs": 500}
            for model, value in models.items()
            for benchmark, protocol in FOUR_BENCHMARKS.items()
        ],
        averages=[{"model": model, "estimate": estimate(value)} for model, value in models.items()],
        pictures=[
            {
                "score": "PickScore",
                **{name: estimate(value) for name, value in (("before", 20.5), ("after", 21.0), ("difference", 0.5))},
                "win_rate": estimate(0.8),
                "prompts": 500,
            }
        ],
        stages={"train": {"key": "k", "starts": 2, "seconds": 7200.0, "cpu_seconds": 1.0, "gpu_gb": 15.5}},
        machine={"processor": "P", "cores": 8, "system": "Linux", "gpu": "A card", "gpu_gb": 25.3},
        versions={"latentreward": "1", "torch": "2", "diffusers": "3"},
        commit="0123456789",
    )


def test_weights_that_nobody_can_load_are_refused() -> None:
    with pytest.raises(InputError, match="weights is 'my_reward'; give the hub id of the pilot's reward"):
        command.pilot("sd_tiny", weights="my_reward")


def test_a_file_keeps_its_weights_and_the_machine_that_measured_the_same_numbers(tmp_path: Path) -> None:
    path, measured = tmp_path / "one.json", result("sd15")
    write_result(path, replace(measured, weights="owner/name"))
    write_result(path, replace(measured, machine={**measured.machine, "gpu": "Another"}, commit="another"))
    assert read_result(path) == replace(measured, weights="owner/name")
    write_result(path, other := replace(measured, cut={**measured.cut, "pairs": 4}, commit="another"))
    assert read_result(path) == replace(other, weights="owner/name")
    write_result(path, replace(other, weights="owner/other"))
    assert read_result(path) == replace(other, weights="owner/other")
    path.write_text('{"half')
    with pytest.raises(InputError, match=r"one\.json is damaged \(.*\); restore it, or remove it and run"):
        write_result(path, measured)
    assert path.read_text() == '{"half'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "its version is 2; this program reads 1"),
        ({"version": True}, "its version is True; this program reads 1"),
        ({"extra": 1}, "extra: no setting has this name; choose from"),
    ],
)
def test_a_result_of_another_schema_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_result(tmp_path / "one.json", result("sd15"))
    assert read_result(tmp_path / "one.json") == result("sd15")
    (tmp_path / "one.json").write_text(json.dumps({**vars(result("sd15")), **change}))
    with pytest.raises(InputError, match=message):
        read_result(tmp_path / "one.json")


def change(content: dict[str, Any], place: str, value: Any) -> None:
    *parents, last = place.split(".")
    for name in parents:
        content = content[int(name) if name.isdigit() else name]
    content[last] = value


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("settings", {}, "settings.digest"),
        ("settings.quick", "no", "settings.quick"),
        ("cut", [], "cut"),
        ("accuracy", {"a": 1}, "accuracy"),
        ("accuracy.0.estimate.value", "high", r"accuracy\[0\].estimate.value"),
        ("pictures.0.difference.evil", 1, r"pictures\[0\].difference.evil"),
        ("pictures.0.before", None, r"pictures\[0\].before"),
        ("stages", {}, "stages"),
        ("stages.train.starts", "2", "stages.train.starts"),
        ("stages.train.seconds", 10**400, "stages.train.seconds"),
        ("stages.train.gpu_gb", math.nan, "stages.train.gpu_gb"),
        ("settings.pairs", -1, "settings.pairs"),
        ("machine", {}, "machine.processor"),
        ("machine.gpu", ["A card"], "machine.gpu"),
        ("machine.gpu_gb", math.inf, "machine.gpu_gb"),
        ("commit", None, "commit"),
        ("weights", ["owner/name"], "weights"),
    ],
)
def test_a_strangers_result_of_another_form_is_one_line(place: str, value: Any, named: str, tmp_path: Path) -> None:
    write_result(path := tmp_path / "one.json", result("sd15"))
    change(content := json.loads(path.read_text()), place, value)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"one.json: {named}: .*; give a file that `pilot` wrote"):
        read_result(tmp_path / "one.json")
