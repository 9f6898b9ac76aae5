"""One rule for a path: what lists files finds the same ones, and what opens a file that a row names opens the same."""

import json
from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentreward.core.contracts import ImageRef, sources_of
from latentreward.core.errors import InputError
from latentreward.core.storage import user_files
from latentreward.core.storage.run_folder import PartFiles
from latentreward.data import (
    DatasetPairReader,
    FolderPairReader,
    JSONLPairReader,
    PairStream,
    PickAPicTarReader,
    decode_image,
)
from latentreward.data.alignment.prompt_files import read_prompt_set
from latentreward.data.format_detection import recognise
from latentreward.data.image_lists import read_images
from latentreward.data.score_table import read_table
from latentreward.reward.scoring.image_lists import read_scores

NFC, NFD = normalize("NFC", "é"), normalize("NFD", "é")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def picture(file: Path, caption: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file, "PNG")
    if caption:
        file.with_suffix(".txt").write_text(caption)
    return file


def test_every_list_of_files_follows_links_to_folders_and_none_in_a_circle(tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        picture(tmp_path / "set [1]" / side / "1.png", "one")
        picture(tmp_path / "disk" / side / "cats/2.png", "two")
        (tmp_path / "set [1]" / side / "away").symlink_to(tmp_path / "disk" / side)
        (tmp_path / "set [1]" / side / "again").symlink_to(tmp_path / "set [1]" / side)
        (tmp_path / "disk" / side / "up").symlink_to(tmp_path)
        (tmp_path / "disk" / side / "back").symlink_to(tmp_path / "set [1]" / side)
        (tmp_path / "set [1]" / side / "self").symlink_to("self")
        picture(tmp_path / "disk" / side / ".hidden/3.png")
    root = tmp_path / "set [1]"
    names = ["1", "away/cats/2"]
    for source in (root / "chosen", root / "chosen/**/*.png", root / "chosen/**"):
        rows = read_images(str(source)).rows
        assert [(row.name, row.prompt) for row in rows] == [("1.png", "one"), ("away/cats/2.png", "two")]
        assert all(decode_image(row.ref()) for row in rows)
    assert [row.prompt for row in read_prompt_set(f"{root}/**/*.txt")] == ["one", "two"] * 2
    reader = FolderPairReader(str(root), allow_outside=True)
    assert (reader.pair_ids(), reader.prompts()) == (names, ["one", "two"])
    assert all(decode_image(image) for n in range(2) for image in (reader[n].image_a, reader[n].image_b))
    with pytest.raises(InputError, match=r"away/cats/2.*path outside the root"):
        FolderPairReader(str(root))  # the caption, which could be a private text behind a stranger's link


def test_folders_that_lead_to_each_other_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_files, "MOST_LINKS", 30)
    for folder in "abcd":
        picture(tmp_path / folder / "1.png")
        for other in set("abcd") - {folder}:
            (tmp_path / folder / other).symlink_to(tmp_path / other)
    with pytest.raises(InputError, match="over 30 links to folders"):
        read_images(str(tmp_path))


def jsonl(folder: Path, name: str, **options: bool) -> ImageRef:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "x", "chosen": name, "rejected": name}))
    return JSONLPairReader(folder / "rows.jsonl", **options)[0].image_a


def column(folder: Path, name: str, kind: pa.DataType | None = None, **options: bool) -> ImageRef:
    value = {"bytes": None, "path": name} if kind else name
    pair = dict.fromkeys(("chosen", "rejected"), pa.array([value], kind))
    pq.write_table(pa.table({"prompt": ["x"], **pair}), folder / "rows.parquet")
    return DatasetPairReader(folder / "rows.parquet", **options)[0].image_b


def struct(folder: Path, name: str, **options: bool) -> ImageRef:
    return column(folder, name, STRUCT, **options)


def streamed(folder: Path, name: str, **options: bool) -> ImageRef:
    struct(folder, name, allow_outside=True)
    (pair,) = PairStream(str(folder / "rows.parquet"), "rows", **options).pairs(0, 1, 0, print)
    return pair.image_a


def listed(folder: Path, name: str, **options: bool) -> ImageRef:
    (folder / "list.csv").write_text(f'image,prompt\n"{name}",x\n', encoding="utf-8")
    return read_images(str(folder / "list.csv"), **options).rows[0].ref()


def edited(folder: Path, name: str) -> ImageRef:
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "x", "source_images": [name]}))
    return sources_of(read_prompt_set(str(folder / "prompts.jsonl"))[0].prompt)[0]


OPENERS = (jsonl, column, struct, streamed, listed, edited)


