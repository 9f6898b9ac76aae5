"""A table in parts: whole or absent, refused if it belongs to another run, put together at the end."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from latentreward.core.errors import InputError
from latentreward.core.storage.run_folder import PartFiles

SPEC = {"reader": "one", "scorers": {"clip": "model"}}


def table(rows: range) -> pa.Table:
    return pa.table({"pair_id": [f"pair {row}" for row in rows], "score": [float(row) for row in rows]})


def fill(output: Path, rows: int, length: int, spec: dict = SPEC) -> None:
    with PartFiles(output, spec, rows) as files:
        if files.finished():
            return
        for missing in files.missing(length):
            files.write(missing, table(missing))
        files.finish()


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_whole_table(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / "new folder" / f"scores{suffix}"
    fill(output, rows=10, length=4)
    read = {".parquet": pq.read_table, ".csv": pa_csv.read_csv}[suffix](output)
    assert read.to_pydict() == table(range(10)).to_pydict()
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name, f"{output.name}.json"]
    with PartFiles(output, SPEC, 10) as files:
        assert files.finished()


def test_missing_rows(tmp_path: Path) -> None:
    with PartFiles(tmp_path / "scores.csv", SPEC, 10) as files:
        files.write(range(2, 5), table(range(2, 5)))
        files.write(range(8, 9), table(range(8, 9)))
        assert files.missing(2) == [range(2), range(5, 7), range(7, 8), range(9, 10)]
        assert files.missing(100) == [range(2), range(5, 8), range(9, 10)]


def test_a_run_that_wrote_nothing_binds_nobody(tmp_path: Path) -> None:
    with PartFiles(tmp_path / "scores.parquet", SPEC, 4) as files:
        assert files.missing(4) == [range(4)]
    fill(tmp_path / "scores.parquet", 4, 2, {**SPEC, "scorers": {"pick": "model"}})


def test_another_spec_is_refused(tmp_path: Path) -> None:
    output, other = tmp_path / "scores.parquet", {**SPEC, "scorers": {"pick": "model"}}
    with PartFiles(output, SPEC, 4) as files:
        files.write(range(2), table(range(2)))
    with pytest.raises(InputError, match='was begun with scorers "clip", now it is "pick"; choose') as error:
        fill(output, 4, 2, other)
    assert "\n" not in str(error.value)
    fill(output, 4, 2)
    with pytest.raises(InputError, match=r"choose another output, or delete .*scores.parquet and "):
        fill(output, 4, 2, other)


def test_a_file_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "scores.csv"
    output.write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        fill(output, 4, 2)
    assert output.read_text() == "mine"
    with pytest.raises(InputError, match=r"it must end in \.parquet or \.csv"):
        fill(tmp_path / "scores.txt", 4, 2)


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    output = tmp_path / "scores.parquet"
    with (
        PartFiles(output, SPEC, 4),
        pytest.raises(InputError, match="is being written by another run"),
        PartFiles(output, SPEC, 4),
    ):
        pass
    fill(output, 4, 2)


def test_a_kill_between_any_two_steps_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of ``finish`` fails once; the next run ends with the same table."""
    fill(tmp_path / "expected.parquet", 6, 2)
    expected = (tmp_path / "expected.parquet").read_bytes()
    steps = ("storage.durable.put_in_place", "storage.run_folder.write_file", "storage.run_folder.shutil.rmtree")
    for number, step in enumerate(steps):
        output = tmp_path / f"{number}.parquet"
        with PartFiles(output, SPEC, 6) as files:
            for rows in files.missing(2):
                files.write(rows, table(rows))
            with monkeypatch.context() as patch:
                patch.setattr(f"latentreward.core.{step}", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
                with pytest.raises(OSError, match="full"):
                    files.finish()
        fill(output, 6, 2)
        assert output.read_bytes() == expected
        assert not files.folder.exists() or step.endswith("rmtree")


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    with PartFiles(tmp_path / "scores.parquet", SPEC, 4) as files:
        files.write(range(2), table(range(2)))
        files.write(range(2, 4), table(range(2, 4)))
        path = files.parts()[range(2, 4)]
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(InputError, match=rf"{path.name}: damaged .* delete it") as error:
            files.finish()
        assert "\n" not in str(error.value)
        path.unlink()
        assert files.missing(4) == [range(2, 4)]
        files.write(range(1, 4), table(range(1, 4)))
        with pytest.raises(InputError, match=r"rows_000000001_000000004\.parquet: .* the part before it too.*; delete"):
            files.finish()


@pytest.mark.parametrize("rows", [range(3, 5), range(8, 10), range(2, 2), range(2, 10**20), range(1, 3)])
def test_a_part_of_rows_that_the_table_has_not_is_refused_before_work(tmp_path: Path, rows: range) -> None:
    output = tmp_path / "scores.csv"
    with PartFiles(output, SPEC, 4) as files:
        files.write(range(2), table(range(2)))
    foreign = files.folder / f"rows_{rows.start:09d}_{rows.stop:09d}.parquet"
    pq.write_table(table(range(2)), foreign)
    with pytest.raises(InputError, match=rf"{foreign.name}: .*; delete {foreign.name}"), PartFiles(output, SPEC, 4):
        pytest.fail("the work began")
    foreign.unlink()
    fill(output, 4, 2)
    assert pa_csv.read_csv(output).to_pydict() == table(range(4)).to_pydict()
