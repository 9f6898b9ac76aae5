"""A fixed random cut of a data set."""

import json
from pathlib import Path

import pytest

from latentreward.core.errors import InputError
from latentreward.data import CutReader, HPDv3Reader


def reader(folder: Path, names: range) -> HPDv3Reader:
    """Pairs whose prompts are ``p0``, ``p1``, …; two pairs of each prompt."""
    rows = [{"prompt": f"p{name // 2}", "path1": f"{name}a.jpg", "path2": f"{name}b.jpg"} for name in names]
    folder.mkdir(exist_ok=True)
    (folder / "train.json").write_text(json.dumps(rows))
    return HPDv3Reader(str(folder), "train", on_error="skip")


def test_a_cut_is_fixed_by_its_seed_and_keeps_the_order(tmp_path: Path) -> None:
    whole = reader(tmp_path, range(60))
    cut = CutReader(whole, 20)
    assert len(cut) == len(set(cut.pair_ids())) == 20
    assert cut.pair_ids() == CutReader(whole, 20).pair_ids() == [pair.pair_id for pair in cut]
    assert sorted(cut.rows) == list(cut.rows)
    assert cut.pair_ids() != CutReader(whole, 20, seed=1).pair_ids()
    assert cut.rows.tolist() != list(range(20))


def test_a_smaller_cut_is_part_of_a_larger_one_and_of_a_longer_copy(tmp_path: Path) -> None:
    whole, part = reader(tmp_path / "whole", range(60)), reader(tmp_path / "part", range(50))
    assert set(CutReader(whole, 10).pair_ids()) < set(CutReader(whole, 30).pair_ids())
    both = set(CutReader(whole, 30).pair_ids()) & set(part.pair_ids())
    assert both <= set(CutReader(part, 30).pair_ids())


def test_prompts_of_the_test_set_are_left_out(tmp_path: Path) -> None:
    whole, test = reader(tmp_path / "whole", range(60)), reader(tmp_path / "test", range(20))
    cut = CutReader(whole, 40, apart_from=test)
    assert not set(cut.prompts()) & set(test.prompts())
    with pytest.raises(InputError, match=r"pairs=41, but 40 of 60 rows have a label and no prompt of apart_from"):
        CutReader(whole, 41, apart_from=test)