@pytest.mark.parametrize("find", OPENERS)
@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a.png", True),
        ("./sub/../a.png", True),
        ("{root}/a.png", True),
        ("sub\\b.png", True),
        (f"caf{NFC}/{NFD}.png", True),
        ("blob.png", True),  # as in the hub's cache
        ("sub/blob.png", True),
        ("100%25 [x].png", True),
        ("../../../../secret.png", False),
        ("..\\..\\..\\..\\secret.png", False),
        ("{outside}", False),
        ("link.png", False),
        ("folder/secret.png", False),
        ("other.png", False),  # a blob of another repository
        ("evil.png", False),  # through a link in the place of blobs
    ],
)
def test_every_row_names_files_in_its_folder_and_in_the_blobs_of_its_snapshot(
    tmp_path: Path, find: Callable[..., ImageRef], name: str, inside: bool
) -> None:
    repository = tmp_path / "hub/datasets--me--set"
    root = repository / "snapshots/0a1b"
    for file in ("a.png", "sub/b.png", f"caf{NFD}/{NFC}.png", "100%25 [x].png"):
        picture(root / file)
    outside = picture(tmp_path / "secret.png")
    picture(tmp_path / "hub/snapshots/evil/blobs/x")
    if name == "evil.png":  # the folder of snapshots is the stranger's, with blobs that lead to anywhere
        (repository / "blobs").symlink_to(tmp_path)
        (root / name).symlink_to("../../blobs/secret.png")
    else:
        picture(repository / "blobs/7f")
    (root / "blob.png").symlink_to("../../blobs/7f")
    (root / "sub/blob.png").symlink_to("../../../blobs/7f")
    (root / "link.png").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path)
    (root / "other.png").symlink_to(picture(tmp_path / "hub/datasets--you--set/blobs/7f"))
    name = name.format(root=root, outside=outside)
    if inside:
        assert decode_image(find(root, name)).size == (8, 8)
        return
    with pytest.raises(InputError, match=r"leads out of .*allow_outside"):
        decode_image(find(root, name))
    if find is not edited and name[:3] != "..\\":
        assert decode_image(find(root, name, allow_outside=True)).size == (8, 8)


def test_captions_are_found_in_either_unicode_form(tmp_path: Path) -> None:
    picture(tmp_path / f"chosen/{NFC}/{NFD}.png")
    picture(tmp_path / f"rejected/{NFD}/{NFC}.png")
    (tmp_path / f"captions/{NFD}").mkdir(parents=True)
    (tmp_path / f"captions/{NFD}/{NFD}.txt").write_text("one")
    assert FolderPairReader(str(tmp_path)).prompts() == ["one"]
    (tmp_path / "captions.jsonl").write_text(json.dumps({"name": f"{NFD}/{NFC}", "prompt": "two"}))
    assert FolderPairReader(str(tmp_path)).prompts() == ["two"]
    (tmp_path / "chosen/metadata.jsonl").write_text(json.dumps({"file_name": f"{NFD}/{NFD}.png", "prompt": "three"}))
    found = read_images(str(tmp_path / "chosen"))
    assert ([row.prompt for row in found.rows], found.remarks) == (["three"], ())


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("p.txt", read_prompt_set),
        ("p.jsonl", read_prompt_set),
        ("p.parquet", read_prompt_set),
        ("p.jsonl", JSONLPairReader),
        ("p.parquet", DatasetPairReader),
        ("p.parquet", recognise),
        ("p.jsonl", read_images),
        ("p.png", lambda file: decode_image(ImageRef("p", path=Path(file)))),
        ("p.png", lambda file: decode_image(ImageRef("p", Path(file).read_bytes()))),
        ("p.csv", lambda file: read_table(Path(file))),
        ("p.tar", PickAPicTarReader),
        ("chosen/1.txt", lambda file: FolderPairReader(str(Path(file).parents[1]))),
    ],
)
def test_a_git_lfs_pointer_is_told_by_name(tmp_path: Path, name: str, read: Callable[[str], object]) -> None:
    picture(tmp_path / "chosen/1.png")
    picture(tmp_path / "rejected/1.png")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(InputError, match="a git-lfs pointer, not the file; run `git lfs pull`") as error:
        read(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["s:1.csv", "file:x.csv", "s3:x.parquet", "a::b.parquet"])
def test_a_name_with_a_colon_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    table = pa.table({"image": ["a", "b"], "score": pa.array([1.0, 2.0], pa.float32())})
    with PartFiles(Path(name), {}, 2) as parts:
        parts.write(range(2), table)
        parts.finish()
    assert read_scores(Path(name)).to_pydict() == table.to_pydict() == read_table(Path(name)).to_pydict()


@pytest.mark.parametrize("folder", ["hf:1", "a [v2]", "a*b", "%20"])
def test_parquet_files_in_folders_of_any_name_are_read_and_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    image = picture(tmp_path / "a.png").read_bytes()
    pair = dict.fromkeys(("chosen", "rejected"), pa.array([{"bytes": image, "path": None}], STRUCT))
    Path(folder).mkdir()
    pq.write_table(pa.table({"prompt": ["x"], **pair}), tmp_path / folder / "train.parquet")
    for memory_map in (False, True):
        assert DatasetPairReader(folder, memory_map=memory_map)[0].image_a.data == image
    assert [pair.image_a.data for pair in PairStream(folder).pairs(0, 1, 0, print)] == [image]
