"""One decoder for all texts, one reader of tables, one list of files that are nobody's data."""

from pathlib import Path

import pytest

from latentreward.core.errors import InputError
from latentreward.core.storage.json_files import decode_text, token_of_file
from latentreward.core.storage.user_files import find_files, is_ignored, split_pattern

TEXT = "ein Fuß, 3 m\r\n🦊"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_text_is_read_with_and_without_a_mark(encoding: str) -> None:
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    assert decode_text(mark + TEXT.encode(encoding), "a.txt") == TEXT


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("Fuß".encode("cp1252"), "not UTF-8 at byte 3"),
        (b"\xff\xfea", "not UTF-16 at byte 3"),
        ("Fu".encode("utf-16-le"), r"not text \(a null character after 1 characters\)"),
        ("Fuß".encode("utf-32"), r"not text \(a null character"),
    ],
)
def test_other_encodings_are_refused(data: bytes, problem: str) -> None:
    with pytest.raises(InputError, match=f"^a.txt is {problem}.*; save it as UTF-8$"):
        decode_text(data, "a.txt")


def test_a_token_may_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n", encoding="utf-16")
    assert token_of_file(tmp_path / "token", "token_file") == "secret"
    (tmp_path / "token").write_bytes(b"secr\xe9t")
    with pytest.raises(InputError, match=r"^token_file=.* cannot be read \(.*not UTF-8 at byte 5"):
        token_of_file(tmp_path / "token", "token_file")


def test_hidden_files_and_those_of_operating_systems_are_ignored(tmp_path: Path) -> None:
    ours = ["a.png", "b/c.png", "thumbs.png", "_d.png"]
    theirs = [
        ".e.png",
        ".git/z.png",
        "._a.png",
        "b/._c.png",
        "__MACOSX/a.png",
        "@eaDir/a.png",
        "b/.ipynb_checkpoints/c.png",
    ]
    for name in (*ours, *theirs, ".DS_Store", "Thumbs.db", "b/desktop.ini"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    found = find_files(tmp_path, "**/*.png")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == sorted(ours)
    assert find_files(*split_pattern(f"{tmp_path}/**/*.png")) == found
    assert find_files(*split_pattern(f"{tmp_path}/@eaDir/*.png")) == [tmp_path / "@eaDir/a.png"]
    assert not any(map(is_ignored, (*ours, "./a.png", "../b/a.png")))
    assert all(map(is_ignored, (*theirs, ".DS_Store", "Thumbs.db", "b/desktop.ini")))
