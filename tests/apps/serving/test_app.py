"""The endpoints, over real sockets, as verl-omni's client and others use them."""

import asyncio
import base64
import io
import json
import math
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from traceback import walk_tb
from typing import Any, ClassVar

import aiohttp
import httpx
import pytest
import torch
import uvicorn
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from latentreward.apps.serving import app, bodies, images, server
from latentreward.apps.serving.addresses import bind
from latentreward.apps.serving.protocol import parse_request
from latentreward.apps.serving.served import ScoringService, ServedModel, tried_shape
from latentreward.apps.serving.tensors import Accepted
from latentreward.reward import Calibration, RewardModel, ScoringNoise
from latentreward.reward.scoring.ensemble import pixel_batches
from tests.apps.serving.latent_requests import HEADERS, tensors_of
from tests.apps.serving.servers import raw, served_model, serving, tiny_reward
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


ANSWERS = {
    ("sd15", "lrm"): (
        '{"model":"CLIPProjectionHead, on sd15, at t 1, images 16x16, exif apply, float32","latent_space":{"channels"'
        ':4,"downscale":2,"scaling_factor":0.18215,"shift_factor":0.0},"prompt_embeds_width":16,'
        '"pooled_prompt_embeds_width":16,"noise":"t 1","u":[U],"fresh_noise":false,"calibrated":false,"batch_size":8,'
        '"max_body_bytes":67108864,"max_latent_pixels":P,"max_rows":64}'
    ),
    ("sd35", "dina"): (
        '{"model":"GatedQFormerHead, on sd35, at sigma 0.4, images 4x4 8x8 16x12 12x16 20x12 12x20 16x16 20x16 16x20 '
        '24x12 12x24, exif apply, float32","latent_space":{"channels":4,"downscale":2,"scaling_factor":1.5305,'
        '"shift_factor":0.0609},"prompt_embeds_width":48,"pooled_prompt_embeds_width":32,"noise":"sigma 0.4","u":[U],'
        '"fresh_noise":false,"calibrated":false,"batch_size":8,"max_body_bytes":67108864,"max_latent_pixels":P,'
        '"max_rows":64}'
    ),
}
"""Answers of ``/v1/model`` before other families were served (commit bb3c5ab), with U for a level, P for pixels."""


class Gated:
    """A reward model's ``score_latents`` that starts only when ``free`` is set."""

    def __init__(self, reward: RewardModel) -> None:
        self.free, self.entered, self.rows = threading.Event(), threading.Event(), 0
        self._score, self._reward = type(reward).score_latents, reward

    def __call__(self, prompts: Any, latents: Tensor, **options: Any) -> Tensor:
        self.entered.set()
        self.free.wait(20)
        self.rows += len(latents)
        return self._score(self._reward, prompts, latents, **options)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Callable[[ServedModel], Gated]:
    def gate(service: ServedModel) -> Gated:
        gate = Gated(service.reward)
        monkeypatch.setattr(service.reward, "score_latents", gate, raising=False)
        return gate

    return gate


