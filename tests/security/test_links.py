"""Links that a stranger has planted: nothing is written, deleted or read behind them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.apps.steps.running import LOG, TOLD, TaskRunner
from latentreward.cache.layout import KINDS, PLAN, SHARDS, read_plan
from latentreward.errors import InputError
from latentreward.ranks.shared_work import SharedWork
from latentreward.storage.digests import file_hash
from latentreward.storage.part_tables import PartFiles
from tests.apps.steps.test_running import toy
from tests.cache.writing import run_cache, write_data


def run_step(folder: Path) -> None:
    TaskRunner(folder).run(toy("1")["pairs"])


def beside_step(name: str) -> str:
    return str(toy("1")["pairs"].output(Path()).parent / name)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "shared work": ("shards", lambda folder: SharedWork(None, "cpu", folder / "shards")),
    "parts of a table": ("out.csv.parts", lambda folder: PartFiles(folder / "out.csv", {}, 1).__enter__()),
    "log of a step": (beside_step(LOG), run_step),
    "record of a step": (beside_step(TOLD), run_step),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_or_deleted_behind_a_link(writer: str, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    victim, link = tmp_path / "victim", tmp_path / "work" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    victim.mkdir() if writer in ("shared work", "parts of a table") else victim.touch()
    with pytest.raises(InputError, match=r"is a link; delete it, or choose another output$"):
        write(tmp_path / "work")
    assert not [*victim.iterdir()] if victim.is_dir() else not victim.stat().st_size


def rename_shard(cache: Path) -> None:
    rows = pq.read_table(cache / SHARDS)
    names = pa.array(["../victim/x", *rows["name"].to_pylist()[1:]])
    pq.write_table(rows.set_column(rows.column_names.index("name"), "name", names), cache / SHARDS)
    plan = read_plan(cache)
    changed = replace(plan, tables={**plan.tables, SHARDS: file_hash(cache / SHARDS)})
    (cache / PLAN).write_text(changed.to_json())


def link_shards(cache: Path) -> None:
    shutil.rmtree(cache / KINDS[0])
    (cache / KINDS[0]).symlink_to("../victim")


@pytest.mark.parametrize(("plant", "told"), [(rename_shard, "names '../victim/x'"), (link_shards, "latents is a link")])
def test_no_shard_of_a_begun_cache_is_written_elsewhere(
    plant: Callable[[Path], None], told: str, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/x").write_text("mine")
    (tmp_path / "victim/x.json").write_text("mine")
    plant(tmp_path / "cache")
    with pytest.raises(SystemExit):
        run_cache(tmp_path / "cache", tmp_path / "data")
    assert told in capsys.readouterr().err.strip().splitlines()[-1]
    assert {file.read_text() for file in (tmp_path / "victim").iterdir()} == {"mine"}
    assert len([*(tmp_path / "victim").iterdir()]) == 2


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    run_cache(folder / "cache", write_data(folder / "data", pairs=2))
    return folder
