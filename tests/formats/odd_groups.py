"""Odd rows of HPDv2, ImageReward, ImageRewardDB and both GenAI-Bench, with what must come out of them."""

import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.formats.conftest import BAD_IMAGES, GOOD, GOOD_IMAGES, encode

PROMPTS = {"null": None, "missing": ..., "empty": "", "long": "word " * 400, "unicode": "عربي 🦊 é\n\n日本"}
ESCAPING = ("../secret.jpg", "/etc/hostname", "a/../../secret.jpg", "link/secret.jpg")
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
MODELS = ("SDXL_Turbo", "DALLE_3", "Midjourney_6", "SDXL_Base", "DeepFloyd_I_XL_v1", "SDXL_2_1")


def write_all(root: Path) -> dict[str, Any]:
    """One folder for each format below ``root``; returns their expectations."""
    return {
        "hpdv2": write_hpdv2(root / "hpdv2"),
        "imagereward": write_imagereward(root / "imagereward"),
        "imagerewarddb": write_imagerewarddb(root / "imagerewarddb"),
        "genai_bench": write_genai_bench(root / "genai_bench"),
        "genai_bench_cmu": write_genai_bench_cmu(root / "genai_bench_cmu"),
    }


def drop_missing(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not ...}


def write_images(folder: Path) -> None:
    """Files a to f, one for each good and bad kind, and a link out of the folder."""
    folder.mkdir(parents=True)
    (folder.parent / "secret.jpg").write_bytes(GOOD)
    (folder / "link").symlink_to(folder.parent)
    for number, name in enumerate("abcdef"):
        (folder / f"{name}.jpg").write_bytes(encode(seed=number))
    for kind, data in GOOD_IMAGES.items():
        (folder / f"good {kind}.jpg").write_bytes(data)
    for kind, data in BAD_IMAGES.items():
        if data is not None:
            (folder / f"bad {kind}.jpg").write_bytes(data)


def unreadable_paths() -> list[Any]:
    bad = [f"bad {kind}.jpg" for kind, data in BAD_IMAGES.items() if data is not None]
    return [*ESCAPING, "absent.jpg", "", None, 7, *bad]


def odd_choices() -> Iterator[tuple[str, Any]]:
    yield "", {}
    yield "tie", {"human_preference": [0.5, 0.5]}
    for choice in ([1, 1], [0, 0], None, ..., [None, None], [0.9, 0.1]):
        yield f"unlabelled: {choice}", {"human_preference": choice}
    for choice in ([1], [1, None], [float("nan"), 0], "first", {"a": 1}):
        yield f"refused: {choice}", {"human_preference": choice}
    for kind, prompt in PROMPTS.items():
        yield f"{kind} prompt", {"prompt": prompt}
    yield "refused: prompt is no text", {"prompt": 3}
    for kind in GOOD_IMAGES:
        yield kind, {"file_path": ["a.jpg", f"good {kind}.jpg"]}
    for path in unreadable_paths():
        yield "undecodable", {"file_path": [path, "a.jpg"]}
    for paths in (None, ..., "a.jpg", ["a.jpg"], ["a.jpg", "b.jpg", "c.jpg"]):
        yield "refused, undecodable", {"file_path": paths}
    for row in (None, 7, "row", ["a.jpg", "b.jpg"]):
        yield "refused, undecodable", row
    yield "duplicate", {}
    yield "duplicate, swapped", {"file_path": ["b.jpg", "a.jpg"], "human_preference": [0, 1]}
    yield "same image twice", {"file_path": ["a.jpg", "a.jpg"]}


