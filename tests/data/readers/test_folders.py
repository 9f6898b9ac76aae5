"""Plain folders: names in common, captions in three places."""

import json
import pickle
from pathlib import Path

import pytest

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import FolderPairReader, LoadedPair, PairDataset, PixelLoader, SkippedPair


@pytest.fixture
def write(tmp_path: Path, jpeg):
    """Write files; bytes from the name for images, text for the rest."""

    def write_files(*images: str, **texts: str) -> str:
        for number, name in enumerate(images):
            file = tmp_path / "pairs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg((20 * number % 256, 90, 40)))
        for name, text in texts.items():
            file = tmp_path / "pairs" / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return str(tmp_path / "pairs")

    return write_files


PAIRS = ("chosen/2.jpg", "rejected/2.PNG", "chosen/cats/1.webp", "rejected/cats/1.jfif")


def test_names_in_common_are_rows(write) -> None:
    root = write(*PAIRS, **{"captions__2.txt": " two\nlines\n", "chosen__cats__1.txt": "a cat"})
    reader = FolderPairReader(root, randomise_sides=False)
    assert reader.pair_ids() == ["2", "cats/1"]
    assert reader.prompts() == [" two\nlines", "a cat"]
    pair = reader[1]
    assert (pair.label_a, pair.prompt, pair.pair_id, pair.split) == (1.0, "a cat", "cats/1", "")
    assert (pair.image_a.image_key, pair.image_b.image_key) == ("chosen/cats/1.webp", "rejected/cats/1.jfif")
    assert isinstance(PairDataset(reader, PixelLoader(8, 8))[1], LoadedPair)
    assert pickle.loads(pickle.dumps(reader))[0] == reader[0]


def test_captions_file_comes_first(write) -> None:
    lines = "\n".join(json.dumps({"name": name, "prompt": f"of {name}"}) for name in ("cats/1", "2", "unused"))
    root = write(*PAIRS, **{"captions.jsonl": lines + "\n\n", "captions__2.txt": "not this one"})
    assert FolderPairReader(root).prompts() == ["of 2", "of cats/1"]


def test_unlike_captions_of_a_name_follow_on_error_and_a_name_without_picture_is_told(write, caplog) -> None:
    given = [("2", "two"), ("cats/1", "a cat"), ("2", "zwei"), ("cats/1", "a cat"), ("2", "two"), ("3.jpg", "three")]
    lines = "\n".join(json.dumps({"name": name, "prompt": prompt}) for name, prompt in given)
    root = write(*PAIRS, **{"captions.jsonl": lines})
    with pytest.raises(InputError, match=r"^2: captions.jsonl has 'two' and 'zwei' for it; correct the row"):
        FolderPairReader(root)
    reader = FolderPairReader(root, on_error="skip")
    assert (reader.prompts(), dict(reader.skipped)) == (["a cat"], {"several captions": 1})
    assert "captions.jsonl: no picture for 1 names, such as '3.jpg'" in caplog.text


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["rejected/3.jpg"], "no image in chosen/"),
        (["chosen/3.jpg", "rejected/3.jpg", "rejected/3.png"], "several images in rejected/"),
        (["chosen/4.jpg", "rejected/4.jpg"], "no caption"),
    ],
)
def test_incomplete_names_follow_on_error(write, extra, reason, caplog) -> None:
    captions = {"captions__2.txt": "two", "captions__3.txt": "three", "captions__cats__1.txt": "cat"}
    root = write(*PAIRS, *extra, **captions)
    reader = FolderPairReader(root, on_error="skip")
    assert (reader.pair_ids(), dict(reader.skipped)) == (["2", "cats/1"], {reason: 1})
    assert dict(FolderPairReader(root, on_error="placeholder").remarks) == {reason: 1}
    told = [line.partition("rows kept; ")[2] for line in caplog.messages]
    assert told == [f"left out: 1 {reason}", f"kept with a remark: 1 {reason}"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"name": 2, "prompt": "x"}'])
def test_odd_caption_lines(write, line) -> None:
    root = write(*PAIRS[:2], **{"captions.jsonl": line + '\n{"name": "2", "prompt": "two"}'})
    with pytest.raises(InputError, match=r"captions.jsonl:1: the line is not an object"):
        FolderPairReader(root)
    reader = FolderPairReader(root, on_error="skip")
    assert (reader.prompts(), dict(reader.skipped)) == (["two"], {"caption line not readable": 1})


