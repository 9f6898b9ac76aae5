"""``latentreward inspect`` as a user runs it: on the samples, on tiny-world data, interrupted, and given nonsense."""

import json
import shutil
from pathlib import Path

import pytest

from latentreward.apps.cli import main
from latentreward.tinyworld.writers import write_hpdv3, write_pickapic

SAMPLES = Path(__file__).parents[2] / "formats" / "data"
EXPECTED = json.loads((SAMPLES / "EXPECTED.json").read_text())


def inspect(tmp_path: Path, *arguments: str) -> dict:
    main(["inspect", *arguments, f"--output={tmp_path / 'report.json'}"])
    return json.loads((tmp_path / "report.json").read_text())


def rows_of(report: dict) -> dict[str, int]:
    return {split["name"]: split["rows"] + sum(split["skipped"].values()) for split in report["splits"]}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "pickapic_v1",
            {"train": "train_rows", "validation_unique": "validation_unique_rows", "test_unique": "test_unique_rows"},
        ),
        ("hpdv3", {"train": "train_rows", "test": "test_rows", "all": "all_rows"}),
        ("hpdv2", {"train": "train_rows", "test": "test_pairs"}),
        ("imagereward", {"test": "all_pairs"}),
        ("genai_bench", {"test": "test_rows"}),
        ("genai_bench_cmu", {"train": "pairs"}),
        ("diffusion_rm", {"train": "index_rows"}),
    ],
)
def test_samples(tmp_path, capsys, name, keys) -> None:
    report = inspect(tmp_path, str(SAMPLES / name), "--decode")
    found = rows_of(report)
    assert {split: found[split] for split in keys} == {split: EXPECTED[name][key] for split, key in keys.items()}
    text = capsys.readouterr().out
    assert text.startswith(f"{SAMPLES / name} (")
    assert "Rows with unreadable images (all were decoded): none" in text
    if name == "pickapic_v1":
        assert report["splits"][0]["labels"] == {"a wins": 3, "b wins": 3, "ties": 2, "unlabelled": 0}
        assert report["shared"]["train beside validation_unique"][1] == 6
        assert report["shared"]["validation_unique beside test_unique"][1] == 1
    if name == "genai_bench_cmu":
        assert report["splits"][0]["labels"]["ties"] == EXPECTED[name]["ties"]


def test_tiny_world(tmp_path, capsys) -> None:
    pickapic = write_pickapic(tmp_path / "pickapic", {"train": 30, "validation_unique": 8, "test_unique": 8})
    report = inspect(tmp_path, str(pickapic))
    assert rows_of(report) == {"train": 30, "validation_unique": 8, "test_unique": 8}
    assert all(set(split["images"]["sizes"]) == {"32x32"} for split in report["splits"])
    hpdv3 = write_hpdv3(tmp_path / "hpdv3", {"train": 20, "test": 8})
    shutil.copy(hpdv3 / "train.json", hpdv3 / "copy.json")
    report = inspect(tmp_path, str(hpdv3), "--splits=train,copy")
    assert report["shared"]["train beside copy"][1:] == [20, 20]


def test_readers_with_settings(tmp_path) -> None:
    config = {
        "reader": [
            {"class_path": "PickAPicReader", "init_args": {"source": str(SAMPLES / "pickapic_v1"), "split": split}}
            for split in ("train", "test_unique")
        ]
    }
    (tmp_path / "inspect.yaml").write_text(json.dumps(config))
    assert rows_of(inspect(tmp_path, f"--config={tmp_path / 'inspect.yaml'}")) == {"train": 8, "test_unique": 6}
    root = f"--reader.root={SAMPLES / 'hpdv3'}"
    report = inspect(tmp_path, "--reader=HPDv3Reader", root, "--reader.split=all", "--reader.min_confidence=0.95")
    assert report["splits"][0]["rows"] == EXPECTED["hpdv3"]["kept_at_confidence_0_95_null_kept"]
    assert sum(report["splits"][0]["skipped"].values()) == 5


def test_a_damaged_split_leaves_the_others(tmp_path, capsys) -> None:
    root = tmp_path / "hpdv3"
    shutil.copytree(SAMPLES / "hpdv3", root)
    (root / "train.json").write_text((root / "train.json").read_text()[:-1])
    report = inspect(tmp_path, str(root))
    assert "train" in report["unread"]
    assert "split train was not read: " in capsys.readouterr().out
    assert set(rows_of(report)) == {"test", "all"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data: "),
        (["/nowhere"], "data: no folder or file '/nowhere'"),
        ([str(SAMPLES / "prompts")], "is none of Pick-a-Pic"),
        ([str(SAMPLES / "hpdv3"), "--splits=trian"], "splits: there is no split 'trian'"),
        ([str(SAMPLES / "hpdv3"), "--limit=-1"], "limit=-1"),
        ([str(SAMPLES / "hpdv3"), "--reader.on_error=skip"], "say --reader CLASS too"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("latentreward: error: ")
    assert message in line