def odd_rankings(images: str, ranks: str) -> Iterator[tuple[str, Any]]:
    yield "", {}
    yield "ties", {ranks: [1, 2, 2]}
    yield "all tied", {ranks: [2, 2, 2]}
    yield "starts at 2", {ranks: [4, 2, 3]}
    for value in (None, ..., [None, None, None]):
        yield "unlabelled", {ranks: value}
    for value in ([1, 2], [1, 2, None], [1, 2, "x"], [1, 2, float("nan")], 5, [1, 2, 3, 4], []):
        yield "refused", {ranks: value}
    for value in (None, ..., "a.jpg"):
        yield "refused", {images: value}
    for row in (None, 7, ["a.jpg"]):
        yield "refused", row
    yield "refused", {"prompt": 3}
    for kind, prompt in PROMPTS.items():
        yield f"{kind} prompt", {"prompt": prompt}
    for path in unreadable_paths():
        yield "undecodable", {images: ["a.jpg", path, "b.jpg"]}
    for kind in GOOD_IMAGES:
        yield kind, {images: ["a.jpg", f"good {kind}.jpg", "b.jpg"]}
    yield "duplicate", {}
    yield "same image twice", {images: ["a.jpg", "a.jpg", "b.jpg"]}
    yield "nine images", {images: [f"{name}.jpg" for name in "abcdefabc"], ranks: list(range(9, 0, -1))}
    yield "one image", {images: ["a.jpg"], ranks: [1]}
    yield "no image", {images: [], ranks: []}


def ranked_rows(plain: dict[str, Any], images: str, ranks: str) -> tuple[list[Any], list[str], dict[str, int]]:
    """Rows, their kinds, and counts over the groups that are kept."""
    kinds, changes = zip(*odd_rankings(images, ranks), strict=True)
    rows = [drop_missing({**plain, **change}) if isinstance(change, dict) else change for change in changes]
    counts: Counter[str] = Counter(groups=0, pairs=0, ties=0, strict=0)
    for kind, row in zip(kinds, rows, strict=True):
        if kind == "refused":
            continue
        counts["groups"] += 1
        places = [(i, j) for i in range(len(row[images])) for j in range(i)]
        counts["pairs"] += len(places)
        if kind != "unlabelled":
            equal = sum(row[ranks][i] == row[ranks][j] for i, j in places)
            counts["ties"] += equal
            counts["strict"] += len(places) - equal
    return rows, list(kinds), dict(counts)


