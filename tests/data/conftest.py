"""Small real data sets: JPEGs in parquet and JPEG files beside JSON, written anew for each test."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config
from PIL import Image

SCHEMA = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_1_uid": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "num_example_per_prompt": pa.int64(),
    }
)


def encode(
    color: tuple[int, ...] = (200, 30, 60), size: tuple[int, int] = (20, 12), mode: str = "RGB", fmt: str = "JPEG"
):
    stream = io.BytesIO()
    Image.new(mode, size, color if mode != "L" else color[0]).save(stream, fmt)
    return stream.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], fmt: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=fmt) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pickapic_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "are_different": True,
        "best_image_uid": "not used",
        "caption": f"prompt {number}",
        "has_label": True,
        "image_0_uid": f"image-{number}-0",
        "image_1_uid": f"image-{number}-1",
        "jpg_0": encode((10 * number % 256, 40, 80)),
        "jpg_1": encode((200, 10 * number % 256, 80)),
        "label_0": float(number % 2),
        "label_1": 1.0 - number % 2,
        "model_0": "left",
        "model_1": "right",
        "num_example_per_prompt": 1,
    }
    return {**row, **changes}


def hpdv3_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": f"prompt {number}",
        "choice_dist": [9, 3],
        "confidence": 0.97,
        "path1": f"images/{number}-good.jpg",
        "path2": f"images/{number}-bad.jpg",
        "model1": "flux",
        "model2": "sdxl",
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the 5 seconds that `datasets` waits for its threads at the end of a shuffled stream."""
    monkeypatch.setattr(config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # datasets 4.0 has none


@pytest.fixture
def jpeg() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def pickapic_rows() -> Callable[..., dict[str, Any]]:
    return pickapic_row


@pytest.fixture
def write_pickapic(tmp_path: Path) -> Callable[..., str]:
    """Write rows as parts of a split; returns the root."""

    def write(
        rows: list[dict[str, Any]], split: str = "train", parts: int = 1, row_group_size: int = 2, drop=()
    ) -> str:
        folder = tmp_path / "pickapic" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        length = -(-len(rows) // parts)
        for part in range(parts):
            table = pa.Table.from_pylist(rows[part * length : (part + 1) * length], schema=SCHEMA).drop_columns(
                list(drop)
            )
            name = f"{split}-{part:05d}-of-{parts:05d}-0123456789abcdef.parquet"
            pq.write_table(table, folder / name, row_group_size=row_group_size)
        return str(tmp_path / "pickapic")

    return write


@pytest.fixture
def write_hpdv3(tmp_path: Path) -> Callable[..., str]:
    """Write rows as a JSON file, with an image for each path inside the root; returns the root."""

    def write(rows: Any, split: str = "train", images: bool = True) -> str:
        root = tmp_path / "hpdv3"
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / f"{split}.json").write_text(json.dumps(rows))
        for row in rows if images else []:
            for name in ("path1", "path2") if isinstance(row, dict) else ():
                path = row.get(name)
                if isinstance(path, str) and path.startswith("images/") and ".." not in path:
                    (root / path).write_bytes(encode((len(path) * 7 % 256, 90, 20)))
        return str(root)

    return write


@pytest.fixture
def hpdv3_rows() -> Callable[..., dict[str, Any]]:
    return hpdv3_row
