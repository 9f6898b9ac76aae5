"""Writers of tiny-world pairs as files in the layouts of public preference data sets, and of pairs of edits.

Every folder holds, beside the data set's own files, ``tinyworld.json`` (the settings) and ``oracle.parquet``, for
evaluation only, with the columns ``pair_id`` (``<file name>:<row>``), ``key_a``, ``key_b`` (image keys), and for both
pictures ``utility_a``, ``utility_b`` (without label noise) and the utility's parts ``alignment_a``, ``alignment_b``,
``quality_a`` and ``quality_b``. The file is also a score table, by which ``FilteredReader`` can filter the pairs. Equal
settings give equal bytes. Splits never share a caption.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentreward.core.errors import check_at_least_one
from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import replacing
from latentreward.core.storage.run_folder import RunFolder
from latentreward.tinyworld.edits import draw_edit, draw_edit_pairs, scene_verdict
from latentreward.tinyworld.pairs import Mixed, Pair, Picture, World, draw_pairs, encode_jpeg, generate_pairs
from latentreward.tinyworld.scenes import Scene, render

PICKAPIC_SPLITS = ("train", "validation", "test", "validation_unique", "test_unique")
TEXT, BYTES, WHOLE, NUMBER, TRUTH = pa.string(), pa.binary(), pa.int64(), pa.float64(), pa.bool_()
PICKAPIC_SCHEMA = pa.schema([
    ("are_different", TRUTH), ("best_image_uid", TEXT), ("caption", TEXT), ("created_at", pa.timestamp("ns")),
    ("has_label", TRUTH), ("image_0_uid", TEXT), ("image_0_url", TEXT), ("image_1_uid", TEXT), ("image_1_url", TEXT),
    ("jpg_0", BYTES), ("jpg_1", BYTES), ("label_0", NUMBER), ("label_1", NUMBER), ("model_0", TEXT), ("model_1", TEXT),
    ("ranking_id", WHOLE), ("user_id", WHOLE), ("num_example_per_prompt", WHOLE), ("__index_level_0__", WHOLE),
])  # fmt: skip
ROWS_PER_FILE = 2048  # Rows of each parquet file, except the last file of a split
FIRST_SECOND = 1_672_531_200
"""Unix time of the first pair's ``created_at``, 2023-01-01 00:00 UTC; each later pair is one minute later."""

MARKER = "tinyworld.json"  # File with the settings of the pairs
PARTS = ("utility", "alignment", "quality")
EDIT_PARTS = ("utility", "followed", "kept")  # As :data:`PARTS`, of pairs of edits
EDIT_SPLITS = ("train", "validation", "test")
Seed = int | Mapping[str, int]  # Seed of all splits, or split → its seed
OracleRows = list[tuple[Any, ...]]
"""Rows of ``oracle.parquet``: pair ID, image keys of the two pictures, and each of the parts of the two pictures."""


def write_pickapic(
    root: Path | str,
    pairs_per_split: Mapping[str, int],
    seed: Seed = 0,
    mixed: Mixed | None = None,
    world: World | None = None,
) -> Path:
    """Write drawn pairs with noisy labels, ties included, in the layout of Pick-a-Pic v1 (with images).

    If the folder ``root``, which is returned, already holds pairs of equal settings, nothing is written.

    Args:
        root: Folder to write.
        pairs_per_split: Number of pairs for ``train``, ``validation``, ``test``, ``validation_unique`` and
            ``test_unique``; the last two have one pair per caption.
        seed: Seed of all random numbers, or one for each split.
        mixed: See :func:`~latentreward.tinyworld.pairs.draw_pairs`.
        world: World of captions and pictures; the shapes if None.
    """

    def fill(folder: Path) -> OracleRows:
        oracle: OracleRows = []
        for split, number in pairs_per_split.items():
            rng = _generator(seed, split, PICKAPIC_SPLITS.index(split))
            pairs = draw_pairs(
                split.removesuffix("_unique"), number, rng, unique=split.endswith("_unique"), mixed=mixed, world=world
            )
            oracle += _write_pickapic_split(folder, split, pairs, rng)
        return oracle

    spec: dict[str, Any] = {"layout": "pickapic_v1", "pairs_per_split": dict(pairs_per_split), "seed": seed}
    return _make_folder(root, spec | _further(mixed=mixed and asdict(mixed), world=world and world.settings), fill)


