"""The YAML files for pairs of one's own and for tars: each reads a small data set of its layout."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from latentreward.apps.commands.fit import Parser
from latentreward.core.settings.functions import MODE, prepare_parsing
from latentreward.data import PreferenceDataModule
from tests.data.conftest import write_tar
from tests.formats.conftest import COMMITTED

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"


@cache
def parser() -> Parser:
    prepare_parsing([], classes=True)
    (made := Parser(parser_mode=MODE)).add_subclass_arguments(LightningDataModule, "data")
    return made


def load(name: str, **splits: Any) -> PreferenceDataModule:
    settings = parser().parse_string((CONFIGS / f"{name}.yaml").read_text())
    settings.data.init_args.update(Namespace(size=16, batch_size=2, num_workers=0, **splits))
    return parser().instantiate(settings).data


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("PAIRS_ROOT", "PICKAPIC_TARS", "HPDV3_PLUS_ROOT", "EDITREWARD_ROOT", "EDITREWARD_BENCH"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


def test_folders(root, jpeg) -> None:
    for split in ("train", "val"):
        for name in "ab":
            for number, side in enumerate(("chosen", "rejected")):
                file = root / split / side / f"{name}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(jpeg((90 * number, 20, 20)))
            (root / split / "chosen" / f"{name}.txt").write_text(f"{split} {name}")
    data = load("folders")
    (batch,) = data.train_dataloader()
    assert sorted(batch.prompts) == ["train a", "train b"]
    assert len(next(iter(data.predict_dataloader()))) == 2


def test_json_lines(root, jpeg) -> None:
    for name in "ab":
        (root / f"{name}.jpg").write_bytes(jpeg((ord(name), 20, 20)))
    for split in ("train", "val"):
        rows = [{"prompt": f"{split} {n}", "chosen": "a.jpg", "rejected": "b.jpg"} for n in range(2)]
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (batch,) = load("jsonl").train_dataloader()
    assert set(batch.chosen_keys) == {"a.jpg"}


def test_tars(root, jpeg) -> None:
    members = {}
    for n in range(2):
        members |= {f"{n}.jpg_0.jpg": jpeg((9, 9, 9)), f"{n}.jpg_1.jpg": jpeg(), f"{n}.label_0.txt": b"1.0"}
        members |= {f"{n}.label_1.txt": b"0.0", f"{n}.original_prompt.txt": f"prompt {n}".encode()}
    write_tar(root / "00000.tar", members)
    (batch,) = load("pickapic_v2_tars").train_dataloader()
    assert sorted(batch.prompts) == ["prompt 0", "prompt 1"]


def test_hpdv3_plus(write_hpdv3, hpdv3_rows, monkeypatch) -> None:
    root = Path(write_hpdv3([hpdv3_rows(n) for n in range(2)]))
    monkeypatch.setenv("HPDV3_PLUS_ROOT", str(root))
    for split in ("train", "test"):
        (root / split).mkdir()
        (root / split / f"{split}_aes.json").write_text((root / "train.json").read_text())
    assert len(next(iter(load("hpdv3_plus").predict_dataloader()))) == 2


def test_streamed(root, jpeg, monkeypatch) -> None:
    monkeypatch.setenv("STREAM_SOURCE", str(root))
    rows = {"prompt": [f"p {n}" for n in range(8)], "chosen": [jpeg()] * 8, "rejected": [jpeg((9, 9, 9))] * 8}
    pq.write_table(pa.table(rows), root / "train.parquet")
    (root / "a.jpg").write_bytes(jpeg())
    (root / "val.jsonl").write_text('{"prompt": "p 3", "chosen": "a.jpg", "rejected": "a.jpg"}')
    data = load("streamed")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(8), strict=False)]
    prompts = {prompt for batch in batches for prompt in batch.prompts}
    assert prompts == {f"p {n}" for n in range(8) if n != 3}


@pytest.mark.parametrize(
    ("name", "absent", "loaders"),
    [
        ("hpdv2", [], ["train", "val", "predict"]),
        ("imagereward", [], ["test", "predict"]),
        ("imagerewarddb", ["train", "val"], ["test", "predict"]),  # the samples lack these splits
        ("genai_bench", [], ["test", "predict"]),
        ("genai_bench_cmu", [], ["test", "predict"]),
    ],
)
def test_published_sets(name, absent, loaders, monkeypatch) -> None:
    monkeypatch.setenv(f"{name.upper()}_ROOT", str(COMMITTED / name))
    data = load(name, **dict.fromkeys(absent))
    for loader in loaders:
        assert next(iter(getattr(data, f"{loader}_dataloader")())).chosen.shape == (2, 3, 16, 16)


def test_edits(root, jpeg) -> None:
    for name in "sab":
        (root / f"{name}.jpg").write_bytes(jpeg((ord(name), 20, 20)))
    row = {"prompt": "make it red", "path_src": "s.jpg", "path1": "a.jpg", "path2": "b.jpg"}
    (root / "train.json").write_text(json.dumps([row] * 2))
    batch = next(iter(load("editreward").predict_dataloader()))
    assert set(batch.chosen_keys) == {"a.jpg"}
    assert [tuple(place.shape) for place in batch.sources] == [(2, 3, 16, 16)]
