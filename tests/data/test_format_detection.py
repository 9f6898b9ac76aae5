"""Which reader a folder or file is given to."""

import json
from pathlib import Path

import datasets
import pytest

from latentreward.core.errors import InputError
from latentreward.data.format_detection import choose_splits, recognise
from tests.data.conftest import write_tar

SAMPLES = Path(__file__).parents[1] / "formats" / "data"


def readers_of(path: Path | str) -> dict[str, str]:
    return {name: type(build(on_error="skip")).__name__ for name, build in recognise(str(path)).items()}


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("pickapic_v1", dict.fromkeys(("train", "validation_unique", "test_unique"), "PickAPicReader")),
        ("pickapic_v1_no_images", {"train": "PickAPicReader"}),
        ("hpdv2", {"train": "HPDv2Reader", "test": "HPDv2Reader"}),
        ("hpdv2/test.json", {"test": "HPDv2Reader"}),
        ("hpdv3", {"train": "HPDv3Reader", "test": "HPDv3Reader", "all": "HPDv3Reader"}),
        ("imagereward", {"test": "ImageRewardReader"}),
        ("imagereward/data", {"test": "ImageRewardReader"}),
        ("imagerewarddb", {"test": "ImageRewardDBReader"}),
        ("genai_bench", {"test": "GenAIBenchReader", "test_v1": "GenAIBenchReader"}),
        ("genai_bench_cmu", {"train": "GenAIBenchCMUReader"}),
        ("diffusion_rm", {"train": "DiffusionRMReader"}),
        ("diffusion_rm/part_rank00.parquet", {"part_rank00": "DiffusionRMReader"}),
    ],
)
def test_published_formats(folder: str, expected: dict[str, str]) -> None:
    found = readers_of(SAMPLES / folder)
    assert found == expected
    assert list(found) == list(expected)


def test_tars(tmp_path, jpeg) -> None:
    for folder in ("", "train", "test"):
        write_tar(tmp_path / "tars" / folder / "00000.tar", dict.fromkeys(("0.jpg_0.jpg", "0.jpg_1.jpg"), jpeg()))
    assert readers_of(tmp_path / "tars") == readers_of(tmp_path / "tars/00000.tar") == {"train": "PickAPicTarReader"}
    (tmp_path / "tars/00000.tar").unlink()
    assert readers_of(tmp_path / "tars") == dict.fromkeys(("train", "test"), "PickAPicTarReader")


def test_folders_of_images(tmp_path, jpeg) -> None:
    for split in ("train", "val"):
        for side in ("chosen", "rejected"):
            (tmp_path / split / side).mkdir(parents=True)
            (tmp_path / split / side / "1.jpg").write_bytes(jpeg())
        (tmp_path / split / "chosen" / "1.txt").write_text("a prompt")
    assert readers_of(tmp_path) == {"train": "FolderPairReader", "val": "FolderPairReader"}
    assert readers_of(tmp_path / "val") == {"all": "FolderPairReader"}


def test_json_lines(tmp_path) -> None:
    row = {"prompt": "x", "chosen": "a.jpg", "rejected": "b.jpg"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (tmp_path / "other.jsonl").write_text('{"tag": "counting"}')
    assert readers_of(tmp_path) == readers_of(tmp_path / "train.jsonl") == {"train": "JSONLPairReader"}


def test_what_is_not_known(tmp_path) -> None:
    datasets.Dataset.from_dict({"caption": ["a"], "chosen": ["b"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"is a table whose columns no reader knows: caption, chosen; name those"):
        recognise(str(tmp_path))


def test_splits_by_name() -> None:
    splits = recognise(str(SAMPLES / "pickapic_v1"))
    assert list(choose_splits(splits, ["test_unique", "train"])) == ["test_unique", "train"]
    with pytest.raises(InputError, match=r"splits: there is no split 'tset_unique'; did you mean 'test_unique'"):
        choose_splits(splits, ["tset_unique"])
