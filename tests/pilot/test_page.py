"""The committed table of models is what the committed results give."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentreward.commands import pilot as command
from latentreward.errors import InputError
from latentreward.evaluation.benchmark.four_benchmarks import FOUR_BENCHMARKS
from latentreward.pilot.page import page
from latentreward.pilot.plans import all_pilots
from latentreward.pilot.results import PilotResult, published_as, read_result, read_results, write_result
from latentreward.pilot.weights_table import NOT_MEASURED

ROOT = Path(__file__).resolve().parents[2]
FULL = [one for one in all_pilots().values() if one.device == "gpu"]


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


def test_the_committed_page_is_what_the_results_give() -> None:
    again = "run `latentreward pilot --page docs/models.md`"
    assert (ROOT / "docs" / "models.md").read_text() == page(FULL, read_results(ROOT / "pilots")), again


def test_committed_results_are_small_and_of_shipped_pilots() -> None:
    assert {one.pilot for one in read_results(ROOT / "pilots")} <= {pilot.name for pilot in FULL}
    assert all(path.stat().st_size < 50_000 for path in (ROOT / "pilots").glob("*.json"))


def test_without_results_every_model_is_not_measured() -> None:
    text = page(FULL, [])
    for pilot in FULL:
        assert f"| {pilot.reward} | {' | '.join([NOT_MEASURED] * 5)} |" in text
        assert f"| {pilot.policy} | {' | '.join([NOT_MEASURED] * 5)} |" in text
    assert "| DiNa-LRM, the paper | 60.34 | 82.13 | 75.04 | 68.43 | 71.49 |" in text


def test_weights_have_rows_where_they_exist() -> None:
    sent = replace(result("sd15"), weights="owner/my_reward")
    without, rows = (page(FULL, results).splitlines() for results in ([result("sd15")], [sent]))
    (row,) = set(rows) - set(without)
    assert row.startswith(r"| LRM-SD1.5, run 1 below | owner/my\_reward | 20000 pairs, ")
    assert not any("my\\_reward" in row for row in without)
    published = {row.split(" | ")[0]: row for row in reversed(rows) if "casiatao/LRM |" in row or "12layers |" in row}
    assert published["| LRM-SD1.5"].endswith("| yes, by the runs of pilot sd15 below |")
    assert published["| LRM-SDXL"].endswith(f"| {NOT_MEASURED} |")
    assert published["| DiNa-LRM"].endswith(f"| {NOT_MEASURED} |")


@pytest.mark.parametrize(("name", "weights"), [("sd_tiny", "my_reward"), (None, "owner/my_reward")])
def test_weights_that_nobody_can_load_are_refused(name: str | None, weights: str) -> None:
    with pytest.raises(InputError, match=f"weights is '{weights}'; give a pilot's name and the hub id"):
        command.pilot(name, weights=weights)


def test_a_result_from_before_weights_were_named_is_read(tmp_path: Path) -> None:
    content = {name: value for name, value in vars(result("sd15")).items() if name != "weights"}
    (tmp_path / "one.json").write_text(json.dumps(content))
    assert read_result(tmp_path / "one.json") == result("sd15")
    assert published_as(tmp_path / "one.json") == published_as(tmp_path / "none.json") == ""


def test_a_result_fills_its_rows() -> None:
    rows = page(FULL, [result("sd15")]).splitlines()
    cell = r"60.0 \[59.0, 61.0\]"
    assert f"| LRM-SD1.5, run 1 | {' | '.join([cell] * 5)} | 20000 pairs, seed 0 |" in rows
    assert any(row.startswith(r"| published checkpoint, run 1 | 70.0 \[69.0, 71.0\]") for row in rows)
    assert (
        r"| SD1.5, LPO, run 1 | PickScore | 20.500 | 21.000 | +0.500 \[+0.490, +0.510\] | 80.0 \[79.0, 81.0\] |" in rows
    )
    assert any("A card | train 2.0 (last of 2 starts) | 15.5 |" in row for row in rows)
    assert any(row.startswith(f"| DiNa-LRM | {NOT_MEASURED}") for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "its version is 2; this program reads 1"),
        ({"version": True}, "its version is True; this program reads 1"),
        ({"extra": 1}, "entries are missing or unknown: extra"),
    ],
)
def test_a_result_of_another_schema_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_result(tmp_path / "one.json", result("sd15"))
    assert read_result(tmp_path / "one.json") == result("sd15")
    (tmp_path / "one.json").write_text(json.dumps({**vars(result("sd15")), **change}))
    with pytest.raises(InputError, match=message):
        read_results(tmp_path)


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
        ("pictures.0.difference.evil", 1, r"pictures\[0\].difference"),
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
    with pytest.raises(InputError, match=rf"one.json: {named} is missing or has another form"):
        read_results(tmp_path)