def ask(address: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{address}/v1/score", content=body, headers={**HEADERS, **headers}, timeout=300)


def scores_of(reward: RewardModel, body: bytes, accepted: Accepted) -> list[float]:
    """What the model itself gives the rows of a request, one at a time."""
    scores = []
    for row in parse_request(body, accepted):
        noise = ScoringNoise(sigmas=(row.u,), seeds=(row.seed,))
        score = reward.score_latents([row.prompt], row.latents[None], noise=noise, conditioning=(row.encoded, None))
        scores.append(score.item())
    return scores


async def verl_omni_score(address: str, tensors: dict[str, Tensor]) -> float:
    """What verl-omni's client does with a finished sample, by its protocol."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session,
        session.post(f"{address}/v1/score", data=save(tensors), headers=HEADERS) as response,
    ):
        assert response.status == 200, await response.text()
        reply = await response.json()
    assert reply["protocol_version"] == "1" and len(reply["raw_scores"]) == 1
    return float(reply["raw_scores"][0])


def test_verl_omnis_client_gets_the_models_score(address: str, accepted: Accepted) -> None:
    for seed, u in ((0, 0.4), (1, 0.0), (2, 1.0)):
        tensors = tensors_of(accepted, seed=seed) | {"u": torch.tensor([u])}
        score = asyncio.run(verl_omni_score(address, tensors))
        assert score == pytest.approx(scores_of(tiny_reward(), save(tensors), accepted)[0], abs=2e-5)


def test_noise_is_fixed_without_seeds_and_follows_them(address: str, accepted: Accepted) -> None:
    tensors = tensors_of(accepted)
    seedless = {name: tensor for name, tensor in tensors.items() if name != "seeds"}
    first, second, with_0 = (ask(address, save(t)).json()["raw_scores"] for t in (seedless, seedless, tensors))
    other = ask(address, save(tensors | {"seeds": torch.tensor([5])})).json()["raw_scores"]
    assert first == second == with_0 != other


def nudged(tensor: Tensor) -> Tensor:
    """The next floats upwards."""
    return torch.nextafter(tensor, torch.tensor(torch.inf))


def test_noise_does_not_depend_on_the_last_bit_of_an_embedding(address: str, accepted: Accepted) -> None:
    tensors = tensors_of(accepted)
    score = ask(address, save(tensors)).json()["raw_scores"]
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        found = ask(address, save(tensors | {name: nudged(tensors[name])})).json()["raw_scores"]
        assert found == pytest.approx(score, abs=1e-5)
    reseeded = ask(address, save(tensors | {"seeds": torch.tensor([1])})).json()["raw_scores"]
    assert abs(reseeded[0] - score[0]) > 1e-4


@pytest.mark.parametrize("prompt", ["a cat", "ein Kätzchen 🐈", ""])
def test_a_prompt_in_a_header_gets_the_score_of_its_image(address: str, accepted: Accepted, prompt: str) -> None:
    reward, image = tiny_reward(), picture("red")
    noise, conditioning = ScoringNoise(sigmas=(0.4,), seeds=(3,)), reward.backbone.encode_prompts([prompt])
    pixels = next(iter(pixel_batches([image], reward.image_sizes, 1, 1))).pixels
    tensors = {
        "latents": reward.encode_images(pixels),
        "prompt_embeds": conditioning.prompt_embeds.float(),
        "pooled_prompt_embeds": conditioning.pooled_prompt_embeds.float(),
        "u": torch.tensor([0.4]),
        "seeds": torch.tensor([3]),
    }
    body = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    header = {"x-prompt": base64.b64encode(prompt.encode()).decode()}
    wanted = reward.score(prompt, [image], noise=noise).item()
    assert ask(address, body, **header).json()["raw_scores"][0] == pytest.approx(wanted, abs=1e-6)
    other = ask(address, body, **{"x-prompt": "b3RoZXI="}).json()["raw_scores"][0]
    assert abs(other - wanted) > 1e-4


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([b"a cat"], "not base64 of UTF-8"),
        ([b"YWJj\xff"], "not base64 of UTF-8"),
        ([b"YWJ"], "not base64 of UTF-8"),
        ([b"/w=="], "not base64 of UTF-8"),
        ([b"7aCA"], "not base64 of UTF-8"),  # half a surrogate pair
        ([b"QUFB" * 3073], "has 12292 characters; at most 12288"),
        ([b"YQ==", b"Yg=="], "stands 2 times; a request has one prompt"),
    ],
)
def test_a_malformed_prompt_is_refused_in_one_line(
    address: str, accepted: Accepted, sent: list[bytes], message: str
) -> None:
    headers = [*((name.encode(), value.encode()) for name, value in HEADERS.items()), *((b"x-prompt", s) for s in sent)]
    reply = httpx.post(f"{address}/v1/score", content=save(tensors_of(accepted)), headers=headers, timeout=300)
    assert reply.status_code == 400 and message in reply.json()["error"] and "\n" not in reply.json()["error"]


def test_fresh_noise_differs_each_time_but_for_requests_with_seeds() -> None:
    with serving(tiny_reward(), fresh_noise=True) as (address, service):
        tensors = tensors_of(service.accepted)
        seedless = save({name: tensor for name, tensor in tensors.items() if name != "seeds"})
        fresh = [ask(address, seedless).json()["raw_scores"][0] for _ in range(3)]
        seeded = [ask(address, save(tensors)).json()["raw_scores"][0] for _ in range(2)]
        assert len(set(fresh)) == 3 and seeded[0] == seeded[1] not in fresh
        assert httpx.get(f"{address}/v1/model").json()["fresh_noise"] is True
        assert service.first_seed is not None  # printed, so that the scores can be had again
        again = tensors | {"seeds": service.first_seed + torch.arange(3)[1:2]}
        assert ask(address, save(again)).json()["raw_scores"][0] == pytest.approx(fresh[1], abs=1e-6)


@pytest.mark.slow
def test_a_score_does_not_depend_on_what_it_shares_a_batch_with(address: str, accepted: Accepted) -> None:
    bodies = [save(tensors_of(accepted, rows=1 + seed % 3, seed=seed, side=(8, 12)[seed % 2])) for seed in range(24)]
    alone = [scores_of(tiny_reward(), body, accepted) for body in bodies]

    async def together() -> list[list[float]]:
        async with httpx.AsyncClient(timeout=300) as client:
            posts = (client.post(f"{address}/v1/score", content=body, headers=HEADERS) for body in bodies)
            return [reply.json()["raw_scores"] for reply in await asyncio.gather(*posts)]

    for found, wanted in zip(asyncio.run(together()), alone, strict=True):
        assert found == pytest.approx(wanted, abs=2e-5)


@pytest.mark.slow
def test_a_queue_of_n_rows_takes_n_clients_at_once() -> None:
    with serving(tiny_reward(), queue=300) as (address, service):

        async def ask_all() -> list[float]:
            bodies = [tensors_of(service.accepted, seed=seed) for seed in range(300)]
            return await asyncio.gather(*(verl_omni_score(address, tensors) for tensors in bodies))

        assert len(set(asyncio.run(ask_all()))) > 250


def test_a_unet_reward_is_served_with_its_empty_prompt() -> None:
    reward = tiny_reward("sd15", "lrm")
    with serving(reward) as (address, service):
        assert "prompt_embeds: L of (B, L, D) is 5" in ask(address, save(tensors_of(service.accepted))).json()["error"]
        body = save(tensors_of(service.accepted, rows=2, tokens=service.accepted.tokens))
        found = ask(address, body).json()["raw_scores"]
        assert found == pytest.approx(scores_of(reward, body, service.accepted), abs=2e-5)


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"x-drm-protocol-version": "2"}, 400, "speaks version 1"),
        ({"content-type": "application/json"}, 415, "send application/octet-stream"),
        ({"content-encoding": "gzip"}, 415, "content-encoding is 'gzip'; send the body uncompressed"),
        ({}, 400, "the safetensors header has"),
    ],
)
def test_bad_requests_get_one_line_of_json(address: str, headers: dict[str, str], status: int, message: str) -> None:
    reply = ask(address, b"junk", **headers)
    assert reply.status_code == status and message in reply.json()["error"] and "\n" not in reply.json()["error"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/score", 405), ("POST", "/nowhere", 404)])
def test_wrong_addresses_get_json(address: str, method: str, path: str, status: int) -> None:
    reply = httpx.request(method, address + path)
    assert reply.status_code == status and reply.json()["error"]


def test_a_value_that_overflows_fails_alone(running: tuple[str, ServedModel], gated: Any) -> None:
    address, service = running
    gate = gated(service)
    good, bad = tensors_of(service.accepted), tensors_of(service.accepted, seed=1)
    bad["latents"] = bad["latents"] / bad["latents"].abs().max() * 3e38

    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=300) as client:
            posts = [client.post(f"{address}/v1/score", content=save(t), headers=HEADERS) for t in (good, bad, good)]
            replies = asyncio.gather(*posts)
            await asyncio.to_thread(gate.entered.wait, 10)
            gate.free.set()
            return await replies

    replies = asyncio.run(both())
    assert [reply.status_code for reply in replies] == [200, 422, 200]
    assert "not finite" in replies[1].json()["error"]


def picture(color: str, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def test_a_form_in_another_charset_is_refused(address: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"a" * 200_000 + b"\r\n--x--\r\n"
    for charset in ("punycode", "undefined"):
        kind = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        reply = httpx.post(f"{address}/v1/score_images", content=body, headers=kind, timeout=300)
        assert (reply.status_code, reply.json()["error"]) == (415, f"the form's charset is '{charset}'; send utf-8")
    kind = {"content-type": "multipart/form-data; boundary=x; charset=UTF-8"}
    assert httpx.post(f"{address}/v1/score_images", content=body, headers=kind, timeout=300).status_code == 400


@pytest.mark.parametrize("field", ["shape", "data_offsets", "dtype"])
def test_half_a_character_is_refused(address: str, accepted: Accepted, field: str) -> None:
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | ({field: "\ud800"} if name == "u" else {})
        for name in tensors_of(accepted)
    }
    text = json.dumps({"u": header.pop("u")} | header).encode()
    reply = ask(address, len(text).to_bytes(8, "little") + text)
    assert reply.status_code == 400 and reply.json()["error"].startswith("the body is no safetensors file (")


def test_images_as_a_form(address: str) -> None:
    files = [("image", ("a.png", picture("red"))), ("image", ("b.jpg", picture("blue", (16, 30), "JPEG")))]
    reply = httpx.post(f"{address}/v1/score_images", data={"prompt": "a cat"}, files=files, timeout=300)
    wanted = tiny_reward().score("a cat", [picture("red"), picture("blue", (16, 30), "JPEG")])
    assert reply.status_code == 200 and reply.json()["scores"] == pytest.approx(wanted.tolist(), abs=2e-5)
    assert reply.json()["z_scores"] is None and reply.json()["noise"] == str(tiny_reward().noise)


@pytest.mark.parametrize("same_noise", [True, False])
def test_calibrated_scores_say_where_they_stand(
    address: str, monkeypatch: pytest.MonkeyPatch, same_noise: bool
) -> None:
    reward = tiny_reward()
    noise = reward.noise if same_noise else ScoringNoise(sigmas=(0.9,))
    monkeypatch.setattr(reward, "calibration", Calibration.fit(torch.linspace(-3, 3, 101), "a set", noise))
    reply = httpx.post(f"{address}/v1/score_images", data={"prompt": "a"}, files={"image": picture("red")}).json()
    raw = torch.tensor(reply["scores"])
    assert reply["z_scores"] == (reward.calibration.z_score(raw).tolist() if same_noise else None)
    assert reply["quantiles"] == (reward.calibration.quantile(raw).tolist() if same_noise else None)


def test_a_photograph_on_its_side_is_turned_as_the_model_has_it(address: str) -> None:
    content = {"prompt": "a cat", "image": base64.b64encode(photograph()).decode()}
    reply = httpx.post(f"{address}/v1/score_images", json=content, timeout=300)
    reward = tiny_reward()
    assert reward.exif == "apply"
    assert reply.json()["scores"] == pytest.approx(reward.score("a cat", upright(photograph())).tolist(), abs=2e-5)


def test_images_as_json(address: str) -> None:
    images = [picture("red"), picture("green")]
    content = {"prompts": ["a cat", "a dog"], "images": [base64.b64encode(image).decode() for image in images]}
    reply = httpx.post(f"{address}/v1/score_images", json=content, timeout=300)
    wanted = tiny_reward().score(["a cat", "a dog"], images)
    assert reply.json()["scores"] == pytest.approx(wanted.tolist(), abs=2e-5)


GOOD_IMAGE = base64.b64encode(picture("red")).decode()


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        ([], 400, "give a JSON object"),
        ({"images": [GOOD_IMAGE]}, 400, "give either prompt or prompts"),
        ({"prompt": "a", "images": [GOOD_IMAGE], "more": 1}, 400, "give a JSON object"),
        ({"prompt": "a", "prompts": ["a"], "images": [GOOD_IMAGE]}, 400, "either prompt or prompts"),
        ({"prompt": "a"}, 400, "give either image or images"),
        ({"prompt": 1, "images": [GOOD_IMAGE]}, 400, "prompt: Input should be a valid string; give a JSON object"),
        ({"prompt": "a", "images": GOOD_IMAGE}, 400, "images: Input should be a valid array"),
        ({"prompt": "a", "images": []}, 422, "no image"),
        ({"prompts": ["a", "b"], "images": [GOOD_IMAGE]}, 422, "2 prompts for 1 images"),
        ({"prompt": "a" * 10_001, "images": [GOOD_IMAGE]}, 422, "10001 characters"),
        ({"prompt": "a", "images": ["é"]}, 400, "no base64"),
        ({"prompt": "a", "images": [GOOD_IMAGE] * 65}, 413, "limit of 64; send several requests"),
        ({"prompt": "a", "images": ["AAAA"]}, 422, "unknown image format"),
        ({"prompt": "a", "images": [GOOD_IMAGE, GOOD_IMAGE[:60]]}, 422, "'1': truncated or damaged"),
        (
            {"prompt": "a", "images": [base64.b64encode(png_header(9_000, 9_000)).decode()]},
            422,
            "exceeds max_pixels=67108864); resize it before sending, or raise the server's --max_pixels",
        ),
    ],
)
def test_bad_image_requests(address: str, content: Any, status: int, message: str) -> None:
    reply = httpx.post(f"{address}/v1/score_images", json=content, timeout=300)
    assert reply.status_code == status and message in reply.json()["error"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"\xff\xfe\x00", "application/json"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data"),
        (b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\na\r\n--x--", "multipart/form-data; boundary=x"),
    ],
)
def test_broken_image_bodies(address: str, body: bytes, kind: str) -> None:
    reply = httpx.post(f"{address}/v1/score_images", content=body, headers={"content-type": kind})
    assert reply.status_code == 400 and "\n" not in reply.json()["error"]


def test_a_form_with_too_many_images_is_told_the_limit() -> None:
    with serving(tiny_reward(), queue=2) as (address, _):
        files = [("image", picture("red"))] * 3
        reply = httpx.post(f"{address}/v1/score_images", data={"prompt": "a"}, files=files)
    told = "the form has over 2 files or over 2 texts, this server's limit of images; send several requests, or raise"
    assert (reply.status_code, reply.json()["error"]) == (413, f"{told} the server's --queue")


def test_an_unknown_field_of_a_form_is_named(address: str) -> None:
    data, files = {"prompt": "a", "promt": "b"}, {"image": picture("red")}
    reply = httpx.post(f"{address}/v1/score_images", data=data, files=files)
    assert reply.status_code == 400
    assert reply.json()["error"].startswith("the form has the fields 'image', 'prompt', 'promt'; give the text prompt")


@pytest.mark.parametrize("model", ANSWERS, ids=lambda model: model[0])
def test_answers_on_sd_and_sd3_to_the_byte(model: tuple[str, str]) -> None:
    reward = tiny_reward(*model)
    with serving(reward) as (address, service):
        told = httpx.get(f"{address}/v1/model")
        level = json.dumps(told.json()["u"][0])
        pixels = f'"max_latent_pixels":{4 * math.prod(tried_shape(reward)[1:])}'
        assert told.text == ANSWERS[model].replace("U", level).replace('"max_latent_pixels":P', pixels)
        tensors = tensors_of(service.accepted, rows=2, tokens=service.accepted.tokens or 5)
        reply = ask(address, save(tensors))
        scores = json.dumps(reply.json()["raw_scores"], separators=(",", ":"))
        assert reply.text == f'{{"protocol_version":"1","raw_scores":{scores}}}'
        del tensors["pooled_prompt_embeds"]
        assert ask(address, save(tensors)).text == (
            """{"error":"the body lacks 'pooled_prompt_embeds'; the protocol has latents, prompt_embeds, """
            """pooled_prompt_embeds, u, seeds"}"""
        )


def test_health_model_and_metrics(address: str) -> None:
    assert httpx.get(f"{address}/healthz").json() == {"live": True, "ready": True}
    head = httpx.head(f"{address}/healthz")
    assert head.status_code == 200 and not head.content and httpx.head(f"{address}/v1/score").status_code == 405
    model = httpx.get(f"{address}/v1/model").json()
    assert model["u"] == pytest.approx([0.4], abs=1e-3)
    assert model["model"] == tiny_reward().identity and model["latent_space"]["channels"] == 4
    reply = httpx.get(f"{address}/metrics")
    text = reply.text
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert 'latentreward_requests_total{path="/healthz",status="200"}' in text
    assert 'latentreward_request_seconds_count{path="/v1/model"}' in text
    assert "latentreward_queue_rows 0" in text and "latentreward_batch_rows_sum" in text


def test_a_token_is_asked_for_everywhere_but_at_healthz() -> None:
    with serving(tiny_reward(), token="s3cret") as (address, service):
        body = save(tensors_of(service.accepted))
        assert httpx.get(f"{address}/healthz").status_code == 200
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            reply = ask(address, body, **given)
            assert reply.status_code == 401 and "token" in reply.json()["error"]
        assert httpx.get(f"{address}/metrics").status_code == 401
        for scheme in ("Bearer", "bearer"):
            assert ask(address, body, authorization=f"{scheme} s3cret").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:8000", "origin": "http://[::1]:3000"}, 200),
        ({"host": socket.gethostname()}, 200),
        ({"origin": "http://localhost:7860"}, 200),
        ({"host": "rebound.example:8000"}, 403),
        ({"host": "127.0.0.1.rebound.example"}, 403),
        ({"host": "192.168.0.1"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "evil@localhost"}, 403),
        ({"host": "evil:1@localhost:8000"}, 403),
        ({"host": "localhost/evil"}, 403),
        ({"host": "localhost:8000?evil"}, 403),
        ({"host": "localhost#evil"}, 403),
        ({"host": "localhost:x"}, 403),
        ({"origin": "https://page.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_without_a_token_a_page_elsewhere_gets_nothing(
    running: tuple[str, ServedModel], headers: dict[str, str], status: int
) -> None:
    """It may send a form to this machine, or reach the server by a name of its own that it lets point here."""
    address, service = running
    body = save(tensors_of(service.accepted))
    assert ask(address, body, **headers).status_code == status
    reply = httpx.get(f"{address}/v1/model", headers=headers)
    assert reply.status_code == status
    if status == 403:
        assert "set token_file or LATENTREWARD_TOKEN" in reply.json()["error"]
    assert httpx.get(f"{address}/healthz", headers=headers).status_code == 200


def test_a_token_lifts_the_check_of_names() -> None:
    with serving(tiny_reward(), token="s3cret") as (address, _):
        headers = {"host": "rewards.example", "origin": "https://page.example", "authorization": "Bearer s3cret"}
        assert httpx.get(f"{address}/v1/model", headers=headers).status_code == 200


def test_long_bodies_are_refused_declared_or_not() -> None:
    with serving(tiny_reward(), max_body_mb=20_000 / 2**20) as (address, service):
        declared = ask(address, bytes(20_001))
        assert declared.status_code == 413 and "limit of 20000 bytes" in declared.json()["error"]

        def chunks() -> Iterator[bytes]:
            for _ in range(30):
                yield bytes(1000)

        streamed = httpx.post(f"{address}/v1/score", content=chunks(), headers=HEADERS)
        assert streamed.status_code == 413
        assert service.resources.memory.held == 0


class Streamed:
    """Request of unknown length, as Starlette gives it."""

    headers: ClassVar[dict[str, str]] = {}

    async def stream(self) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(1000)


def test_the_error_of_a_long_body_does_not_keep_the_body() -> None:
    """An error among the variables of its own frame would, until Python's collector comes."""

    async def read() -> None:
        async with bodies.BodyReader(2000, 10, bodies.MemoryBudget(10_000)).read(Streamed()):  # type: ignore[arg-type]
            pass

    with pytest.raises(bodies.RequestError) as raised:
        asyncio.run(read())
    frames = [frame for frame, _ in walk_tb(raised.value.__traceback__)]
    assert any("chunk" in frame.f_locals for frame in frames)
    assert not any(value is raised.value for frame in frames[1:] for value in frame.f_locals.values())


def test_all_bodies_together_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_reward()) as (address, service):
        body = save(tensors_of(service.accepted))
        with service.resources.memory.hold(service.resources.memory.total - len(body) + 1):
            reply = ask(address, body)
        assert reply.status_code == 503 and reply.headers["retry-after"]
        assert ask(address, body).status_code == 200 and service.resources.memory.held == 0


def test_what_never_fits_is_not_asked_to_come_back() -> None:
    with serving(tiny_reward(), max_body_mb=0.05) as (address, service):
        files = [("image", (str(number), picture("red", (500, 500)))) for number in range(4)]
        reply = httpx.post(f"{address}/v1/score_images", data={"prompt": "a"}, files=files, timeout=300)
        assert reply.status_code == 413 and "retry-after" not in reply.headers
        assert "this server has 838848 for requests; send fewer or smaller images" in reply.json()["error"]
        assert service.resources.memory.held == 0


def test_what_bodies_become_is_limited_too() -> None:
    with serving(tiny_reward()) as (address, service):
        tensors = tensors_of(service.accepted)
        halves = {name: tensor.half() for name, tensor in tensors.items() if name not in ("u", "seeds")}
        latents, files = save(tensors | halves), {"image": picture("red", (400, 300))}
        floats = 4 * (1 + sum(tensor.numel() for tensor in halves.values()))
        with service.resources.memory.hold(service.resources.memory.total - len(latents) - floats + 1):
            assert ask(address, latents).status_code == 503
        with service.resources.memory.hold(service.resources.memory.total - 4 * 400 * 300):
            reply = httpx.post(f"{address}/v1/score_images", data={"prompt": "a"}, files=files, timeout=300)
            assert (
                reply.status_code == 503
                and service.resources.memory.held == service.resources.memory.total - 4 * 400 * 300
            )
        assert ask(address, latents).status_code == 200 and service.resources.memory.held == 0


def test_a_server_whose_worker_died_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_reward(), timeout=0.5) as (address, service):

        def exit_worker(*args: Any, **options: Any) -> Tensor:
            raise asyncio.CancelledError

        monkeypatch.setattr(service.reward, "score_latents", exit_worker, raising=False)
        assert ask(address, save(tensors_of(service.accepted))).status_code == 504
        health = httpx.get(f"{address}/healthz")
        assert health.status_code == 503 and not health.json()["ready"]