def write_hpdv2(root: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        write_images(root / split)
    plain = {"human_preference": [1, 0], "prompt": "a prompt", "file_path": ["a.jpg", "b.jpg"]}
    kinds, changes = zip(*odd_choices(), strict=True)
    train = [drop_missing({**plain, **change}) if isinstance(change, dict) else change for change in changes]
    (root / "train.json").write_text(json.dumps(train))
    group = {"prompt": "a prompt", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [2, 1, 3]}
    group["raw_annotations"] = [{"rank": [2, 1, 3], "user_hash": "x"}, {"rank": [1, 2, 2], "user_hash": "y"}]
    test, _, counts = ranked_rows(group, "image_path", "rank")
    for annotations in (None, [], "x", [{"rank": [1]}], [None], [{"rank": [3, 1, 2]}, {"rank": None}]):
        test.append({**group, "raw_annotations": annotations})
    (root / "test.json").write_text(json.dumps(test))
    return {
        "train_rows": len(train),
        "odd_rows": {str(number): kind for number, kind in enumerate(kinds) if kind},
        "undecodable_rows": [number for number, kind in enumerate(kinds) if kind.endswith("undecodable")],
        "unlabelled_rows": [n for n, kind in enumerate(kinds) if kind.startswith(("unlabelled", "refused"))],
        "test_groups": counts["groups"] + 6,
        "test_pairs": counts["pairs"] + 18,
    }


def write_imagereward(root: Path) -> dict[str, Any]:
    write_images(root / "data" / "test_images")
    plain = {"id": "000001-0001", "prompt": "a prompt", "generations": ["a.jpg", "b.jpg", "c.jpg"]}
    plain["ranking"] = [2, 1, 3]
    rows, kinds, counts = ranked_rows(plain, "generations", "ranking")
    for number, row in enumerate(rows):
        if isinstance(row, dict):
            row["id"] = f"000001-{number:04d}"
    (root / "data" / "test.json").write_text(json.dumps(rows))
    return {
        "prompts": counts["groups"],
        "all_pairs": counts["pairs"],
        "strict_pairs": counts["strict"],
        "ties": counts["ties"],
        "all_tie_prompts": [rows[kinds.index("all tied")]["id"]],
        "missing_file": "absent.jpg",
        "unreadable_groups": [rows[n]["id"] for n, kind in enumerate(kinds) if kind == "undecodable"],
    }


def odd_members() -> Iterator[tuple[list[dict[str, Any]], int | None]]:
    """Changes to a prompt's three rows, and its strict pairs; None if the prompt is refused."""
    yield [{}, {}, {}], 3
    yield [{"rank": 1}, {"rank": 1}, {"rank": 2}], 2
    yield [{"rank": 1}] * 3, 0
    yield [{"rank": None}] * 3, 0
    yield [{}, {"rank": None}, {}], None
    yield [{"image_path": None}, {"image_path": "nowhere.webp"}, {}], 3
    yield [{"image_path": "images/test/test_1/../../../secret.jpg"}, {}, {}], 3
    for prompt in (None, "", "word " * 400, "עברית 🦊"):
        yield [{"prompt": prompt}] * 3, 3
    for kind in (*GOOD_IMAGES, *(f"bad {kind}" for kind, data in BAD_IMAGES.items() if data is not None), "absent"):
        yield [{"image_path": f"images/test/test_1/{kind}.webp"}, {}, {}], 3
    yield [{"image_path": "images/test/test_1/a.webp"}] * 3, 3


def write_imagerewarddb(root: Path) -> dict[str, Any]:
    """Rows in the metadata; zip 2 of them in the metadata alone."""
    rows: list[dict[str, Any]] = []
    images = prompts = strict = 0
    for number, (changes, pairs) in enumerate(odd_members()):
        for rank, change in enumerate(changes, start=1):
            path = f"images/test/test_1/{'abc'[rank - 1]}.webp"
            plain = {"image_path": path, "prompt_id": f"{number:06d}-0001", "prompt": "a prompt", "rank": rank}
            rows.append({**plain, **change})
        if pairs is not None:
            images, prompts, strict = images + len(changes), prompts + 1, strict + pairs
    rows.append({"image_path": "images/test/test_1/a.webp", "prompt_id": None, "prompt": "no group", "rank": 1})
    rows.append({"image_path": "images/test/test_2/a.webp", "prompt_id": "9-9", "prompt": "no zip", "rank": 1})
    folder = root / "images" / "test"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "metadata-test.parquet")
    files = {name: encode(seed=number, fmt="WEBP") for number, name in enumerate("abc")}
    files |= GOOD_IMAGES | {f"bad {kind}": data for kind, data in BAD_IMAGES.items() if data is not None}
    with zipfile.ZipFile(folder / "test_1.zip", "w") as archive:
        archive.writestr("test_1.json", json.dumps(rows[:-1]))
        for name, data in files.items():
            archive.writestr(f"{name}.webp", data)
    return {"rows": images, "prompts": prompts, "strict_pairs": strict}


def odd_votes() -> Iterator[tuple[str, dict[str, Any]]]:
    for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote", "LEFT", "", None):
        yield f"vote {vote}", {"vote_type": vote}
    for kind, prompt in PROMPTS.items():
        yield f"{kind} prompt", {"prompt": None if prompt is ... else prompt}
    for kind, data in GOOD_IMAGES.items():
        yield kind, {"left_image": {"bytes": data, "path": "x.png"}}
    for data in BAD_IMAGES.values():
        yield "undecodable", {"right_image": {"bytes": data, "path": "x.png"}}
    yield "undecodable", {"left_image": None}
    yield "no models", {"left_model": None, "right_model": None}
    yield "duplicate", {}
    yield "same image twice", {"right_image": {"bytes": GOOD, "path": None}}