def write_generated(root: Path | str, pairs: int = 1000, seed: int = 0, num_inference_steps: int = 20) -> Path:
    """Write pairs of *generated* pictures as the split ``test`` of Pick-a-Pic v1, for evaluation, never for training.

    See :func:`~latentreward.tinyworld.pairs.generate_pairs`, and :func:`write_pickapic` for ``root``.
    """
    spec = {"layout": "pickapic_v1", "pairs_per_split": {"test": pairs}, "seed": seed, "steps": num_inference_steps}
    spec["generated_by"] = "shipped pipelines"

    def fill(folder: Path) -> OracleRows:
        made = generate_pairs(pairs, seed, num_inference_steps)
        return _write_pickapic_split(folder, "test", made, np.random.default_rng([seed, 8]))

    return _make_folder(root, spec, fill)


def write_hpdv3(
    root: Path | str, pairs_per_split: Mapping[str, int], seed: Seed = 0, world: World | None = None
) -> Path:
    """Write drawn pairs with noisy labels in the layout of HPDv3, where the first picture is the preferred picture.

    There are no ties, and the splits ``train`` and ``test``. A tenth of the training rows has neither votes nor
    confidence, like the Midjourney rows of the real data set. Test rows never have these keys. For the arguments see
    :func:`write_pickapic`.
    """

    def fill(folder: Path) -> OracleRows:
        (folder / "images").mkdir()
        oracle: OracleRows = []
        for split, number in pairs_per_split.items():
            rng = _generator(seed, split, 16 + ("train", "test").index(split))
            rows = []
            for row, pair in enumerate(draw_pairs(split, number, rng, ties=False, world=world)):
                best, worst = (pair.first, pair.second) if pair.label == 1.0 else (pair.second, pair.first)
                for picture in (best, worst):
                    (folder / "images" / f"{picture.uid}.jpg").write_bytes(picture.jpeg)
                votes = _draw_votes(best.utility - worst.utility, rng)
                votes = votes if split == "train" else {}
                model = "midjourney" if votes.get("confidence", 0.0) is None else "drawn"
                keys = (f"images/{best.uid}.jpg", f"images/{worst.uid}.jpg")
                paths = {"path1": keys[0], "path2": keys[1]}
                rows.append({"prompt": pair.caption} | votes | paths | {"model1": model, "model2": model})
                oracle.append((f"{split}.json:{row}", *keys, *_worth(best, worst)))
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))
        return oracle

    spec: dict[str, Any] = {"layout": "hpdv3", "pairs_per_split": dict(pairs_per_split), "seed": seed}
    return _make_folder(root, spec | _further(world=world and world.settings), fill)


def write_edits(root: Path | str, pairs_per_split: Mapping[str, int], seed: Seed = 0, prompts: int = 800) -> Path:
    """Write drawn pairs of edits as JSON lines with the pictures beside them, and lists of edits to make.

    ``SPLIT.jsonl`` holds the pairs, with ``source_images``, of ``train``, ``validation`` and ``test``. Labels of
    ``train`` are noisy, those of the others are the judge's. ``SPLIT_prompts.jsonl`` holds ``prompts`` other edits of
    the split. In ``oracle.parquet``, ``followed`` and ``kept`` take the places of ``alignment`` and ``quality``. For
    the other arguments see :func:`write_pickapic`.
    """

    def fill(folder: Path) -> OracleRows:
        (folder / "images").mkdir()
        oracle: OracleRows = []
        for split, number in pairs_per_split.items():
            rng = _generator(seed, split, 32 + EDIT_SPLITS.index(split))
            pairs = draw_edit_pairs(split, number, rng, noisy=split == "train")
            lines = []
            for line, pair in enumerate(pairs, start=1):
                source, *keys = (_write_scene(folder, scene) for scene in (pair.source, *pair.results))
                row: dict[str, Any] = {"prompt": pair.edit.text, "source_images": [source]}
                row |= {"image_a": keys[0], "image_b": keys[1], "label": pair.label}
                lines.append(json.dumps(row | {"model_a": pair.kinds[0], "model_b": pair.kinds[1]}) + "\n")
                verdicts = [scene_verdict(pair.source, result, pair.edit) for result in pair.results]
                worth = [float(getattr(verdict, part)) for part in EDIT_PARTS for verdict in verdicts]
                oracle.append((f"{split}.jsonl:{line}", *keys, *worth))
            (folder / f"{split}.jsonl").write_text("".join(lines))
            edits = [draw_edit(split, rng) for _ in range(prompts)]
            rows = [{"prompt": edit.text, "source_images": [_write_scene(folder, source)]} for source, edit in edits]
            (folder / f"{split}_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return oracle

    spec = {"layout": "edits", "pairs_per_split": dict(pairs_per_split), "seed": seed, "prompts": prompts}
    return _make_folder(root, spec, fill, EDIT_PARTS)


def _write_scene(folder: Path, scene: Scene) -> str:
    """Write a scene's picture under a name by its content, and return its path in the folder."""
    jpeg = encode_jpeg(render(scene))
    path = f"images/{digest([jpeg], 16)}.jpg"
    (folder / path).write_bytes(jpeg)
    return path


def _generator(seed: Seed, split: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed if isinstance(seed, int) else seed[split], number])


