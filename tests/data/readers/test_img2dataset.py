"""Folders as img2dataset writes them: tars, files and parquet, with captions and additional columns."""

import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.core.errors import InputError
from latentreward.data import Img2DatasetReader, PairDataset, PixelLoader
from latentreward.data.format_detection import recognise
from tests.data.conftest import write_tar

LOADER = PixelLoader(8, 8)
FORMATS = ("webdataset", "files", "parquet")
ROWS: list[dict[str, Any]] = [
    {"caption": "a cat", "score": 5.5, "rank": 1},
    {"caption": "a dog", "score": 4.0, "rank": 1},
    {"caption": "a cat", "score": 6.5, "rank": 2},
    {"caption": "a cat", "score": None, "rank": 2},
    {"caption": "alone", "score": 1.0, "rank": 1},
    {"caption": None, "score": 1.0, "rank": 1},
    {"caption": "a dog", "score": 4.0, "rank": 3},
    {"caption": "a cat", "score": 9.0, "rank": 1, "status": "failed_to_download"},
]
SHARD = 3


@pytest.fixture
def write(tmp_path: Path, jpeg):
    """Write rows in one of the formats, by shards of three; returns the folder."""

    def write_rows(kind: str, rows: list[dict[str, Any]] = ROWS, cut: int = 0) -> Path:
        root = tmp_path / kind
        root.mkdir(exist_ok=True)
        for shard in range(-(-len(rows) // SHARD)):
            metas, images = [], []
            for n, row in enumerate(rows[shard * SHARD : (shard + 1) * SHARD]):
                sizes = {"width": 20, "height": 12, "exif": "{}", "sha256": "0" * 64, "error_message": None}
                metas.append(
                    {"status": "success", "url": "https://x.y/z", "key": f"{shard:05d}{n:04d}", **sizes, **row}
                )
                images.append(jpeg((20 * (shard * SHARD + n), 40, 90)) if metas[-1]["status"] == "success" else None)
            sound = [(meta, image) for meta, image in zip(metas, images, strict=True) if image is not None]
            table = pa.Table.from_pylist(metas)
            if kind == "parquet":
                table = table.append_column("jpg", pa.array(images, pa.binary()))
                table = table.append_column("txt", pa.array([meta["caption"] for meta in metas], pa.string()))
            pq.write_table(table, root / f"{shard:05d}.parquet", compression="none", use_dictionary=False)
            members = {
                f"{meta['key']}.{ending}": content
                for meta, image in sound
                for ending, content in (
                    ("jpg", image),
                    ("txt", (meta["caption"] or "").encode()),
                    ("json", json.dumps(meta, indent=4).encode()),
                )
            }
            if kind == "webdataset":
                write_tar(root / f"{shard:05d}.tar", members)
            elif kind == "files":
                (root / f"{shard:05d}").mkdir(exist_ok=True)
                for name, content in members.items():
                    (root / f"{shard:05d}" / name).write_bytes(content)
            (root / f"{shard:05d}_stats.json").write_text("{}")
        if cut:
            tar = root / "00000.tar"
            tar.write_bytes(tar.read_bytes()[:cut])
        return root

    return write_rows


@pytest.mark.parametrize("kind", FORMATS)
def test_images_of_a_caption_are_compared(write, jpeg, kind) -> None:
    reader = Img2DatasetReader(write(kind), rating="score")  # a Path does too
    suffix = ".jpg" if kind == "files" else ""
    cats, dogs = (
        [f"00000/00000{n}{suffix}" for n in ("0000", "0002")],
        [f"00000/000000001{suffix}", f"00002/000020000{suffix}"],
    )
    cats.append(f"00001/000010000{suffix}")
    pairs = [reader[n] for n in range(len(reader))]
    assert [(pair.prompt, pair.label_a) for pair in pairs] == [
        ("a cat", 0.0),
        ("a cat", None),
        ("a cat", None),
        ("a dog", 0.5),
    ]
    assert [pair.image_a.image_key for pair in pairs] == [cats[0], cats[0], cats[1], dogs[0]]
    assert [pair.image_b.image_key for pair in pairs] == [cats[1], cats[2], cats[2], dogs[1]]
    assert {pair.group_id for pair in pairs} == {"a cat", "a dog"}
    assert reader.remarks["image without score (the reader's setting rating names its column)"] == 1
    assert (reader.skipped["no caption"], reader.skipped["only image of its caption"]) == (1, 1)
    assert reader.skipped["not downloaded ('failed_to_download')"] == (kind == "parquet")
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        both = copy[3].image_a, copy[3].image_b
        assert [one.data or one.path.read_bytes() for one in both] == [jpeg((20 * n, 40, 90)) for n in (1, 6)]
        assert PairDataset(copy, LOADER)[0].pixels_a.shape == (3, 8, 8)


@pytest.mark.parametrize("kind", FORMATS)
def test_groups_and_ratings_are_columns(write, kind) -> None:
    rows = [
        {"caption": "x", "set": 7, "rank": 2},
        {"caption": "x", "set": 7, "rank": 1},
        {"caption": "x", "set": 8, "rank": 1},
    ]
    root = str(write(kind, rows))
    reader = Img2DatasetReader(root, rating="rank", best="lowest", group="set")
    assert (reader.labels().tolist(), reader[0].group_id) == ([0.0], "7")
    assert not Img2DatasetReader(root, group="set").labelled().any()
    for settings, message in [
        ({"rating": "rnak"}, r"rating: no image of .* has the column 'rnak'; did you mean 'rank'"),
        ({"group": "batch"}, r"group: no image of .* has the column 'batch'"),
        ({"group": "set", "max_group": 1}, r"00000/0000.* 2 images with set '7', more than max_group=1; correct"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            Img2DatasetReader(root, **{"rating": "rank", **settings})
        assert "\n" not in str(error.value)


def test_bad_rows_follow_on_error(write) -> None:
    cats = [{"caption": "a cat", "score": "1.0"}, {"caption": "a cat", "score": "2.0"}]
    bad = [{"caption": "a dog", "score": "good"}, {"caption": "a dog", "score": "bad"}]
    long = [{"caption": "x" * 99, "score": "1.0"}, {"caption": "x" * 99, "score": "2.0"}]
    mixed = [{"caption": "one", "score": "1.0", "set": 1}, {"caption": "two", "score": "2.0", "set": 1}]
    cases = [
        (cats + bad, "caption", "score is 'good', not a number"),
        (cats + long, "caption", "prompt has 99 characters"),
    ]
    cases += [([{**row, "set": 0} for row in cats] + mixed, "set", "2 captions with set '1'")]
    for rows, group, message in cases:
        root = str(write("webdataset", rows))
        options = {"rating": "score", "group": group, "max_prompt_chars": 50}
        with pytest.raises(InputError, match=message):
            Img2DatasetReader(root, **options)
        assert Img2DatasetReader(root, on_error="skip", **options).labels().tolist() == [0.0]
        labels = Img2DatasetReader(root, on_error="placeholder", **options).labelled().tolist()
        assert labels == [True, False]


@pytest.mark.parametrize("text", ["{", '{"caption": "b", "caption": "c"}'])
def test_a_json_that_cannot_be_read_is_one_image_less(write, text) -> None:
    root = write("files")
    (root / "00000" / "000000001.json").write_text(text)
    with pytest.raises(InputError, match=r"00000/000000001\.jpg: json is '\{.*', not an object; correct the row"):
        Img2DatasetReader(str(root), rating="score")
    for on_error in ("skip", "placeholder"):
        reader = Img2DatasetReader(str(root), rating="score", on_error=on_error)
        assert (set(reader.prompts()), reader.skipped["txt or json not readable"]) == ({"a cat"}, 1)


@pytest.mark.parametrize("kind", ["webdataset", "files"])
def test_a_text_that_is_not_utf_8_is_one_image_less(write, kind) -> None:
    root = write(kind)
    if kind == "files":
        (root / "00000" / "000000001.txt").write_bytes(b"caf\xe9")
    else:
        tar = next(tar for tar in root.glob("*.tar") if b"a cat" in tar.read_bytes())
        tar.write_bytes(tar.read_bytes().replace(b"a cat", b"\xe9 cat", 1))
    with pytest.raises(InputError, match=r"txt is not UTF-8 at byte \d; save it as UTF-8; correct the row"):
        Img2DatasetReader(str(root), rating="score")
    reader = Img2DatasetReader(str(root), rating="score", on_error="skip")
    assert reader.skipped["txt or json not readable"] == 1
    unrated = Img2DatasetReader(str(root), on_error="skip")
    assert "image without a rating (the reader's setting rating names its column)" in unrated.remarks


def test_a_tar_that_ends_early_keeps_whole_samples(write) -> None:
    root = str(write("webdataset", [{"caption": "a cat", "score": float(n)} for n in range(3)], cut=7000))
    with pytest.raises(InputError, match=r"00000\.tar: the tar ends early"):
        Img2DatasetReader(root, rating="score")
    assert len(Img2DatasetReader(root, rating="score", on_error="skip")) == 1


def header(size: int, kind: bytes = tarfile.REGTYPE, more: bool = False) -> bytes:
    """Header of any size, in base 256 as GNU tar writes large ones; with ``more``, a sparse map is to follow."""
    block = bytearray(tarfile.TarInfo("9.jpg").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.to_bytes(12, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")
    block[156:157], block[482] = kind, more
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


def pax(**fields: str) -> bytes:
    """Pax header with fields, and the member that it describes."""
    member = tarfile.TarInfo("9.jpg")
    member.pax_headers = {name.replace("__", "."): value for name, value in fields.items()}
    return member.tobuf(tarfile.PAX_FORMAT)


HOSTILE = {
    "member of negative size": header(-512),
    "member of negative size beyond the start": header(-(2**40)),
    "member of 2^70 bytes": header(2**70),
    "name of 2^40 bytes": header(2**40, tarfile.GNUTYPE_LONGNAME),
    "name of 2^70 bytes": header(2**70, tarfile.GNUTYPE_LONGNAME),
    "name of negative size": header(-512, tarfile.GNUTYPE_LONGNAME),
    "pax header of 2^62 bytes": header(2**62, tarfile.XHDTYPE),
    "pax header of 2^70 bytes": header(2**70, tarfile.XGLTYPE),
    "pax size that leads back to its header": pax(size="-1536"),
    "pax size of 20 digits": pax(size="9" * 20),
    "sparse map that is no map": pax(GNU__sparse__major="1", GNU__sparse__minor="0") + b"9" * 512,
    "sparse member without its map": header(0, tarfile.GNUTYPE_SPARSE, more=True),
    "names of a name without end": header(0, tarfile.GNUTYPE_LONGNAME) * 2000,
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_a_hostile_tar_is_one_line_and_keeps_its_whole_samples(write, damage) -> None:
    root = write("webdataset", [{"caption": "a cat", "score": float(n)} for n in range(2)])
    tar = root / "00000.tar"
    with tarfile.open(tar) as archive:
        archive.getmembers()
        end = archive.offset
    tar.write_bytes(tar.read_bytes()[:end] + HOSTILE[damage])
    with pytest.raises(InputError, match=r"00000\.tar: the tar ends early \(.*\); download it again") as error:
        Img2DatasetReader(str(root), rating="score")
    assert "\n" not in str(error.value)
    assert len(Img2DatasetReader(str(root), rating="score", on_error="skip")) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture_is_found_when_it_is_decoded(write, kind, jpeg) -> None:
    root = write(kind, [{"caption": "a cat", "score": float(n)} for n in range(2)])
    whole = jpeg((20, 40, 90))
    for path in root.rglob("*"):
        if path.is_file() and whole in (data := path.read_bytes()):
            path.write_bytes(data.replace(whole, whole[:200] + bytes(len(whole) - 200)))
    pairs = PairDataset(Img2DatasetReader(str(root), rating="score", on_error="skip"), LOADER)
    assert type(pairs[0]).__name__ == "SkippedPair"


def test_many_images_keep_a_compact_index(tmp_path) -> None:
    """Most of a large folder are images with a caption of their own, which no pair needs."""
    shards, size = 20, 500
    for shard in range(shards):
        captions = [f"a caption of usual length, number {n - (n % 10 == 1)}, of shard {shard}" for n in range(size)]
        columns = {"key": [f"{shard:05d}{n:04d}" for n in range(size)], "caption": captions, "jpg": [b"x"] * size}
        pq.write_table(
            pa.table({**columns, "score": [0.1 * n for n in range(size)]}), tmp_path / f"{shard:05d}.parquet"
        )
    Img2DatasetReader(str(tmp_path), rating="score")  # imports what it needs, which would count
    tracemalloc.start()
    reader = Img2DatasetReader(str(tmp_path), rating="score")
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(reader) == len(set(reader.groups())) == shards * 50
    assert kept / (shards * size) < 25 and most / (shards * size) < 250  # bytes outside of Arrow's pool
    assert reader[len(reader) - 1].image_b.image_key == "00019/000190491"


@pytest.mark.parametrize("kind", FORMATS)
def test_the_folder_is_recognised(write, kind) -> None:
    (build,) = recognise(str(write(kind))).values()
    assert isinstance(build(rating="score"), Img2DatasetReader)