HEAD = (
    b"POST /v1/score HTTP/1.1\r\nhost: localhost\r\nx-drm-protocol-version: 1\r\n"
    b"content-type: application/octet-stream\r\n"
)


@pytest.mark.slow
def test_slow_clients_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    with serving(tiny_reward(), timeout=1.0) as (address, _):
        start = time.monotonic()
        assert raw(address) == b""
        assert raw(address, b"POST /v1/score HTTP/1.1\r\n", b"host: localhost\r\n", pause=0.1) == b""
        assert b"408" in raw(address, HEAD + b"content-length: 100\r\n\r\nabc").splitlines()[0]
        assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        HEAD + b"transfer-encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
def test_broken_http_is_answered_with_a_400(address: str, sent: bytes) -> None:
    answers = raw(address, sent, b"", pause=0.1)
    assert b" 400 " in answers.splitlines()[0]
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_request_of_two_lengths_is_refused_and_what_it_hides_is_not_answered(address: str) -> None:
    for path in (b"/healthz", b"/v1/score"):
        for lengths in (
            b"content-length: 4\r\nTransfer-Encoding: chunked",
            b"transfer-encoding: chunked\r\ncontent-length: 0",
        ):
            sent = b"POST " + path + b" HTTP/1.1\r\nhost: localhost\r\n" + lengths + b"\r\n\r\n0\r\n\r\n"
            answers = raw(address, sent + b"GET /v1/model HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert answers.count(b"HTTP/1.1") == 1 and b" 400 " in answers.splitlines()[0]
            assert b"either Transfer-Encoding or Content-Length" in answers


@contextmanager
def connections(address: str, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Hold connections open on which only ``sent`` came."""
    host, port = address.removeprefix("http://").split(":")
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(count)]
        for connection in opened:
            with suppress(OSError):  # the server may have closed it already
                connection.sendall(sent)
        yield opened


def received(connection: socket.socket) -> bytes | None:
    """A byte that came, none if the other side ended the connection, None if it did neither."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\n", HEAD + b"content-length: 100\r\n\r\nabc"])
