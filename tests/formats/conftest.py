"""Samples of the published formats: a given folder (by default the committed one), and one full of odd rows."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

COMMITTED = Path(__file__).parent / "data"
SHARD = "{}-00000-of-00001-{:016x}.parquet"


@pytest.fixture(scope="session", params=["given", "odd"])
def samples(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one sub-folder per format and EXPECTED.json."""
    if request.param == "given":
        return Path(os.environ.get("LATENTREWARD_SAMPLES_DIR", COMMITTED))
    root = tmp_path_factory.mktemp("odd_samples")
    expected = {"pickapic_v1": write_pickapic(root / "pickapic_v1"), "hpdv3": write_hpdv3(root / "hpdv3")}
    (root / "EXPECTED.json").write_text(json.dumps(expected))
    return root


def check_rows(found: list[int], expected: dict[str, Any], key: str) -> None:
    """Rows found are those under ``key``; only a set without odd rows may lack it."""
    assert found == (sorted(expected[key]) if expected["odd_rows"] else [])


def encode(
    mode: str = "RGB", size: tuple[int, int] = (40, 30), fmt: str = "JPEG", seed: int = 0, **options: Any
) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def encode_16_bit() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(0, 60000, 100, dtype=np.uint16).reshape(20, 30)).save(stream, "PNG")
    return stream.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(exif=exif)


GOOD = encode()
GOOD_IMAGES = {
    "grey": encode("L"),
    "CMYK": encode("CMYK"),
    "RGBA": encode("RGBA", fmt="PNG"),
    "palette": encode("P", fmt="PNG"),
    "16 bit": encode_16_bit(),
    "EXIF rotated": rotated(),
    "1x1": encode(size=(1, 1)),
    "wide": encode(size=(240, 10)),
    "tall": encode(size=(10, 250)),
    "webp in jpg": encode(fmt="WEBP"),
}
BAD_IMAGES = {
    "null": None,
    "empty": b"",
    "garbage": b"\x00garbage" * 9,
    "truncated": GOOD[:-300],
    "text": b"<html></html>",
}


def odd_pickapic_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    tie = {"label_0": 0.5, "label_1": 0.5}
    yield "", {}
    yield "", {"label_0": 0.0, "label_1": 1.0}
    yield "tie", tie
    yield "tie, not labelled", {**tie, "has_label": False}
    yield "null label", {"label_0": None, "label_1": None, "has_label": False}
    yield "null flag and label", {"label_0": None, "label_1": None, "has_label": None}
    yield "null label, flag set", {"label_0": None, "label_1": None}
    yield "inconsistent labels", {"label_0": 1.0, "label_1": 1.0}
    for kind, data in BAD_IMAGES.items():
        yield f"undecodable: {kind}", {"jpg_0": data}
        yield f"undecodable: {kind}", {"jpg_1": data, **tie}
    yield "undecodable: both", {"jpg_0": b"", "jpg_1": None}
    yield "undecodable: unlabelled", {"jpg_0": b"", "has_label": False}
    for kind, data in GOOD_IMAGES.items():
        yield kind, {"jpg_0": data}
        yield kind, {"jpg_1": data}
    for kind, caption in {"null": None, "empty": "", "long": "word " * 400, "unicode": "عربي 🦊 é\n\n日本"}.items():
        yield f"{kind} prompt", {"caption": caption}
    yield "duplicate", {}
    yield "duplicate, swapped", {"image_0_uid": "b", "image_1_uid": "a", "label_0": 0.0, "label_1": 1.0}
    yield "same image twice", {"image_0_uid": "a", "image_1_uid": "a", "jpg_1": GOOD, "are_different": False}
    yield "null uid and models", {"image_0_uid": None, "model_0": None, "model_1": None, "num_example_per_prompt": None}


