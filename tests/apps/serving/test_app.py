"""The endpoints, over real sockets, as verl-omni's client and others use them."""

import base64
import io
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from latentreward.apps.serving import app, bodies
from latentreward.apps.serving.bodies import Accepted, parse_request
from latentreward.apps.serving.service import ServedModel
from latentreward.apps.serving.settings import bind
from latentreward.reward import RewardModel, ScoringNoise
from tests.apps.serving.latent_requests import HEADERS, tensors_of
from tests.apps.serving.servers import raw, service_of, serving, started, tiny_reward
from tests.data.rotated import photograph, upright
from tests.data.test_images import png_header


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, ServedModel]]:
    with serving(tiny_reward(), batch_size=4, max_wait_ms=20) as started:
        yield started


@pytest.fixture
def address(running: tuple[str, ServedModel]) -> str:
    return running[0]


@pytest.fixture
def accepted(running: tuple[str, ServedModel]) -> Accepted:
    return running[1].accepted


def ask(address: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{address}/v1/score", content=body, headers={**HEADERS, **headers}, timeout=300)


def post_images(address: str, **given: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/score_images", timeout=300, **given)


def scores_of(reward: RewardModel, body: bytes, accepted: Accepted) -> list[float]:
    """What the model itself gives the rows of a request, one at a time."""
    scores = []
    for row in parse_request(body, accepted):
        noise = ScoringNoise(sigmas=(row.u,), seeds=(row.seed,))
        score = reward.score_latents([row.prompt], row.latents[None], noise=noise, conditioning=(row.encoded, None))
        scores.append(score.item())
    return scores


def test_a_request_gets_the_models_score_at_its_level(address: str, accepted: Accepted) -> None:
    for seed, u in ((0, 0.4), (1, 0.0), (2, 1.0)):
        body = save(tensors_of(accepted, seed=seed) | {"u": torch.tensor([u])})
        reply = ask(address, body).json()
        assert reply.keys() == {"protocol_version", "raw_scores"} and reply["protocol_version"] == "1"
        assert reply["raw_scores"] == pytest.approx(scores_of(tiny_reward(), body, accepted), abs=2e-5)


def test_a_row_alone_gets_the_models_score_to_the_bit(accepted: Accepted) -> None:
    with serving(tiny_reward(), batch_size=1) as (address, _), torch.inference_mode():
        body = save(tensors_of(accepted, rows=3))
        assert ask(address, body).json()["raw_scores"] == scores_of(tiny_reward(), body, accepted)
        images = {"prompt": "a cat", "images": [GOOD_IMAGE]}
        found = post_images(address, json=images).json()["scores"]
        assert found == tiny_reward().score("a cat", [picture("red")]).tolist()


def test_noise_follows_seeds_and_not_the_last_bit_of_an_embedding(address: str, accepted: Accepted) -> None:
    tensors = tensors_of(accepted)
    seedless = {name: tensor for name, tensor in tensors.items() if name != "seeds"}
    first, second, with_0 = (ask(address, save(t)).json()["raw_scores"] for t in (seedless, seedless, tensors))
    other = ask(address, save(tensors | {"seeds": torch.tensor([5])})).json()["raw_scores"]
    assert first == second == with_0 and abs(other[0] - first[0]) > 1e-4
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        nudged = torch.nextafter(tensors[name], torch.tensor(torch.inf))
        assert ask(address, save(tensors | {name: nudged})).json()["raw_scores"] == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("kind", [("sd35", "dina"), ("sd15", "lrm")])
def test_a_score_does_not_depend_on_what_it_shares_a_batch_with(kind: tuple[str, str]) -> None:
    with serving(reward := tiny_reward(*kind), batch_size=4, max_wait_ms=20) as (address, service):
        accepted, tokens = service.accepted, service.accepted.tokens or 5  # a UNet's head also needs the empty prompt
        every = [tensors_of(accepted, 1 + seed % 3, seed, (8, 12)[seed % 2], tokens) for seed in range(12)]
        with ThreadPoolExecutor(12) as pool:
            replies = [*pool.map(lambda tensors: ask(address, save(tensors)).json()["raw_scores"], every)]
        for found, tensors in zip(replies, every, strict=True):
            assert found == pytest.approx(scores_of(reward, save(tensors), accepted), abs=2e-5)
        if accepted.tokens:
            assert "of shape (B, L, D), with L = " in ask(address, save(tensors_of(accepted))).json()["error"]


def picture(color: str, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


GOOD_IMAGE = base64.b64encode(picture("red")).decode()


def test_images(address: str) -> None:
    reward, images = tiny_reward(), [picture("red"), picture("blue", (16, 30), "JPEG")]
    sent = {"images": [base64.b64encode(image).decode() for image in images]}
    reply = post_images(address, json={"prompt": "a cat", **sent}).json()
    assert reply["scores"] == pytest.approx(reward.score("a cat", images).tolist(), abs=2e-5)
    assert (reply["noise"], reply["model"]) == (str(reward.noise), reward.identity)
    wanted = pytest.approx(reward.score(["a cat", "a dog"], images).tolist(), abs=2e-5)
    assert post_images(address, json={"prompts": ["a cat", "a dog"], **sent}).json()["scores"] == wanted
    assert reward.exif == "apply"  # a photograph on its side is turned
    turned = post_images(address, json={"prompt": "a", "image": base64.b64encode(photograph()).decode()}).json()
    assert turned["scores"] == pytest.approx(reward.score("a", upright(photograph())).tolist(), abs=2e-5)


JSON = {"content-type": "application/json"}
BOMB = base64.b64encode(png_header(9_000, 9_000)).decode()


def said(**content: Any) -> bytes:
    return json.dumps({"prompt": "a", "images": [GOOD_IMAGE]} | content).encode()


@pytest.mark.parametrize(
    ("body", "headers", "status", "key"),
    [
        (b"junk", HEADERS | {"x-drm-protocol-version": "2"}, 400, "x-drm-protocol-version"),
        (b"junk", HEADERS | {"content-type": "application/json"}, 415, "content-type"),
        (b"junk", HEADERS | {"content-encoding": "gzip"}, 415, "content-encoding"),
        (b"junk", HEADERS, 400, "safetensors header"),
        (b"{", JSON, 400, "the body"),
        (b"[" * 100_000, JSON, 413, "the body"),
        (b"[" * 2**21, JSON, 413, "memory"),
        (b"\xff\xfe\x00", JSON, 400, "the body"),
        (said(prompt=None), JSON, 400, "prompt"),
        (said(more=1), JSON, 400, "more"),
        (b'{"prompt": "a", "prompt": "b", "images": []}', JSON, 400, "'prompt' is given twice"),
        (said(prompt="\ud800"), JSON, 400, "the body"),
        (said(images=GOOD_IMAGE), JSON, 400, "images"),
        (said(images=[]), JSON, 422, "image"),
        (said(prompt=None, prompts=["a", "b"]), JSON, 422, "2 prompts"),
        (said(prompt="a" * 10_001), JSON, 422, "prompt 0"),
        (said(images=["é"]), JSON, 400, "image 0"),
        (said(images=[GOOD_IMAGE] * 65), JSON, 413, "images"),
        (said(images=["AAAA"]), JSON, 422, "'0'"),
        (said(images=[GOOD_IMAGE, GOOD_IMAGE[:60]]), JSON, 422, "'1'"),
        (said(images=[BOMB]), JSON, 422, "--max_pixels"),
    ],
)
def test_what_is_no_request_is_refused_in_one_line(
    address: str, body: bytes, headers: dict[str, str], status: int, key: str
) -> None:
    path = "score" if "x-drm-protocol-version" in headers else "score_images"
    reply = httpx.post(f"{address}/v1/{path}", content=body, headers=headers, timeout=300)
    told = reply.json()["error"]
    assert (reply.status_code, key in told) == (status, True), reply.text
    assert "\n" not in told and len(told) < 500


def test_health_and_metrics(address: str) -> None:
    assert httpx.get(f"{address}/healthz").json() == {"live": True, "ready": True}
    head = httpx.head(f"{address}/healthz")
    assert head.status_code == 200 and not head.content and httpx.head(f"{address}/v1/score").status_code == 405
    httpx.get(f"{address}/v1/model")
    reply = httpx.get(f"{address}/metrics")
    text = reply.text
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert 'latentreward_requests_total{path="/healthz",status="200"}' in text
    assert 'latentreward_request_seconds_count{path="/v1/model"}' in text
    assert 'latentreward_queue_rows{reward="reward"} 0' in text and "latentreward_batch_rows_sum" in text


def test_a_token_is_asked_for_everywhere_but_at_healthz() -> None:
    with serving(tiny_reward(), token="s3cret") as (address, service):
        body = save(tensors_of(service.accepted))
        assert httpx.get(f"{address}/healthz").status_code == 200
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            reply = ask(address, body, **given)
            assert reply.status_code == 401 and "token" in reply.json()["error"]
        for path in httpx.get(f"{address}/openapi.json", auth=("", "s3cret")).json()["paths"]:
            for given in ({}, {"authorization": "Basic %%%"}):
                reply = httpx.get(address + path, headers=given)
                assert reply.status_code == (401 if path != "/healthz" else 200), path
                assert path == "/healthz" or "Basic" in reply.headers["www-authenticate"]  # of http://:TOKEN@host
        others = {"host": "rewards.example", "origin": "https://page.example"}  # the token lifts the check of names
        for scheme in ("Bearer", "bearer"):
            assert ask(address, body, authorization=f"{scheme} s3cret", **others).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "[::1]:8000", "origin": "http://[::1]:3000"}, 200),
        ({"host": socket.gethostname()}, 200),
        ({"origin": "http://localhost:7860"}, 200),
        ({"host": "rebound.example:8000"}, 403),
        ({"host": "127.0.0.1.rebound.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "evil@localhost"}, 403),
        ({"origin": "https://page.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_without_a_token_a_page_elsewhere_gets_nothing(address: str, headers: dict[str, str], status: int) -> None:
    """It may send a form to this machine, or reach the server by a name of its own that it lets point here."""
    reply = httpx.get(f"{address}/v1/model", headers=headers)
    assert reply.status_code == status
    assert status == 200 or "LATENTREWARD_TOKEN" in reply.json()["error"]
    assert httpx.get(f"{address}/healthz", headers=headers).status_code == 200


def test_long_bodies_are_refused_declared_or_not() -> None:
    with serving(tiny_reward(), max_body_mb=20_000 / 2**20) as (address, _):
        declared = ask(address, bytes(20_001))
        assert declared.status_code == 413 and "limit of 20000" in declared.json()["error"]
        streamed = httpx.post(f"{address}/v1/score", content=iter([bytes(1000)] * 30), headers=HEADERS)
        assert streamed.status_code == 413


def test_all_requests_together_are_limited_in_memory() -> None:
    service = service_of(tiny_reward(), max_body_mb=0.05)
    with started(service) as address:
        body, memory = save(tensors_of(service.default.accepted)), service.memory
        memory.held += memory.total - 2 * len(body) + 1
        reply = ask(address, body)
        assert reply.status_code == 503 and reply.headers["retry-after"]
        memory.held -= memory.total - 2 * len(body) + 1
        assert ask(address, body).status_code == 200 and memory.held == 0
        large = base64.b64encode(picture("red", (500, 500))).decode()
        reply = post_images(address, json={"prompt": "a", "images": [large] * 4})  # which never fits
        assert reply.status_code == 413 and "retry-after" not in reply.headers and memory.held == 0


HEAD = (
    b"POST /v1/score HTTP/1.1\r\nhost: localhost\r\nx-drm-protocol-version: 1\r\n"
    b"content-type: application/octet-stream\r\n"
)


def test_slow_clients_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "IDLE_SECONDS", 0.5)
    with serving(tiny_reward(), timeout=1.0) as (address, _):
        assert raw(address) == b""
        assert raw(address, b"POST /v1/score HTTP/1.1\r\n", b"host: localhost\r\n", pause=0.1) == b""
        again = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET /healthz HTTP/1.1\r\n"
        assert raw(address, *again, pause=0.1, timeout=10).count(b" 200 OK") == 1
        assert b"408" in raw(address, HEAD + b"content-length: 100\r\nconnection: close\r\n\r\nabc").splitlines()[0]


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        HEAD + b"transfer-encoding: chunked\r\n\r\nZZ\r\n",
        HEAD + b"transfer-encoding: chunked\r\ncontent-length: 0\r\n\r\n0\r\n\r\nGET /v1/model HTTP/1.1\r\n\r\n",
        HEAD + b"x: " + b"y" * 70_000 + b"\r\n\r\n",
    ],
)
def test_broken_http_is_answered_with_a_400(address: str, sent: bytes) -> None:
    answers = raw(address, sent, b"", pause=0.1)
    assert b" 400 " in answers.splitlines()[0] and answers.count(b"HTTP/1.1") == 1
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_decoding_ends_at_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_reward(), timeout=1.0) as (address, _):
        decode, decoded = bodies.decode_image, []

        def decode_slowly(*given: Any) -> Image.Image:
            decoded.append(given)
            time.sleep(0.4)
            return decode(*given)

        monkeypatch.setattr(bodies, "decode_image", decode_slowly)
        reply = post_images(address, json={"prompt": "a", "images": [GOOD_IMAGE] * 8})
        assert reply.status_code == 504 and "decoded within 1 seconds" in reply.json()["error"]
        monkeypatch.undo()
        assert post_images(address, json={"prompt": "a", "image": GOOD_IMAGE}).status_code == 200 and len(decoded) < 8


def test_a_full_queue_a_timeout_and_a_client_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_reward(), batch_size=1, queue=2, timeout=1.5) as (address, service):
        body, waiting, score = save(tensors_of(service.accepted)), service.batcher, service.reward.score_latents
        free, passes = threading.Event(), list[Any]()

        def gated(*given: Any, **options: Any) -> Tensor:
            passes.append(given)
            free.wait(20)
            return score(*given, **options)

        monkeypatch.setattr(service.reward, "score_latents", gated, raising=False)
        with ThreadPoolExecutor(3) as pool:
            replies = [pool.submit(ask, address, body)]
            while not passes:
                time.sleep(0.01)
            replies.append(pool.submit(ask, address, body))
            with pytest.raises(httpx.TimeoutException):  # this one leaves
                httpx.post(f"{address}/v1/score", content=body, headers=HEADERS, timeout=0.2)
            while len(waiting.waiting) > 1:
                time.sleep(0.01)
            replies.append(pool.submit(ask, address, body))
            while len(waiting.waiting) < 2:
                time.sleep(0.01)
            full = ask(address, body)
            assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1 and "queue" in full.text
            assert [reply.result().status_code for reply in replies] == [504] * 3
        assert httpx.get(f"{address}/healthz").status_code == 503  # the model is stuck
        free.set()
        while waiting.busy_seconds:
            time.sleep(0.01)
        assert len(passes) == 1  # what nobody waits for any more is not scored
        assert httpx.get(f"{address}/healthz").json()["ready"] and ask(address, body).status_code == 200
        assert 'path="/v1/score",status="499"} 1' in httpx.get(f"{address}/metrics").text


def test_what_fails_is_a_500_in_one_line(
    running: tuple[str, ServedModel], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("out of\nmemory")

    address, service = running
    monkeypatch.setattr(service.reward, "score_latents", fail, raising=False)
    reply = ask(address, save(tensors_of(service.accepted)))
    assert reply.status_code == 500 and reply.json() == {"error": "the model failed (RuntimeError)"}
    assert "out of memory" in capfd.readouterr().err
    monkeypatch.setattr(service, "describe", lambda: 1 / 0)
    reply = httpx.get(f"{address}/v1/model")
    assert reply.status_code == 500 and reply.json() == {"error": "the server failed (ZeroDivisionError)"}


def test_a_sigterm_before_uvicorn_listens_to_signals_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is printed before, so that whoever waits for it may already send the signal."""
    asked, service, before = list[bool](), service_of(tiny_reward()), signal.getsignal(signal.SIGTERM)

    def send(text: str, **_: Any) -> None:  # not for what the server of other tests prints at the same time
        if text.startswith("serving"):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("builtins.print", send)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: asked.append(self.should_exit))
    with bind("127.0.0.1", 0) as bound:
        app.serve_until_stopped(service, bound)
    assert asked == [True] and signal.getsignal(signal.SIGTERM) == before