@pytest.mark.parametrize(
    ("caption", "problem"),
    [("café".encode("cp1252"), "not UTF-8 at byte 4"), (None, "a path outside the root; put it into")],
)
def test_captions_that_are_no_text_or_lie_elsewhere_follow_on_error(write, tmp_path, caption, problem) -> None:
    root = write(*PAIRS, **{"captions__cats__1.txt": "a cat"})
    (tmp_path / "secret").write_text("not for you")
    file = Path(root, "chosen/2.txt")
    if caption is None:
        file.symlink_to(tmp_path / "secret")
    else:
        file.write_bytes(caption)
    with pytest.raises(InputError, match=f"^2: .*chosen/2.txt is {problem}"):
        FolderPairReader(root)
    reader = FolderPairReader(root, on_error="skip")
    assert (reader.prompts(), dict(reader.skipped)) == (["a cat"], {"caption not readable": 1})
    reader = FolderPairReader(root, on_error="placeholder")
    assert (reader.prompts(), reader.labelled().tolist()) == (["", "a cat"], [False, True])


def test_captions_of_other_programs_and_files_of_systems(write) -> None:
    root = write(*PAIRS, "chosen/._2.jpg", "rejected/._2.PNG", **{"chosen__cats__._1.txt": "\0"})
    Path(root, "chosen/2.txt").write_text("zwei\r\n", encoding="utf-8-sig")
    Path(root, "chosen/cats/1.txt").write_text("Füße", encoding="utf-16")
    assert FolderPairReader(root).prompts() == ["zwei", "Füße"]


def test_names_of_files_do_not_steer_the_terminal(write, tmp_path, caplog) -> None:
    root = write("\x1b[31m/chosen/1.jpg", "\x1b[31m/rejected/1.jpg", "\x1b[31m/chosen/2.jpg")
    Path(root, "\x1b[31m/chosen/1.txt").write_text("one")
    FolderPairReader(root, "\x1b[31m", on_error="skip")
    assert r"\x1b[31m" in caplog.text and "\x1b" not in caplog.text


def test_splits_and_missing_folders(write, tmp_path) -> None:
    root = write("train/chosen/1.jpg", "train/rejected/1.jpg", **{"train__captions__1.txt": "one", "val__x.txt": ""})
    reader = FolderPairReader(root, "train")
    assert (len(reader), reader[0].split, reader.pair_ids()) == (1, "train", ["train/1"])
    for split in (None, "val", "test"):
        with pytest.raises(InputError, match=r"root: no folder .*chosen"):
            FolderPairReader(root, split)
    (tmp_path / "pairs/val/chosen").mkdir()
    (tmp_path / "pairs/val/rejected").mkdir()
    with pytest.raises(InputError, match="no pairs in"):
        FolderPairReader(root, "val")


def test_links_out_of_the_folder_are_not_followed(write, tmp_path, jpeg) -> None:
    root = write(*PAIRS[:2], "rejected/3.jpg", **{"captions__2.txt": "two", "captions__3.txt": "three"})
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (tmp_path / "pairs/chosen/3.jpg").symlink_to(tmp_path / "secret.jpg")
    dataset = PairDataset(FolderPairReader(root, on_error="skip"), PixelLoader(8, 8))
    assert isinstance(dataset[1], SkippedPair)
    assert dict(dataset.skipped()) == {"path outside the root": 1}


def test_names_that_are_not_utf_8(write) -> None:
    root = Path(write("chosen/1.jpg", "rejected/1.jpg", **{"chosen__1.txt": "a cat"}))
    for name in ("chosen/1.jpg", "rejected/1.jpg", "chosen/1.txt"):
        (root / name).rename(root / name.replace("1", "\udcff"))
    reader = FolderPairReader(str(root), randomise_sides=False)
    assert (reader.pair_ids(), reader.prompts()) == (["\\udcff"], ["a cat"])
    assert isinstance(PairDataset(reader, PixelLoader(8, 8))[0], LoadedPair)


def test_a_folder_source_holds_the_pictures_to_edit(write) -> None:
    texts = {f"captions__{name.replace('/', '__')}.txt": "make it red" for name in ("2", "cats/1")}
    root = write(*PAIRS, "source/2.png", "source/cats/1.jpg", "source/unused.jpg", **texts)
    reader = FolderPairReader(root)
    keys = [[source.image_key for source in sources_of(prompt)] for prompt in reader.prompts()]
    assert keys == [["source/2.png"], ["source/cats/1.jpg"]]
    assert len({*reader.groups()}) == 2
    assert PairDataset(reader, PixelLoader(8, 8))[1].sources[0].shape == (3, 8, 8)
    ignoring = FolderPairReader(root, sources="ignore")
    assert ignoring.groups() == ["make it red"] * 2
    Path(root, "source/2.png").unlink()
    with pytest.raises(InputError, match="2: no image in source/"):
        FolderPairReader(root)
    assert FolderPairReader(root, on_error="skip").pair_ids() == ["cats/1"]
