"""What holds for every reader: committed samples read as pinned, a bad row under each `on_error`, paths stay inside."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import (
    EditPairReader,
    FolderPairReader,
    GenAIBenchCMUReader,
    GenAIBenchReader,
    HPDv2Reader,
    HPDv3Reader,
    ImageRewardReader,
    JSONLPairReader,
    PairReader,
    PickAPicReader,
    PickAPicTarReader,
)
from latentreward.data.format_detection import recognise
from latentreward.data.images import ImageError, image_bytes
from tests.data.conftest import SCHEMA, encode, pickapic_row, write_tar
from tests.formats.conftest import COMMITTED

PINNED = {
    "diffusion_rm": {"train": "10 01cfdea3ca7c2d82"},
    "genai_bench": {"test": "6 da8d2422baf5a68d", "test_v1": "4 3a1db62654c075f4"},
    "genai_bench_cmu": {"train": "30 b67849c8a967f75a"},
    "hpdv2": {"train": "4 7cb5373e9aee4561", "test": "81 cef27650e3b965f7"},
    "hpdv3": {"train": "7 ce924585d2fc54d3", "test": "5 f2f0f33ecd25211c", "all": "8 6b15fe2eeb25c0f5"},
    "imagereward": {"test": "33 794b0683b0b46d39"},
    "imagerewarddb": {"test": "12 173fc58835a10dab"},
    "pickapic_v1": {
        "train": "8 0789b6ff69b70655",
        "validation_unique": "5 c2294110bb1f1029",
        "test_unique": "6 392238bff0521f89",
    },
    "pickapic_v1_no_images": {"train": "8 880da22448773ded"},
}
"""Sample → split → number of pairs, and digest of what :func:`told` tells of them."""
A, B = encode((9, 9, 9)), encode()
OWN: dict[str, Any] = {"prompt": "x", "image_a": "a.jpg", "image_b": "b.jpg", "label": 1.0}
HPD3: dict[str, Any] = {"prompt": "x", "path1": "a.jpg", "path2": "b.jpg"}
CHOICE = {"prompt": "x", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]}
RANKED = {"prompt": "x", "image_path": ["a.jpg", "b.jpg"], "rank": [1, 2]}
ITEM = {"prompt": "x", "generations": ["a.jpg", "b.jpg"], "ranking": [1, 2]}
EDIT = {"prompt": "x", "path_src": "a.jpg", "path1": "a.jpg", "path2": "b.jpg", "tie_case": False}
EDIT_VOTE = {"instruct_prompt": "x", "source_image": "a.jpg", "vote_type": "leftvote"}
EDIT_VOTE |= {"left_output_image": "a.jpg", "right_output_image": "b.jpg", "left_model": "l", "right_model": "r"}
EDIT_RANKED = {"prompt": "x", "path_src": "a.jpg", "paths_generated": ["a.jpg", "b.jpg"]}
EDIT_RANKED |= {"human_vote": {"ranking": "A>B"}}
VOTE = {
    "prompt": "x",
    "left_model": "l",
    "right_model": "r",
    "vote_type": "leftvote",
    "left_image": A,
    "right_image": B,
}
RATED = {"Index": "1", "Prompt": "x", "HumanRatings": {"A": [5], "B": [1]}, "A": A, "B": B}
SAMPLE = {"jpg_0.jpg": A, "jpg_1.jpg": B, "label_0.txt": b"1", "label_1.txt": b"0", "original_prompt.txt": b"x"}


def text(name: str) -> Callable[[Path, list[Any]], None]:
    def write(root: Path, rows: list[Any]) -> None:
        lines = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        (root / name).write_text(lines)
        for folder in (root, root / "train", root / "test_images"):
            folder.mkdir(exist_ok=True)
            (folder / "a.jpg").write_bytes(A)
            (folder / "b.jpg").write_bytes(B)

    return write


def parquet(root: Path, rows: list[Any], schema: pa.Schema | None = None) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), root / "train.parquet")


def pickapic(root: Path, rows: list[Any]) -> None:
    parquet(root, [pickapic_row(1, **row) for row in rows], SCHEMA)


def tar(root: Path, rows: list[Any]) -> None:
    members = {f"{number}.{name}": content for number, row in enumerate(rows) for name, content in row.items()}
    write_tar(root / "0.tar", members)


def folders(root: Path, rows: list[Any]) -> None:
    for number, (caption, sides) in enumerate(rows):
        for side in sides:
            file = root / side / f"{number}.jpg"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(A)
        if caption is not None:
            (root / f"chosen/{number}.txt").write_text(caption)


def at(kind: Callable[..., PairReader], *args: Any, file: str = "") -> Callable[..., PairReader]:
    return lambda root, **options: kind(str(root / file), *args, **options)


BOTH, LONG = ("chosen", "rejected"), "x" * 10_001
KINDS: dict[str, tuple[Callable[[Path, list[Any]], None], Callable[..., PairReader], Any, list[Any]]] = {
    "own lines": (
        *(text("own.jsonl"), at(JSONLPairReader, file="own.jsonl"), OWN),
        [7, {**OWN, "prompt": 3}, {**OWN, "prompt": LONG}, {**OWN, "label": 2}, {**OWN, "input_image": "a.jpg"}],
    ),
    "own list": (text("own.json"), at(JSONLPairReader, file="own.json"), OWN, [None, {**OWN, "weight": -1}]),
    "hpdv3": (
        *(text("train.json"), at(HPDv3Reader, "train"), HPD3),
        [7, "x", {**HPD3, "prompt": 3}, {**HPD3, "choice_dist": [10**10, 1]}, {**HPD3, "path_src": "a.jpg"}],
    ),
    "hpdv2 pairs": (
        *(text("train.json"), at(HPDv2Reader, "train"), CHOICE),
        [None, {**CHOICE, "file_path": ["a.jpg"]}, {**CHOICE, "human_preference": [1]}, {**CHOICE, "src_img": "a.jpg"}],
    ),
    "hpdv2 groups": (
        *(text("train.json"), at(HPDv2Reader, "train"), RANKED),
        [{**RANKED, "rank": [1, None]}, {**RANKED, "prompt": LONG}],
    ),
    "imagereward": (
        *(text("test.json"), at(ImageRewardReader), ITEM),
        [{**ITEM, "ranking": [1]}, {**ITEM, "prompt": ["x"]}],
    ),
    "edits": (
        *(text("train.json"), at(EditPairReader, "train"), EDIT),
        [7, {**EDIT, "tie_case": "dim1"}, {**EDIT, "path_src": ["a.jpg"] * 17}, {**EDIT, "prompt": 3}],
    ),
    "votes on edits": (
        *(text("train.json"), at(EditPairReader, "train"), EDIT_VOTE),
        [{**EDIT_VOTE, "vote_type": vote} for vote in ("upvote", 1, "A>A")],
    ),
    "ranked edits": (
        *(text("train.json"), at(EditPairReader, "train"), EDIT_RANKED),
        [{**EDIT_RANKED, "human_vote": {"ranking": ranking}} for ranking in ("A>B>C", "A", None)],
    ),
    "pickapic": (pickapic, at(PickAPicReader, "train"), {}, [{"label_0": 2.0}, {"caption": LONG}]),
    "votes": (parquet, at(GenAIBenchReader, "train"), VOTE, [{**VOTE, "prompt": LONG}]),
    "ratings": (
        *(parquet, at(GenAIBenchCMUReader), RATED),
        [{**RATED, "HumanRatings": {"A": [6], "B": [1]}}, {**RATED, "Prompt": LONG}],
    ),
    "tars": (
        *(tar, at(PickAPicTarReader), SAMPLE),
        [{**SAMPLE, "label_0.txt": b"nan"}, {**SAMPLE, "original_prompt.txt": b"\xe9"}],
    ),
    "folders": (folders, at(FolderPairReader), ("x", BOTH), [(None, BOTH), ("x", BOTH[:1]), (LONG, BOTH)]),
}


def told(reader: PairReader) -> str:
    """Digest of all that a reader gives: names, prompts, labels, weights, and the bytes of all images, in order."""
    rows = []
    for number in range(len(reader)):
        pair = reader[number]
        images = []
        for image in (pair.image_a, pair.image_b, *sources_of(pair.prompt)):
            try:
                data = image.data if image.holds == "latents" else image_bytes(image)
                images.append([image.image_key, hashlib.sha256(data or b"").hexdigest()])
            except ImageError as error:
                images.append([image.image_key, error.problem])
        votes = None if pair.votes is None else [*pair.votes]
        rows.append([pair.pair_id, str(pair.prompt), pair.label_a, pair.weight, votes, pair.group_id, images])
    return f"{len(rows)} {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"


@pytest.mark.parametrize("sample", PINNED)
def test_committed_samples_read_as_pinned(sample: str) -> None:
    found = {split: told(build(on_error="skip")) for split, build in recognise(str(COMMITTED / sample)).items()}
    assert found == PINNED[sample]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_row_follows_on_error(kind: str, tmp_path: Path) -> None:
    """It stops the reader by one line with its name, is left out and counted, or keeps its place without a label."""
    write, build, good, bad_rows = KINDS[kind]
    for number, bad in enumerate(bad_rows):
        (root := tmp_path / f"{number}").mkdir()
        write(root, [good, bad, good])
        with pytest.raises(InputError, match=r"(?s)^[^\n]*\b[12]\b[^\n]*: .*on_error to skip or placeholder$") as error:
            build(root)
        assert "\n" not in str(error.value)
        skipping, every = build(root, on_error="skip"), build(root, on_error="placeholder")
        assert (len(skipping), skipping.skipped.total(), skipping.labelled().all()) == (2, 1, True)
        assert every.labelled().tolist() == [True, False, True] and every.remarks.total() == 1
        assert [one for n, one in enumerate(every.pair_ids()) if n != 1] == skipping.pair_ids()
        for reader in (skipping, every, pickle.loads(pickle.dumps(skipping))):
            pairs = [reader[row] for row in range(len(reader))]
            assert [pair.pair_id for pair in pairs] == reader.pair_ids()
            assert [pair.prompt for pair in pairs] == reader.prompts()
            labels = [np.nan if pair.label_a is None else pair.label_a for pair in pairs]
            np.testing.assert_array_equal(labels, reader.labels())


@pytest.mark.parametrize("kind", ["hpdv3", "imagereward", "edits", "ratings", "folders"])
def test_sides_change_at_random_by_name_and_seed(kind: str, tmp_path: Path) -> None:
    """A model that always prefers the first image would else be right wherever a file names the winner first."""
    write, build, good, _ = KINDS[kind]
    write(tmp_path, [good] * 40)
    plain, mixed = build(tmp_path, randomise_sides=False), build(tmp_path)
    assert set(plain.labels()) == {1.0}
    assert 8 < mixed.labels().sum() < 32
    for n in range(40):
        assert mixed[n] == (plain[n] if mixed.labels()[n] else plain[n].swapped())
    assert build(tmp_path, seed=1).labels().tolist() != mixed.labels().tolist()


OUTSIDE = ("../secret.jpg", "/etc/hostname", "in/../../secret.jpg", "link/secret.jpg")
ESCAPING: dict[str, Callable[[str], Any]] = {
    "own lines": lambda path: {**OWN, "image_b": path},
    "own list": lambda path: {**OWN, "source_images": [path]},
    "hpdv3": lambda path: {**HPD3, "path2": path},
    "hpdv2 pairs": lambda path: {**CHOICE, "file_path": ["a.jpg", path]},
    "hpdv2 groups": lambda path: {**RANKED, "image_path": ["a.jpg", path]},
    "imagereward": lambda path: {**ITEM, "generations": ["a.jpg", path]},
    "edits": lambda path: {**EDIT, "path2": path},
}


@pytest.mark.parametrize("kind", ESCAPING)
def test_no_row_opens_a_file_outside_its_folder(kind: str, tmp_path: Path) -> None:
    write, build, good, _ = KINDS[kind]
    (root := tmp_path / "set").mkdir()
    for place in (tmp_path / "secret.jpg", root / "secret.jpg"):
        place.write_bytes(A)
    for path in (*OUTSIDE, None, 7):
        write(root, [good, ESCAPING[kind](path)])
        for folder in (root, root / "train", root / "test_images"):
            if not (folder / "link").is_symlink():
                (folder / "link").symlink_to(tmp_path)
        with pytest.raises(InputError, match=r"\b[12]\b.*on_error|leads out of|not a path|path outside"):
            opened(build(root)[1])
        problems = opened(build(root, on_error="skip")[1], strict=False)
        assert problems in ([], ["path outside the root"], ["no image"]) and (problems or path is None)


def opened(pair: Any, strict: bool = True) -> list[str]:
    problems = []
    for image in (pair.image_a, pair.image_b, *sources_of(pair.prompt)):
        try:
            image_bytes(image)
        except ImageError as error:
            if strict:
                raise
            problems.append(error.problem)
    return problems
