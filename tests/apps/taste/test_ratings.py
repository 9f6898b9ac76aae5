"""Ratings are on the disk one by one, go on after any stop, and reach nobody else's pages."""

import json
import os
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from latentreward.apps.taste.pairs import RATINGS, collect
from latentreward.apps.taste.rating_page import MOST_BYTES, RatingServer
from latentreward.apps.taste.ratings import Ratings
from latentreward.apps.taste.splitting import split
from latentreward.core.errors import InputError
from tests.apps.taste.folders import draw, rating_server, unsorted_folder
from tests.limits import largest_file


def test_every_picture_is_shown_before_one_is_shown_again(tmp_path: Path) -> None:
    shown = Ratings(unsorted_folder(tmp_path, 24)).pairs
    assert len(shown) == 3 * 28 == len({frozenset(pair.names) for pair in shown})
    assert Counter(name for pair in shown[:12] for name in pair.names) == {f"{n:03}.png": 1 for n in range(24)}
    assert shown == Ratings(tmp_path).pairs != Ratings(tmp_path, seed=1).pairs


def test_pictures_of_one_caption_are_compared(tmp_path: Path) -> None:
    for number, caption in enumerate(["a cat", "A  cat", "a cat", "a dog", "", ""]):
        draw(tmp_path / f"{number}.png", number, caption)
    shown = Ratings(tmp_path).pairs
    assert {(*sorted(pair.names), pair.prompt) for pair in shown if pair.prompt} == {
        ("0.png", "1.png", shown[0].prompt or "a cat"),
        ("0.png", "2.png", shown[0].prompt or "a cat"),
        ("1.png", "2.png", shown[0].prompt or "a cat"),
    }
    assert {tuple(sorted(pair.names)) for pair in shown if not pair.prompt} == {
        ("3.png", "4.png"), ("3.png", "5.png"), ("4.png", "5.png"),
    }  # fmt: skip


def test_ratings_go_on_and_train_from_parts_without_common_pictures(tmp_path: Path) -> None:
    first = Ratings(unsorted_folder(tmp_path, 64))
    for _ in range(40):
        assert first.rate(first.next.names, "a")
    assert not first.rate(("000.png", "000.png"), "a")
    again = Ratings(tmp_path)
    assert again.done == 40 and again.next == first.next
    assert again.undo() and again.done == 39 and Ratings(tmp_path).done == 39
    for answer in ("b", "tie"):
        again.rate(again.next.names, answer)
    found = split(collect(tmp_path), 500, 0)
    assert sum(map(len, found.parts.values())) == 41


def test_a_broken_last_line_is_left_out_and_another_is_named(tmp_path: Path) -> None:
    ratings = Ratings(unsorted_folder(tmp_path, 4))
    ratings.rate(ratings.next.names, "a")
    whole = (tmp_path / RATINGS).read_bytes()
    (tmp_path / RATINGS).write_bytes(whole + b'{"image_a": "000')
    again = Ratings(tmp_path)
    assert again.done == 1 and any("broken off" in remark for remark in again.remarks)
    assert (tmp_path / RATINGS).read_bytes() == whole
    (tmp_path / RATINGS).write_bytes(whole.rstrip())
    assert Ratings(tmp_path).rate(ratings.next.names, "b")
    assert (tmp_path / RATINGS).read_bytes().startswith(whole)
    (tmp_path / RATINGS).write_bytes(b"[]\n\n{\n" + whole)
    told = r"ratings.jsonl: .* 2: line 1 \(\[\] is no JSON object\), line 3 \(cut off\); correct or remove them"
    with pytest.raises(InputError, match=told):
        Ratings(tmp_path)


