"""EXIF orientation from reader to pixels: applied to data of one's own, ignored in published data sets, set by YAML."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward import data
from latentreward.data import (
    FolderPairReader,
    JSONLPairReader,
    PairDataset,
    PairReader,
    PickAPicReader,
    PixelLoader,
)
from tests.data.rotated import photograph, upright

LOADER = PixelLoader(24, 24)
OWN = {"JSONLPairReader", "FolderPairReader", "DatasetPairReader"}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two photographs, as JSON lines and as folders."""
    for side, seed in (("chosen", 0), ("rejected", 1)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.jpg").write_bytes(photograph(seed=seed))
    row = {"prompt": "a cat", "chosen": "chosen/a.jpg", "rejected": "rejected/a.jpg"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    (tmp_path / "captions.jsonl").write_text(json.dumps({"name": "a", "prompt": "a cat"}))
    return tmp_path


def as_seen(reader: PairReader) -> bool:
    """Whether the only row has its images upright; else as they are stored."""
    loaded: Any = PairDataset(reader, LOADER)[0]
    turned = torch.equal(loaded.pixels_a, LOADER.pixels(upright(photograph(seed=0))))
    assert turned != torch.equal(loaded.pixels_a, LOADER(loaded.pair.image_a))
    return turned


def test_own_data_are_turned_unless_told_otherwise(own: Path) -> None:
    for make in (
        lambda **options: JSONLPairReader(str(own / "own.jsonl"), randomise_sides=False, **options),
        lambda **options: FolderPairReader(str(own), randomise_sides=False, **options),
    ):
        assert as_seen(make())
        assert as_seen(make(exif=None))
        assert not as_seen(make(exif="ignore"))


def test_published_data_sets_are_read_as_stored_unless_told_otherwise(write_pickapic, pickapic_rows) -> None:
    row = {**pickapic_rows(0), "jpg_0": photograph(seed=0), "jpg_1": photograph(seed=1)}
    source = write_pickapic([row])
    assert not as_seen(PickAPicReader(source, "train"))
    assert as_seen(PickAPicReader(source, "train", exif="apply"))


def test_every_reader_of_a_published_data_set_ignores_the_tag() -> None:
    named = [getattr(data, name) for name in data.__all__ if name.endswith("Reader") and name != "PairReader"]
    kinds = {kind.__name__: kind for kind in named if kind.__module__.startswith("latentreward.data.readers.")}
    assert len(kinds) > 8
    assert {name for name, kind in kinds.items() if kind.exif == "apply"} == OWN | ({"FilteredReader"} & kinds.keys())
