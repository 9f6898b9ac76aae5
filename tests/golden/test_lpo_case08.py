"""Multi-preference consistent filtering: which rows the released code keeps, and which the paper's rule keeps."""

import numpy as np
import pytest

from latentreward.data import MPCF, PairGaps, select_consistent
from latentreward.data.score_table import AESTHETIC_FLOORS, TIE_LIMITS
from tests.golden.catalogue import Case, cases

SCORERS = ("aesthetic", "clipscore", "vqascore")
mpcf = pytest.mark.parametrize("case", cases("lpo/08"), ids=lambda case: case.name)


def gaps_of(case: Case) -> PairGaps:
    data = case.tensors()
    return PairGaps(data["different_flag"].numpy() == 1, {name: data[f"{name}_gap"].numpy() for name in SCORERS})


def rules_of(case: Case, **options: str) -> dict[str, MPCF]:
    """The set's own thresholds, which for the released code's are those of the presets."""
    given = case.options
    limits = {name: given["tie_max"][f"{name}_gap"] for name in SCORERS}
    return {
        strategy: MPCF(
            floors={"aesthetic": floor, "clipscore": given["clip_min"], "vqascore": given["vqa_min"]},
            tie_limits=limits,
            **options,
        )
        for strategy, floor in given["aesthetic_min"].items()
    }


@mpcf
def test_rows_that_the_released_code_keeps(case: Case) -> None:
    gaps = gaps_of(case)
    for strategy, rule in rules_of(case, comparison="code").items():
        keep, dropped = select_consistent(gaps, rule)
        golden = case.tensors()[f"kept_code_strategy{strategy}"].numpy()
        np.testing.assert_array_equal(keep, golden, err_msg=f"strategy {strategy}")
        assert keep.sum() + dropped.total() == len(gaps) == case.options["rows"]


@mpcf
def test_decided_rows_that_the_paper_keeps(case: Case) -> None:
    gaps = gaps_of(case)
    for strategy, rule in rules_of(case, comparison="paper", ties="drop").items():
        keep, _ = select_consistent(gaps, rule)
        golden = case.tensors()[f"kept_paper_strategy{strategy}_decided_rows"].numpy()
        np.testing.assert_array_equal(keep, golden, err_msg=f"strategy {strategy}")


@mpcf
def test_presets_hold_the_thresholds(case: Case) -> None:
    given = case.options
    assert {str(strategy): floor for strategy, floor in AESTHETIC_FLOORS.items()} == given["aesthetic_min"]
    assert {f"{name}_gap": limit for name, limit in TIE_LIMITS.items()} == given["tie_max"]
    for strategy, rule in rules_of(case).items():
        assert MPCF(int(strategy)).floors_in_use() == rule.floors_in_use()
        assert MPCF(int(strategy)).limits_in_use() == rule.limits_in_use()
