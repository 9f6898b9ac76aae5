"""Links that a stranger has planted: nothing is written, deleted or read behind them."""

import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentreward.apps.taste.steps import LOG, Step
from latentreward.core.errors import InputError
from latentreward.core.storage.run_folder import PartFiles
from latentreward.data import (
    DatasetPairReader,
    EditPairReader,
    FolderPairReader,
    HPDv2Reader,
    HPDv3Reader,
    ImageRewardDBReader,
    ImageRewardReader,
    PickAPicTarReader,
    decode_image,
)
from latentreward.data.readers.rows import RowReader

WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "parts of a table": ("out.csv.parts", lambda folder: PartFiles(folder / "out.csv", {}, 1).__enter__()),
    "log of a step": (
        str(Step.of(Path(), "list", ["configs"]).output.parent / LOG),
        lambda folder: Step.of(folder, "list", ["configs"]).run(),
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_or_deleted_behind_a_link(writer: str, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    victim, link = tmp_path / "victim", tmp_path / "work" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    victim.mkdir() if writer == "parts of a table" else victim.touch()
    with pytest.raises(InputError, match=r"is a link; delete it, or choose another output$"):
        write(tmp_path / "work")
    assert not [*victim.iterdir()] if victim.is_dir() else not victim.stat().st_size


def png() -> bytes:
    Image.new("RGB", (8, 8)).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def parquet(columns: dict[str, Any]) -> bytes:
    pq.write_table(pa.table(columns), stream := io.BytesIO())
    return stream.getvalue()


def within(folder: str, files: dict[str, Any]) -> dict[str, Any]:
    return {f"{folder}/{name}": content for name, content in files.items()}


PICTURE = [{"bytes": png(), "path": None}]
TABLE = parquet({"prompt": ["x"], "chosen": PICTURE, "rejected": PICTURE})
SIDES = {"chosen/1.png": png(), "rejected/1.png": png()}
CAPTIONS = {"captions.jsonl": {"name": "1", "prompt": "x"}}
HPDV2 = {"prompt": "x", "image_path": ["1.png", "2.png"], "rank": [1, 2]}
HPDV3 = {"prompt": "x", "path1": "1.png", "path2": "2.png"}
RANKED = {"id": "1", "prompt": "x", "generations": ["1.png", "2.png"], "ranking": [1, 2]}
PATHS = [f"images/train/train_1/{n}.png" for n in (1, 2)]
DB = parquet({"image_path": PATHS, "prompt_id": ["1"] * 2, "prompt": ["x"] * 2, "rank": [1, 2]})
PICTURES = {"1.png": png(), "2.png": png()}
SAMPLE = {"1.jpg_0.jpg": png(), "1.jpg_1.jpg": png(), "1.label_0.txt": b"1", "1.label_1.txt": b"0"}
EDIT = {"key": "k", "instruction": "x", "input_image": "1.png", "output_images": ["1.png", "2.png"]}
TRAIN = {"split": "train"}
READERS: list[tuple[str, dict[str, Any], Callable[..., RowReader]]] = [
    ("captions.jsonl", SIDES | CAPTIONS, FolderPairReader),
    ("train", within("train", SIDES | CAPTIONS), partial(FolderPairReader, split="train")),
    ("data/train-00000-of-00001.parquet", {"data/train-00000-of-00001.parquet": TABLE}, DatasetPairReader),
    ("train.parquet", {"train.parquet": TABLE}, lambda root, **own: DatasetPairReader(f"{root}/*.parquet", **own)),
    ("1.tar", {"1.tar": tar_of(SAMPLE)}, PickAPicTarReader),
    ("train.json", {"train.json": [HPDV2], **within("train", PICTURES)}, partial(HPDv2Reader, **TRAIN)),
    ("train", {"train.json": [HPDV2], **within("train", PICTURES)}, partial(HPDv2Reader, **TRAIN)),
    ("train.json", {"train.json": [HPDV3], **PICTURES}, partial(HPDv3Reader, **TRAIN)),
    ("train.json", {"train.json": [EDIT], **PICTURES}, partial(EditPairReader, **TRAIN)),
    ("test.json", {"test.json": [RANKED], **within("test_images", PICTURES)}, ImageRewardReader),
    ("test_images", {"test.json": [RANKED], **within("test_images", PICTURES)}, ImageRewardReader),
    *(
        (
            name,
            within("images/train/train_1", PICTURES) | {"metadata-train.parquet": DB},
            partial(ImageRewardDBReader, **TRAIN),
        )
        for name in ("images", "images/train/train_1", "metadata-train.parquet")
    ),
]


@pytest.mark.parametrize(("name", "files", "read"), READERS, ids=[f"{n} {one[0]}" for n, one in enumerate(READERS)])
def test_no_link_in_a_folder_of_data_opens_a_file_elsewhere(
    name: str, files: dict[str, Any], read: Callable[..., RowReader], tmp_path: Path
) -> None:
    """But for a blob of a hub's snapshot; a folder of a user may itself be behind a link."""
    repository = tmp_path / "hub/datasets--me--set"
    root = repository / "snapshots/0a1b"
    for place, content in files.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    (tmp_path / "own").symlink_to(root)
    (repository / "blobs").mkdir()
    for elsewhere in (repository / "blobs/7f", tmp_path / "elsewhere")[(root / name).is_dir() :]:
        link = root / name
        link.resolve().rename(elsewhere)
        link.unlink(missing_ok=True)
        link.symlink_to(elsewhere)
        for place in (root, tmp_path / "own"):
            if elsewhere.parent != tmp_path:
                reader = read(place)
            else:
                with pytest.raises(InputError, match=r"leads out of .*allow_outside: true"):
                    read(place)
                reader = read(place, allow_outside=True)
            assert all(decode_image(image) for image in (reader[0].image_a, reader[0].image_b))
