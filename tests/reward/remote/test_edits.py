"""Edits are sent with the pictures that were edited, and their scores are remembered by them."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentreward.core.contracts import EditPrompt, ImageRef
from latentreward.reward import ImageSchema, PlainJSON, RemoteError, RemoteServer, ServedImages, UniRL, edit_prompt
from latentreward.reward.remote.client import RemoteImages
from latentreward.reward.remote.schemas import source_texts
from tests.reward.remote.judges import judged, judging, opened, says

RED, BLUE, GREY = (Image.new("RGB", (9, 8), colour) for colour in ("red", "blue", "grey"))


def redder(request: dict[str, Any]) -> dict[str, Any]:
    """How much redder pictures are than the ones that were edited."""
    before = [sum(judged("", opened(text)) for text in row) for row in request["source_images"]]
    after = [judged("", opened(text)) for text in request["images"]]
    return {"scores": [new - old for new, old in zip(after, before, strict=True)]}


def unirl_redder(request: dict[str, Any]) -> dict[str, Any]:
    rows = [one["history"] for one in request["requests"]]
    assert all({turn["text"] for turn in row} == {"make it red"} for row in rows)
    pictures = [[turn["image_b64"] for turn in row] for row in rows]
    told = redder({"source_images": [row[:-1] for row in pictures], "images": [row[-1] for row in pictures]})
    return {"results": [{"redder": {"score": score}} for score in told["scores"]]}


def images(url: str, schema: ImageSchema | None = None) -> RemoteImages:
    return RemoteImages(RemoteServer(url, timeout_s=10.0, retry_s=0.0), schema or PlainJSON(), 8)


@pytest.mark.parametrize(("answer", "schema"), [(redder, PlainJSON()), (unirl_redder, UniRL("redder"))])
def test_sources_are_sent_with_each_image(answer, schema: ImageSchema, tmp_path: Path) -> None:
    BLUE.save(tmp_path / "blue.jpg")
    in_file = EditPrompt("make it red", [ImageRef("blue", path=tmp_path / "blue.jpg")])
    prompts = [edit_prompt("make it red", given) for given in (RED, BLUE, [BLUE, RED])] + [in_file]
    with judging(answer) as judge:
        found = images(judge.url, schema).begin(prompts, [RED, RED, RED, GREY])()
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
        source = images(judge.url)
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


def test_a_request_that_is_too_large_is_halved_and_later_ones_are_as_small() -> None:
    pictures = [Image.new("RGB", (9, 8), (number, 0, 0)) for number in range(12)]
    scores = pytest.approx([judged("", picture) for picture in pictures])
    with judging(lambda request: {"scores": [judged("", opened(text)) for text in request["images"]]}) as judge:
        judge.faults += [says(413)]
        source = images(judge.url)
        assert source.begin([""] * 6, pictures[:6])() + source.begin([""] * 6, pictures[6:])() == scores
        assert judge.sizes == [3] * 4
        judge.faults += [says(413)]
        with pytest.raises(RemoteError, match="HTTP 413"):
            source.begin([""], [RED])()