def write_genai_bench(root: Path) -> dict[str, Any]:
    """Columns in another order than published, rows in small row groups."""
    text = dict.fromkeys(("vote_type", "prompt", "right_model", "left_model"), pa.string())
    schema = pa.schema({"right_image": IMAGE, **text, "left_image": IMAGE, "unknown": pa.int64()})
    plain = {"prompt": "a prompt", "left_model": "LCM", "right_model": "SDXL", "vote_type": "leftvote"}
    plain |= {"left_image": {"bytes": GOOD, "path": "l.jpg"}, "right_image": {"bytes": encode(seed=1), "path": None}}
    kinds, changes = zip(*odd_votes(), strict=True)
    rows = [{**plain, **change} for change in changes]
    folder = root / "image_generation"
    folder.mkdir(parents=True)
    for split, content in {"test": rows, "test_v1": rows[:4]}.items():
        table = pa.Table.from_pylist(content, schema=schema)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=4)
    decodable = [row for kind, row in zip(kinds, rows, strict=True) if kind != "undecodable"]
    return {
        "test_rows": len(rows),
        "votes": Counter(str(row["vote_type"]) for row in rows),
        "odd_rows": {str(number): kind for number, kind in enumerate(kinds) if kind},
        "undecodable_rows": [number for number, kind in enumerate(kinds) if kind == "undecodable"],
        "strict_decodable": sum(row["vote_type"] in ("leftvote", "rightvote") for row in decodable),
    }


def odd_ratings() -> Iterator[tuple[dict[str, Any] | None, int, int]]:
    """Ratings of the six models, and the ties and unlabelled pairs among their 15 pairs."""
    yield {model: [rank, rank, rank] for rank, model in enumerate(MODELS[:5], start=1)} | {MODELS[5]: [1, 1, 2]}, 0, 0
    yield {model: [3, 3, 3] for model in MODELS}, 15, 0
    yield {model: [3] if n % 2 else [2, 4] for n, model in enumerate(MODELS)}, 15, 0
    yield {model: None if n == 0 else [n, n, None] for n, model in enumerate(MODELS)}, 0, 5
    yield {model: [] if n == 0 else [n] for n, model in enumerate(MODELS)}, 0, 5
    yield None, 0, 15


def write_genai_bench_cmu(root: Path) -> dict[str, Any]:
    schema = pa.schema(
        {
            **dict.fromkeys(MODELS, IMAGE),
            "Tags": pa.struct({"advanced": pa.list_(pa.string()), "basic": pa.list_(pa.string())}),
            "HumanRatings": pa.struct(dict.fromkeys(reversed(MODELS), pa.list_(pa.int64()))),
            "Prompt": pa.string(),
            "Index": pa.int64(),
        }
    )
    images = {model: {"bytes": encode(seed=number), "path": None} for number, model in enumerate(MODELS)}
    cases = list(odd_ratings())
    rows = [{**images, "Prompt": f"{n}", "Index": n, "HumanRatings": ratings} for n, (ratings, *_) in enumerate(cases)]
    rows[1] |= {"Prompt": None, MODELS[2]: None, MODELS[3]: {"bytes": GOOD[:-300], "path": "x.jpg"}}
    refused = {**rows[0], "Index": 99, "HumanRatings": {model: [0, 3, 6] for model in MODELS}}
    (root / "data").mkdir(parents=True)
    table = pa.Table.from_pylist([*rows, refused], schema=schema)
    pq.write_table(table, root / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    ties, unlabelled = (sum(case[n] for case in cases) for n in (1, 2))
    pairs = 15 * len(cases)
    return {"rows": len(rows), "pairs": pairs, "ties": ties, "strict": pairs - ties - unlabelled}