def test_connections_that_idle_do_not_stop_healthz(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(app, "REQUESTS", 32)
    monkeypatch.setattr(bodies, "SLOW_S", 60.0)
    with serving(tiny_reward(), timeout=5.0, queue=32) as (address, _):
        with connections(address, 100, sent) as opened:
            while sent.startswith(b"POST") and [*map(received, opened)].count(None) > 32:
                time.sleep(0.02)  # until the server has refused those beyond its limit
            for _ in range(3):
                assert httpx.get(f"{address}/healthz", timeout=3).json()["ready"]
            status = httpx.get(f"{address}/v1/model", timeout=3).status_code
            assert status == (503 if sent.startswith(b"POST") else 200)
            assert sent.startswith(b"POST") or 36 < [*map(received, opened)].count(b"") < 50
        while httpx.get(f"{address}/v1/model").status_code == 503:
            time.sleep(0.02)


@pytest.mark.parametrize(("length", "sent"), [(100, 3), (52_400, 52_000)], ids=["requests", "memory"])
def test_bodies_that_do_not_come_make_room(monkeypatch: pytest.MonkeyPatch, length: int, sent: int) -> None:
    monkeypatch.setattr(app, "REQUESTS", 16)
    monkeypatch.setattr(bodies, "SLOW_S", 0.2)
    with serving(tiny_reward(), timeout=60.0, queue=16, max_body_mb=0.05) as (address, service):
        begun = HEAD + f"content-length: {length}\r\n\r\n".encode() + bytes(sent)
        with connections(address, 16, begun) as opened:
            while service.resources.memory.held < 16 * sent:
                time.sleep(0.02)
            time.sleep(0.2)
            assert ask(address, save(tensors_of(service.accepted))).status_code == 200
            given_up = [one for one in opened if received(one) is not None]
            assert given_up and b" 503 " in given_up[0].recv(1000)


def test_a_client_that_reads_no_answers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_SECONDS", 0.3)
    with serving(tiny_reward()) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect((host, int(port)))
            connection.settimeout(60)
            with pytest.raises(OSError):
                while True:
                    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert httpx.get(f"{address}/v1/model").status_code == 200


@pytest.mark.slow
def test_a_body_of_tiny_chunks_is_cut_off_and_one_of_larger_chunks_is_read(address: str) -> None:
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    tiny = raw(address, head, b"1\r\nx\r\n" * 150_000, pause=0.1)
    assert tiny == b""
    assert b'{"error"' in raw(address, head, b"100\r\n" + bytes(256) + b"\r\n", b"0\r\n\r\n", pause=0.1)
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_requests_ahead_of_their_answers_are_few(address: str) -> None:
    one = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
    few = raw(address, one * 9 + one.replace(b"host", b"connection: close\r\nhost", 1))
    assert few.count(b"HTTP/1.1 200") == 10
    assert raw(address, one * 3000).count(b"HTTP/1.1 200") < 100


def test_decoding_ends_at_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_reward(), timeout=1.0) as (address, service):
        decode, decoded = images.decode_image, []

        def decode_slowly(*given: Any) -> Image.Image:
            decoded.append(given)
            time.sleep(0.4)
            return decode(*given)

        monkeypatch.setattr(images, "decode_image", decode_slowly)
        files = [("image", (str(number), picture("red"))) for number in range(8)]
        reply = httpx.post(f"{address}/v1/score_images", data={"prompt": "a"}, files=files, timeout=300)
        assert reply.status_code == 504 and "decoded within 1 seconds" in reply.json()["error"]
        monkeypatch.undo()
        reply = httpx.post(f"{address}/v1/score_images", data={"prompt": "a"}, files=files[:1], timeout=300)
        assert reply.status_code == 200 and len(decoded) < 8 and service.resources.memory.held == 0