def write_pickapic(root: Path) -> dict[str, Any]:
    columns = {
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
    values = [True, "tie", "a prompt", True, "a", "b", GOOD, encode(seed=1), 1.0, 0.0, "m", "n", 2]
    plain = dict(zip(columns, values, strict=True))
    kinds, changes = zip(*odd_pickapic_rows(), strict=True)
    rows = [{**plain, **change} for change in changes]
    (root / "data").mkdir(parents=True)
    for number, (split, content) in enumerate(
        {"train": rows, "validation_unique": rows[:3], "test_unique": rows[:2]}.items()
    ):
        table = pa.Table.from_pylist(content, schema=pa.schema(columns))
        pq.write_table(table, root / "data" / SHARD.format(split, number), row_group_size=5)
    consistent = [
        row for row in rows if row["has_label"] and row["label_0"] is not None and row["label_0"] + row["label_1"] == 1
    ]
    return {
        "train_rows": len(rows),
        "train_has_label": sum(row["has_label"] is True for row in rows),
        "train_ties": sum(row["label_0"] == 0.5 for row in consistent),
        "train_strict_labels_0_or_1": sum(row["label_0"] in (0, 1) for row in consistent),
        "odd_rows": {str(number): kind for number, kind in enumerate(kinds) if kind},
        "undecodable_rows": [number for number, kind in enumerate(kinds) if kind.startswith("undecodable")],
        "validation_unique_rows": 3,
        "test_unique_rows": 2,
    }


def odd_hpdv3_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "", {}
    for votes in ([3, 9], [0, 0], [6, 6], "[8, 1]", None, "null"):
        yield f"choice_dist {votes}", {"choice_dist": votes}
    for confidence in (0.95, 0.9499, "0.98", "0.5", "null", None, 1.0, 0.0):
        yield f"confidence {confidence}", {"confidence": confidence}
    yield "no votes, confidence and models", dict.fromkeys(("choice_dist", "confidence", "model1", "model2"), ...)
    for prompt in (None, ..., "", "word " * 400, "unicode 🦊 עברית\n\nsecond"):
        yield f"prompt {prompt!r:.20}", {"prompt": prompt}
    for path in ("../secret.jpg", "/etc/hostname", "images/../../secret.jpg", "link/secret.jpg", "images/absent.jpg"):
        yield "undecodable", {"path1": path}
    for path in (None, ..., "images", *(f"images/bad_{kind}.jpg" for kind in BAD_IMAGES)):
        yield "undecodable", {"path2": path}
    for kind in GOOD_IMAGES:
        yield kind, {"path2": f"images/good_{kind}.jpg"}
    yield "same image twice", {"path2": "images/a.jpg"}
    yield "duplicate", {}
    yield "duplicate, swapped", {"path1": "images/b.jpg", "path2": "images/a.jpg"}


def write_hpdv3(root: Path) -> dict[str, Any]:
    (root / "images").mkdir(parents=True)
    (root.parent / "secret.jpg").write_bytes(GOOD)
    (root / "link").symlink_to(root.parent)
    files = {"a": GOOD, "b": encode(seed=1)}
    files |= {f"good_{kind}": data for kind, data in GOOD_IMAGES.items()}
    files |= {f"bad_{kind}": data for kind, data in BAD_IMAGES.items() if data is not None}
    for name, data in files.items():
        (root / "images" / f"{name}.jpg").write_bytes(data)
    plain = {
        "prompt": "a prompt",
        "choice_dist": [9, 3],
        "confidence": 0.96,
        "path1": "images/a.jpg",
        "path2": "images/b.jpg",
    }
    plain |= {"model1": "flux", "model2": "sdxl"}
    kinds, changes = zip(*odd_hpdv3_rows(), strict=True)
    rows = [{key: value for key, value in {**plain, **change}.items() if value is not ...} for change in changes]
    test = [{key: row[key] for key in ("prompt", "path1", "path2", "model1", "model2")} for row in rows[:2]]
    for split, content in {"all": rows, "train": rows[3:], "test": test}.items():
        (root / f"{split}.json").write_text(json.dumps(content))
    confidences = [row.get("confidence") for row in rows]
    return {
        "all_rows": len(rows),
        "train_rows": len(rows) - 3,
        "odd_rows": {str(number): kind for number, kind in enumerate(kinds) if kind},
        "undecodable_rows": [number for number, kind in enumerate(kinds) if kind == "undecodable"],
        "rows_with_votes": sum(row.get("choice_dist") not in (None, "null") for row in rows),
        "kept_at_confidence_0_95_null_kept": sum(c in (None, "null") or float(c) >= 0.95 for c in confidences),
        "test_rows": len(test),
    }