@pytest.mark.parametrize("target", ["empty", "missing", "fifo", '{"chosen": "x.png", "rejected": "y.png"}\n'])
def test_no_answer_goes_through_a_link(tmp_path: Path, target: str) -> None:
    """Such as one to a file that a shell runs."""
    behind = tmp_path / "behind"
    if target == "fifo":
        os.mkfifo(behind)
    elif target != "missing":
        behind.write_text("" if target == "empty" else target)
    folder = unsorted_folder(tmp_path / "theirs", 3)
    (folder / RATINGS).symlink_to(behind)
    ratings = Ratings(folder)
    for _ in range(2):
        assert ratings.rate(ratings.next.names, "a")
    assert Ratings(folder).done == 2
    assert not behind.exists() if target == "missing" else behind.stat().st_size == len(target) * ("{" in target)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RatingServer]:
    with rating_server(unsorted_folder(tmp_path, 4)) as made:
        yield made


def ask(server: RatingServer, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        server.url + path.removeprefix("/"), data, {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_server_keeps_answers_to_the_pair_that_it_shows(server: RatingServer) -> None:
    state = json.loads(ask(server, "/state")[1])
    assert (state["done"], state["total"]) == (0, 6)
    answer = {**state["pair"], "answer": "tie"}
    assert ask(server, f"/picture/{state['places'][0]}")[1].startswith(b"\xff\xd8")
    assert ask(server, "/rate", answer)[0] == 200
    assert ask(server, "/rate", answer)[0] == 409  # the same click again, or another tab
    assert json.loads((server.folder / RATINGS).read_text())["label"] == "tie"
    assert json.loads(ask(server, "/undo", {})[1]) == state
    assert ask(server, "/undo", {})[0] == 409


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/rate", {"answer": "a"}, {"Content-Type": "text/plain"}, 400),
        ("/rate", {"answer": "c"}, {}, 400),
        ("/rate", {"answer": ["a"]}, {}, 400),
        ("/rate", [], {}, 400),
        ("/rate", b"[" * 9999, {}, 400),
        ("/rate", b" " * (MOST_BYTES + 1), {}, 400),
        ("/other", {}, {}, 400),
        ("/picture/9", None, {}, 404),
        ("/picture/../../etc/passwd", None, {}, 404),
        ("/picture/" + "9" * 5000, None, {}, 404),
        ("/[", None, {}, 404),
        ("/rate", {"answer": "a"}, {"Content-Length": "9" * 5000}, 400),
    ],
)
def test_other_requests_are_refused(server: RatingServer, path: str, body: Any, headers: Any, status: int) -> None:
    assert ask(server, path, body, **headers)[0] == status
    assert not (server.folder / RATINGS).exists()


@pytest.mark.parametrize("path", ["", "state", "picture/0", "rate", "undo"])
def test_another_account_of_this_machine_does_not_know_the_address(server: RatingServer, path: str) -> None:
    root, token, _ = server.url.rsplit("/", 2)
    with rating_server(server.folder) as other:
        known = other.url.rsplit("/", 2)[1]
    assert len(token) >= 22 and token != known
    for address in (f"{root}/{path}", f"{root}/{known}/{path}", f"{root}/{token[:-1]}/{path}", f"{root}/\xe9/{path}"):
        body = b'{"answer": "a"}' if path in ("rate", "undo") else None
        request = urllib.request.Request(quote(address, ":/"), body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            urllib.request.urlopen(request, timeout=300)
        assert refused.value.read() == b"open the whole address that the command printed at its last start"
    assert not (server.folder / RATINGS).exists()


def test_a_full_disk_keeps_earlier_ratings(server: RatingServer) -> None:
    answer = {**json.loads(ask(server, "/state")[1])["pair"], "answer": "a"}
    ask(server, "/rate", answer)
    kept = (server.folder / RATINGS).read_bytes()
    answer = {**json.loads(ask(server, "/state")[1])["pair"], "answer": "b"}
    with largest_file(len(kept) + 10):
        status, told = ask(server, "/rate", answer)
    assert status == 507 and b"ratings so far are kept" in told
    assert (server.folder / RATINGS).read_bytes() == kept
    assert ask(server, "/rate", answer)[0] == 200 and Ratings(server.folder).done == 2
