"""Scores of pictures and edits: forms of requests and replies, batches, cache, and replies that are none."""

import base64
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentreward.core.contracts import EditPrompt, ImageRef
from latentreward.core.errors import InputError
from latentreward.core.interrupts import stop_asked
from latentreward.reward import PlainJSON, RemoteError, RemoteServer, ServedImages, edit_prompt
from latentreward.reward.remote.client import RemoteImages
from latentreward.reward.remote.schemas import source_texts
from tests.reward.remote.judges import judged, judging, opened, plain, says

PROMPTS = ["a red circle", "two blue squares", "a cross", "a red circle", "à la carte 🙂"]
IMAGES = [Image.new("RGB", (8 + number, 8), (40 * number, 0, 0)) for number in range(4)] + [Image.new("RGB", (8, 8))]
EXPECTED = [judged(*row) for row in zip(PROMPTS, IMAGES, strict=True)]


def images(url: str, schema: PlainJSON | None = None, batch_size: int = 2, **settings: Any) -> RemoteImages:
    server = RemoteServer(url, **{"timeout_s": 10.0, "retry_s": 0.0, **settings})
    return RemoteImages(server, schema or PlainJSON(), batch_size)


def test_scores_come_in_order() -> None:
    with judging() as judge:
        assert images(judge.url).begin(PROMPTS, IMAGES)() == pytest.approx(EXPECTED)
        assert sorted(judge.sizes) == [1, 2, 2]


def test_equal_rows_are_asked_once_and_remembered() -> None:
    with judging() as judge:
        source = images(judge.url, batch_size=8)
        twice = source.begin(PROMPTS * 2, [image.copy() for image in IMAGES * 2])()
        assert twice == pytest.approx(EXPECTED * 2)
        assert judge.sizes == [5]
        assert source.begin(PROMPTS, IMAGES)() == twice[:5]
        source.begin(["another prompt"], IMAGES[:1])()
        assert judge.sizes == [5, 1]


def test_the_cache_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentreward.reward.remote.client.CACHED", 2)
    with judging() as judge:
        source = images(judge.url, batch_size=8)
        assert source.begin(PROMPTS, IMAGES)() == pytest.approx(EXPECTED)
        source.begin(PROMPTS[-2:], IMAGES[-2:])()
        assert judge.sizes == [5]
        assert source.begin(PROMPTS, IMAGES)() == pytest.approx(EXPECTED)
        assert judge.sizes == [5, 3]


@pytest.mark.parametrize(("parallel", "least"), [(1, 0.6), (3, 0.2)])
def test_no_more_requests_at_a_time_than_set(parallel: int, least: float) -> None:
    with judging() as judge:
        judge.delay_s = 0.2
        began = time.monotonic()
        assert images(judge.url, parallel=parallel).begin(PROMPTS, IMAGES)() == pytest.approx(EXPECTED)
        assert time.monotonic() - began >= least
        ends = sorted([(begin, 1) for begin, _ in judge.times] + [(end, -1) for _, end in judge.times])
        running = [sum(step for _, step in ends[: place + 1]) for place in range(len(ends))]
        assert max(running) == parallel


def test_scores_are_asked_for_before_they_are_waited_for() -> None:
    with judging() as judge:
        pending = images(judge.url, batch_size=8).begin(PROMPTS, IMAGES)
        until = time.monotonic() + 600
        while not judge.times and time.monotonic() < until:
            time.sleep(0.01)
        assert judge.sizes == [5]
        assert pending() == pytest.approx(EXPECTED)


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ({"scores": [0.5]}, "1 scores came for 2 rows"),
        ({"scores": [0.5, 0.5, 0.5]}, "3 scores came for 2 rows"),
        (b'{"scores": [0.5, NaN]}', r"score \[1\]: it must be a finite number, not nan"),
        (b'{"scores": [0.5, 1e39]}', r"score \[1\]: it must be less than or equal to .*, not 1e\+39"),
        (b'{"scores": [0.5, 1' + b"0" * 400 + b"]}", r"score \[1\]: "),
        ({"scores": [0.5, "0.5"]}, r"score \[1\]: it must be a valid number, not '0.5'"),
        ({"scores": [0.5, None]}, r"score \[1\]: it must be a valid number, not None"),
        ({"scores": [0.5, True]}, r"score \[1\]: it must be a valid number, not True"),
        ({"scores": 3}, "PlainJSON cannot read the answer"),
        ({"rewards": [0.5, 0.5]}, "KeyError: 'scores'"),
        ([0.5, 0.5], "PlainJSON cannot read the answer"),
    ],
)
def test_a_wrong_reply_is_told_in_one_line(reply: Any, told: str) -> None:
    with judging(faults=[says(200, reply)]) as judge, pytest.raises(RemoteError, match=told) as raised:
        images(judge.url).begin(PROMPTS[:2], IMAGES[:2])()
    assert str(raised.value).startswith(f"reward server {judge.url}: ")
    assert str(raised.value).isprintable()
    assert len(judge.headers) == 1


def test_a_failed_request_leaves_the_others_scores_and_gives_up_what_waits() -> None:
    """The source can be asked again afterwards."""
    with judging(faults=[says(200, {"scores": []})]) as judge:
        source = images(judge.url, parallel=1)
        with pytest.raises(RemoteError, match="0 scores came for"):
            source.begin(PROMPTS, IMAGES)()
        assert source.begin(PROMPTS, IMAGES)() == pytest.approx(EXPECTED)