def test_long_headers_are_refused(address: str) -> None:
    assert httpx.get(f"{address}/healthz", headers={"x": "y" * 20_000}).status_code == 431
    assert b" 400 " in raw(address, HEAD + b"x: ", *[b"y" * 5_000] * 4, pause=0.1).splitlines()[0]


def test_a_full_queue_a_timeout_and_a_client_that_leaves(gated: Any) -> None:
    with serving(tiny_reward(), batch_size=1, queue=2, timeout=1.5) as (address, service):
        gate, body = gated(service), save(tensors_of(service.accepted))
        replies: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: replies.append(ask(address, body))) for _ in range(2)]
        threads[0].start()
        assert gate.entered.wait(5)
        threads[1].start()
        with pytest.raises(httpx.TimeoutException):  # this one leaves
            httpx.post(f"{address}/v1/score", content=body, headers=HEADERS, timeout=0.2)
        while service.batcher.waiting > 1:
            time.sleep(0.01)
        threads.append(threading.Thread(target=lambda: replies.append(ask(address, body))))
        threads[2].start()
        while service.batcher.waiting < 2:
            time.sleep(0.01)
        full = ask(address, body)
        assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1 and "queue" in full.json()["error"]
        for thread in threads:
            thread.join(300)
        assert [reply.status_code for reply in replies] == [504] * 3
        assert httpx.get(f"{address}/healthz").status_code == 503  # the model is stuck
        gate.free.set()
        while service.batcher.busy_seconds:
            time.sleep(0.01)
        assert gate.rows == 1  # what nobody waits for any more is not scored
        assert httpx.get(f"{address}/healthz").json()["ready"] and ask(address, body).status_code == 200
        assert 'path="/v1/score",status="499"} 1' in httpx.get(f"{address}/metrics").text