def _further(**settings: Any) -> dict[str, Any]:
    """Return the settings that are given, so that those of folders from before there were others stay as they are."""
    return {name: value for name, value in settings.items() if value}


def _make_folder(
    root: Path | str, spec: dict[str, Any], fill: Callable[[Path], OracleRows], parts: Sequence[str] = PARTS
) -> Path:
    """Let ``fill`` write to a temporary folder, add the oracle's table and the settings, and rename it to ``root``."""
    root = Path(root)
    check_at_least_one("pairs of ", **spec["pairs_per_split"])
    recorded = RunFolder(root, root / MARKER, spec, "root", "delete it or choose another folder")
    if not recorded.exists():
        with replacing(root, over=False) as fresh:
            fresh.mkdir()
            names = ("pair_id", "key_a", "key_b", *(f"{part}_{side}" for part in parts for side in "ab"))
            columns = zip(*fill(fresh), strict=True)
            oracle = pa.table(dict(zip(names, map(list, columns), strict=True)))
            pq.write_table(oracle, fresh / "oracle.parquet", write_page_checksum=True)
            (fresh / MARKER).write_text(json.dumps(spec, indent=1, sort_keys=True))
    recorded.compare()  # if another process was faster, its settings must be equal
    return root


def _write_pickapic_split(folder: Path, split: str, pairs: Sequence[Pair], rng: np.random.Generator) -> OracleRows:
    (folder / "data").mkdir(exist_ok=True)
    examples = Counter(pair.caption for pair in pairs)
    rows = []
    for number, pair in enumerate(pairs):
        best = {1.0: pair.first.uid, 0.0: pair.second.uid}.get(pair.label, "tie")
        row: dict[str, Any] = {"are_different": True, "best_image_uid": best, "has_label": True}
        row["created_at"] = np.datetime64(FIRST_SECOND + 60 * number, "s").astype("datetime64[ns]")
        for side, picture, label in ((0, pair.first, pair.label), (1, pair.second, 1.0 - pair.label)):
            row[f"image_{side}_uid"] = picture.uid
            row[f"image_{side}_url"] = f"https://tinyworld.invalid/{picture.uid}.jpg"
            row[f"jpg_{side}"] = picture.jpeg
            row[f"label_{side}"] = label
            row[f"model_{side}"] = picture.model
        row |= {"caption": pair.caption, "num_example_per_prompt": examples[pair.caption]}
        rows.append(row | {"ranking_id": number, "user_id": int(rng.integers(1, 500)), "__index_level_0__": number})
    starts = range(0, len(rows), ROWS_PER_FILE)
    oracle: OracleRows = []
    for file_number, start in enumerate(starts):
        part = slice(start, start + ROWS_PER_FILE)
        uids = digest((row["image_0_uid"] for row in rows[part]), 8)
        name = f"{split}-{file_number:05d}-of-{len(starts):05d}-{uids}.parquet"
        table = pa.Table.from_pylist(rows[part], schema=PICKAPIC_SCHEMA)
        pq.write_table(table, folder / "data" / name, row_group_size=256, write_page_checksum=True)
        oracle += [
            (f"{name}:{row}", pair.first.uid, pair.second.uid, *_worth(pair.first, pair.second))
            for row, pair in enumerate(pairs[part])
        ]
    return oracle


def _worth(first: Picture, second: Picture) -> list[float]:
    return [getattr(picture, part) for part in PARTS for picture in (first, second)]


def _draw_votes(gap: float, rng: np.random.Generator) -> dict[str, Any]:
    """Draw votes and confidence of a pair by its gap in utility; the preferred picture always gets the majority."""
    if rng.random() < 0.1:
        return {"choice_dist": None, "confidence": None}
    judges = int(rng.integers(9, 20))
    wins = max(judges // 2 + 1, int(rng.binomial(judges, 1 / (1 + np.exp(-2 * gap)))))
    return {"choice_dist": [wins, judges - wins], "confidence": round(1.0 - 0.5 ** (2 * wins - judges + 1), 6)}