def test_a_signal_ends_the_wait_for_a_try_under_way() -> None:
    with judging() as judge:
        judge.delay_s = 60.0
        pending, began = images(judge.url, timeout_s=60.0).begin(PROMPTS, IMAGES), time.monotonic()
        timer = threading.Timer(0.3, stop_asked.set)
        timer.start()
        try:
            with pytest.raises(RemoteError, match="a signal ended the wait for its answer"):
                pending()
        finally:
            timer.join()
            stop_asked.clear()
        assert time.monotonic() - began < 30


def test_another_model_behind_the_same_address_is_noticed() -> None:
    names = iter(["first", "first", "second"])
    with judging(lambda request: {**plain(request), "model": next(names)}) as judge:
        source = images(judge.url, parallel=1)
        source.begin(PROMPTS[:3], IMAGES[:3])()
        with pytest.raises(RemoteError, match="the model is now second, but was first before"):
            source.begin(PROMPTS[3:], IMAGES[3:])()


def test_a_schema_of_ones_own() -> None:
    class Sums(PlainJSON):
        def scores(self, reply, request):
            if "answers" not in reply:
                raise InputError("no answers")
            return [sum(one) for one in reply["answers"]]

    with judging(lambda request: {"answers": [[1, 2], [3, 4]]}) as judge:
        assert images(judge.url, Sums()).begin(PROMPTS[:2], IMAGES[:2])() == [3, 7]


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ({"answer": []}, r"Best cannot read the answer \(KeyError: 'best'\)"),
        ({"best": 3}, r"Best cannot read .* \(TypeError"),
        ({"best": [1, 2], "judge": 3}, r"Best cannot read .* \(AttributeError"),
    ],
)
def test_an_error_of_a_schema_of_ones_own_is_a_refusal(reply: dict[str, Any], told: str) -> None:
    """Other ranks wait for scores or a refusal; any other error would leave them waiting."""

    class Best(PlainJSON):
        def scores(self, reply, request):
            return reply["best"]

        def model(self, reply):
            return reply["judge"].name if "judge" in reply else None

    with judging(faults=[says(200, reply)]) as judge, pytest.raises(RemoteError, match=told) as raised:
        images(judge.url, Best()).begin(PROMPTS[:2], IMAGES[:2])()
    assert str(raised.value).startswith(f"reward server {judge.url}: ")


RED, BLUE, GREY = (Image.new("RGB", (9, 8), colour) for colour in ("red", "blue", "grey"))


def redder(request: dict[str, Any]) -> dict[str, Any]:
    """How much redder pictures are than the ones that were edited."""
    before = [sum(judged("", opened(text)) for text in row) for row in request["source_images"]]
    after = [judged("", opened(text)) for text in request["images"]]
    return {"scores": [new - old for new, old in zip(after, before, strict=True)]}


def test_sources_are_sent_with_each_image(tmp_path: Path) -> None:
    BLUE.save(tmp_path / "blue.jpg")
    in_file = EditPrompt("make it red", [ImageRef("blue", path=tmp_path / "blue.jpg")])
    prompts = [edit_prompt("make it red", given) for given in (RED, BLUE, [BLUE, RED])] + [in_file]
    with judging(redder) as judge:
        found = images(judge.url, batch_size=8).begin(prompts, [RED, RED, RED, GREY])()
    assert found == pytest.approx([0, 1, 0, judged("", GREY)], abs=0.01)


def test_a_source_is_sent_as_its_file_unless_readers_would_differ(tmp_path: Path) -> None:
    """A photograph as PNG is several times its size; one on its side, or with alpha, is sent as it is seen."""
    lying = Image.Exif()
    lying[0x0112] = 6
    BLUE.save(tmp_path / "plain.jpg", quality=50)
    BLUE.save(tmp_path / "plain.png")
    BLUE.save(tmp_path / "lying.jpg", exif=lying)
    BLUE.convert("RGBA").save(tmp_path / "alpha.png")
    BLUE.convert("L").save(tmp_path / "grey.jpg")
    BLUE.save(tmp_path / "other.webp", lossless=True)
    names = ["plain.jpg", "plain.png", "lying.jpg", "alpha.png", "grey.jpg", "other.webp"]
    (texts,) = source_texts([EditPrompt("make it red", [ImageRef(name, path=tmp_path / name) for name in names])])
    sent = [*map(base64.b64decode, texts)]
    same = [data == (tmp_path / name).read_bytes() for name, data in zip(names, sent, strict=True)]
    assert same == [True, True, False, False, False, False]
    made = [Image.open(BytesIO(data)) for data in sent[2:]]
    assert [(image.format, image.mode) for image in made] == [("PNG", "RGB")] * 4
    assert [image.size for image in made] == [(8, 9), (9, 8), (9, 8), (9, 8)]


def test_scores_are_remembered_by_image_and_sources() -> None:
    prompts = [edit_prompt("make it red", source) for source in (RED, BLUE, RED)]
    with judging(redder) as judge:
        source = images(judge.url, batch_size=8)
        assert source.begin(prompts, [RED] * 3)() == [0, 1, 0]
        assert source.begin(prompts, [RED] * 3)() == [0, 1, 0]
        assert judge.sizes == [2]
        source.begin([edit_prompt("make it red", [RED, BLUE])], [RED])()
        assert judge.sizes == [2, 1]


def test_latentreward_serve_gets_sources_that_a_request_shares_once() -> None:
    red, blue = (edit_prompt("make it red", source) for source in (RED, BLUE))
    of_red, of_blue = source_texts([red, blue])
    for prompts, sent in (([red] * 3, of_red), ([red], of_red), ([red, blue], [of_red, of_blue]), (["a cat"], None)):
        assert ServedImages().request(prompts, ["x"] * len(prompts)).get("source_images") == sent
    assert PlainJSON().request([red] * 2, ["x"] * 2)["source_images"] == [of_red] * 2