class Observed:
    """A reward model's ``score_latents`` that sees the upper left of latents alone, takes its time, and is counted."""

    def __init__(self, reward: RewardModel, seconds: float) -> None:
        self.passes: list[Tensor] = []
        self._score, self._reward, self._seconds = type(reward).score_latents, reward, seconds

    def __call__(self, prompts: Any, latents: Tensor, draws: Tensor, **options: Any) -> Tensor:
        self.passes.append(latents)
        time.sleep(self._seconds * len(latents))
        return self._score(self._reward, prompts, latents[..., :8, :8], draws=draws[..., :8, :8], **options)


def test_one_row_starts_within_two_passes_of_three_requests_of_64_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_reward("sd15", "lrm"), max_pass_s=0.25, max_latent_pixels=128 * 128) as (address, service):
        observed = Observed(service.reward, 0.1)
        monkeypatch.setattr(service.reward, "score_latents", observed, raising=False)
        tokens = service.accepted.tokens
        long = save(tensors_of(service.accepted, rows=64, side=128, tokens=tokens))
        short = save(tensors_of(service.accepted, seed=1, side=128, tokens=tokens))

        async def ask_all() -> int:
            async with httpx.AsyncClient(timeout=300, headers=HEADERS) as client:
                asked = [asyncio.create_task(client.post(f"{address}/v1/score", content=long)) for _ in range(3)]
                while service.batcher.waiting + 4 * len(observed.passes) < 3 * 64:
                    await asyncio.sleep(0.01)
                before = len(observed.passes)
                assert (await client.post(f"{address}/v1/score", content=short)).status_code == 200
                for task in asked:
                    task.cancel()
                return before

        before = asyncio.run(ask_all())
        wanted = parse_request(short, service.accepted)[0].latents
        after = [any(torch.equal(row, wanted) for row in rows) for rows in observed.passes[before:]]
        assert True in after[:2] and max(map(len, observed.passes)) <= 2
        while service.batcher.busy_seconds or service.batcher.waiting:
            time.sleep(0.01)
        assert len(observed.passes) < before + 6  # those of the clients that left are not scored


