"""The committed table of models is what the committed results give."""

from dataclasses import replace
from pathlib import Path

import pytest

from latentreward.apps.pilot.plans import all_pilots
from latentreward.apps.pilot.results import write_result
from latentreward.errors import InputError
from tests.apps.pilot.test_results import result
from tools.models.page import NOT_MEASURED, main, page, read_results

ROOT = Path(__file__).resolve().parents[3]
FULL = [one for one in all_pilots().values() if one.device == "gpu"]


def test_the_committed_page_is_what_the_results_give() -> None:
    again = "run `python -m tools.models.page`"
    assert (ROOT / "docs" / "models.md").read_text() == page(FULL, read_results(ROOT / "pilots")), again


def test_committed_results_are_small_and_of_shipped_pilots() -> None:
    assert {one.pilot for one in read_results(ROOT / "pilots")} <= {pilot.name for pilot in FULL}
    assert all(path.stat().st_size < 50_000 for path in (ROOT / "pilots").glob("*.json"))


def test_the_command_writes_the_page_and_refuses_a_trial(tmp_path: Path) -> None:
    arguments = [f"--page={tmp_path}/models.md", f"--results={tmp_path}"]
    write_result(tmp_path / "one.json", result("sd15"))
    main(arguments)
    assert (tmp_path / "models.md").read_text() == page(FULL, [result("sd15")])
    trial = {**result("sd15").settings, "quick": True}
    write_result(tmp_path / "one.json", replace(result("sd15"), settings=trial))
    with pytest.raises(InputError, match="it is of a trial"):
        main(arguments)


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
