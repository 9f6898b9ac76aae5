"""JSON with images: what is refused before it is parsed, what is taken, and what it costs."""

import base64
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from latentreward.apps.serving.images import EncodedImages, images_of_json, parsing_bytes
from latentreward.apps.serving.refusals import RequestError
from tests.data.test_images import encode

MIB = 2**20
IMAGE = base64.b64encode(bytes(range(256))).decode()


def body_of(values: bytes, size: int = 4 * MIB, end: bytes = b'"x"') -> bytes:
    return b'{"prompt":"","images":[' + values * (size // len(values)) + end + b"]}"


HOSTILE = {
    "lists": body_of(b"[],"),
    "objects": body_of(b"{},"),
    "numbers": body_of(b"1,"),
    "keys": b'{"prompt":"",' + b'"a":0,' * (MIB // 2) + b'"images":[]}',
    "texts": body_of(b'"",'),
    "nesting": b"[" * (4 * MIB),
    "nested objects": b'{"a":' * MIB,
    "values after an escaped quote": body_of(b"[],").replace(b'""', b'"\\\\\\""'),
    "values after an escaped backslash": body_of(b"[],").replace(b'""', b'"\\\\"'),
    "a long number": body_of(b"1", end=b""),
    "escapes": body_of(b"\\n", end=b'"').replace(b"[", b'["', 1),
    "a wide text": body_of(b"A", end=b'\\ud83d\\ude00"').replace(b"[", b'["', 1),
    "a wide text without escapes": body_of(b"A", end="😀".encode() + b'"').replace(b"[", b'["', 1),
}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[" * 1000, "too deeply nested"),
        (b'{"a": ' * 400 + b"1" + b"}" * 400, "too deeply nested"),
        (b'{"images": [' + b"[], " * 1000, "too many values"),
        (b'{"prompt": "a", "prompt": "b", "images": []}', "key 'prompt' is given twice"),
    ],
)
def test_what_is_too_much_about_json_is_said(body: bytes, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        images_of_json(body, 64)


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_structure_is_refused_before_it_takes_memory(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as caught:
            images_of_json(body, 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status in (400, 413) and "\n" not in str(caught.value)
    assert peak < 3 * len(body) + MIB


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("indent", [None, 4])
def test_prompts_may_hold_anything(escape: bool, indent: int | None) -> None:
    prompts = ['[{,:}]"\\' * 1000, "\\" * 10_000, '"' * 10_000, "猫😀" * 5000, "\n\t{", ""]
    content = json.dumps({"prompts": prompts, "images": [IMAGE] * 6}, ensure_ascii=escape, indent=indent)
    found = images_of_json(content.encode(), 6)
    assert found.prompts == prompts and found.images == [bytes(range(256))] * 6


def test_as_many_and_as_long_prompts_as_are_taken_pass() -> None:
    content = {"prompts": ["😀" * 5000] * 64, "images": [IMAGE] * 64}
    assert len(images_of_json(json.dumps(content).encode(), 64).images) == 64


def test_a_single_image() -> None:
    found = images_of_json(json.dumps({"prompt": "a", "image": IMAGE}).encode(), 1)
    assert found.prompts == ["a"] and found.images == [bytes(range(256))]
    for content, message in (
        ({"prompt": "a", "image": [IMAGE]}, "image: Input should be a valid string"),
        ({"prompt": "a", "image": IMAGE, "images": [IMAGE]}, "give either image or images"),
    ):
        with pytest.raises(RequestError, match=message):
            images_of_json(json.dumps(content).encode(), 1)


def test_base64_with_escaped_slashes_passes() -> None:
    image = np.random.default_rng(0).bytes(3 * MIB)
    content = json.dumps({"prompt": "a", "images": [base64.b64encode(image).decode()]}).replace("/", "\\/")
    assert images_of_json(content.encode(), 1).images == [image]


@pytest.mark.parametrize("prompt", ["a", "é", "\U0001f600"])
@pytest.mark.parametrize("escape", [True, False])
def test_parsing_takes_no_more_than_is_held_for_it(prompt: str, escape: bool) -> None:
    image = base64.b64encode(bytes(3 * MIB)).decode()
    body = json.dumps({"prompt": prompt, "images": [image]}, ensure_ascii=escape).encode()
    tracemalloc.start()
    try:
        images_of_json(body, 4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < parsing_bytes(body, "application/json") + MIB


@pytest.mark.parametrize(
    ("pixels", "options", "per_pixel"),
    [
        (np.zeros((30, 20, 3), np.uint8), {}, 12),
        (np.zeros((30, 20), np.uint8), {}, 5),
        (np.zeros((30, 20), np.uint16), {}, 7),
        (np.zeros((30, 20, 3), np.uint8), {"fmt": "WEBP"}, 16),
        (np.zeros((600, 1), np.uint8), {}, 5),
    ],
)
def test_images_are_charged_by_their_kind(pixels: np.ndarray, options: dict[str, Any], per_pixel: int) -> None:
    data = encode(pixels, **options).data
    assert data is not None
    pointers = 8 * pixels.shape[0]  # Pillow has one to each row
    one, two = (EncodedImages(["a"] * n, [data] * n).memory_bytes(600) for n in (1, 2))
    assert one == len(data) + per_pixel * 600 + 3 * pointers and two - one == len(data) + 4 * 600 + pointers