def test_what_the_model_cannot_do_is_a_500_in_one_line(
    running: tuple[str, ServedModel], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("out of\nmemory")

    address, service = running
    monkeypatch.setattr(service.reward, "score_latents", fail, raising=False)
    reply = ask(address, save(tensors_of(service.accepted)))
    assert reply.status_code == 500 and reply.json() == {"error": "the model failed (RuntimeError)"}
    assert "out of memory" in capfd.readouterr().err


def test_a_bug_is_a_500_in_one_line(running: tuple[str, ServedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    address, service = running
    monkeypatch.setattr(service, "describe", lambda: 1 / 0)
    reply = httpx.get(f"{address}/v1/model")
    assert reply.status_code == 500 and reply.json() == {"error": "the server failed (ZeroDivisionError)"}


def test_answers_are_plain_json(address: str, accepted: Accepted) -> None:
    reply = ask(address, save(tensors_of(accepted)))
    assert json.loads(reply.text) == reply.json() and reply.headers["content-type"] == "application/json"


def test_a_sigterm_before_uvicorn_listens_to_signals_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is printed before, so that whoever waits for it may already send the signal."""
    asked: list[bool] = []
    monkeypatch.setattr("builtins.print", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: asked.append(self.should_exit))
    model, before = served_model(tiny_reward()), signal.getsignal(signal.SIGTERM)
    with bind("127.0.0.1", 0) as bound:
        server.serve(ScoringService([model], model.resources), bound)
    assert asked == [True] and signal.getsignal(signal.SIGTERM) == before
