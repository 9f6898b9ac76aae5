"""Latents and whole trajectories with raw prompts: the model's scores, encoded once, and what is refused."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from latentreward.apps.serving.service import ServedModel
from latentreward.reward import ScoringNoise
from tests.apps.serving.prompted_requests import TIMES, body_of, latents_of
from tests.apps.serving.servers import serving, tiny_reward

PROMPTS = ["a cat", "zwei Hunde, drei Bäume"]
CASES = [("sd35", "dina"), ("sd15", "lrm")]


@pytest.fixture(scope="module", params=CASES, ids=[name for name, _ in CASES])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, ServedModel]]:
    with serving(tiny_reward(*request.param), batch_size=4, max_wait_ms=1, queue=32) as started:
        yield started


def ask(address: str, path: str, body: bytes, **headers: str) -> httpx.Response:
    kind = {"content-type": "application/octet-stream"}
    return httpx.post(f"{address}/v1/{path}", content=body, headers=kind | headers, timeout=300)


def test_clean_latents_get_the_models_score(served: tuple[str, ServedModel]) -> None:
    address, model = served
    latents = latents_of(model.accepted, 2)
    reply = ask(address, "score_latents", body_of({"latents": latents}, PROMPTS)).json()
    with torch.inference_mode():
        wanted = model.reward.score_latents(PROMPTS, latents).tolist()
    assert reply["scores"] == pytest.approx(wanted, abs=2e-5)
    assert reply["noise"] == str(model.reward.noise) and reply["model"] == model.reward.identity
    again = ask(address, "score_latents", body_of({"latents": latents}, PROMPTS)).json()
    assert again["scores"] == pytest.approx(reply["scores"], abs=2e-5)


def test_noise_levels_and_seeds_of_rows(served: tuple[str, ServedModel]) -> None:
    address, model = served
    latents, u, seeds = latents_of(model.accepted, 2), torch.tensor([0.2, 0.7]), torch.tensor([3, 4])
    body = body_of({"latents": latents, "u": u, "seeds": seeds}, "a cat")
    found = ask(address, "score_latents", body).json()["scores"]
    for row in range(2):
        noise = ScoringNoise(sigmas=(u[row].item(),), seeds=(int(seeds[row]),))
        with torch.inference_mode():
            wanted = model.reward.score_latents("a cat", latents[row][None], noise=noise)
        assert found[row] == pytest.approx(wanted.item(), abs=2e-5)
    without = ask(address, "score_latents", body_of({"latents": latents, "u": u}, "a cat")).json()["scores"]
    seeds = torch.zeros(2, dtype=torch.int64)
    zero = ask(address, "score_latents", body_of({"latents": latents, "u": u, "seeds": seeds}, "a cat")).json()[
        "scores"
    ]
    assert without == pytest.approx(zero, abs=2e-5) and without != pytest.approx(found, abs=1e-4)


def test_states_get_the_models_scores_in_passes_of_one_shape(served: tuple[str, ServedModel]) -> None:
    address, model = served
    states = latents_of(model.accepted, 2, 3)
    before = httpx.get(f"{address}/metrics").text
    reply = ask(address, "score_states", body_of({"latents": states, "timesteps": TIMES}, PROMPTS)).json()
    with torch.inference_mode():
        wanted = model.reward.score_states(PROMPTS, states, TIMES)
    torch.testing.assert_close(torch.tensor(reply["scores"]), wanted, atol=2e-5, rtol=0)
    passes = [_metric(text, "latentreward_batch_rows_count") for text in (before, httpx.get(f"{address}/metrics").text)]
    assert passes[1] - passes[0] <= 3  # 6 states in passes of 4; the first state of a new shape comes alone
    for dtype in (torch.float16, torch.bfloat16):
        halves = body_of({"latents": states.to(dtype), "timesteps": TIMES.expand(2, 3)}, PROMPTS)
        with torch.inference_mode():
            wanted = model.reward.score_states(PROMPTS, states.to(dtype).float(), TIMES)
        found = torch.tensor(ask(address, "score_states", halves).json()["scores"])
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_prompts_are_encoded_once(served: tuple[str, ServedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    address, model = served
    encoded, encode = [], model.reward.backbone.encode_prompts

    def counted(prompts: Any) -> Any:
        encoded.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(model.reward.backbone, "encode_prompts", counted)
    body = body_of({"latents": latents_of(model.accepted, 2, 3), "timesteps": TIMES}, "a new prompt")
    for _ in range(2):
        assert ask(address, "score_states", body).status_code == 200
    latents = body_of({"latents": latents_of(model.accepted, 1)}, "a new prompt")
    assert ask(address, "score_latents", latents).status_code == 200
    assert encoded == ["a new prompt"]
    text = httpx.get(f"{address}/metrics").text
    assert _metric(text, 'latentreward_reward_prompts_total{from="kept",reward="reward"}') >= 2


def _metric(text: str, name: str) -> float:
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


def test_bad_latents(served: tuple[str, ServedModel]) -> None:
    address, model = served
    good = {"latents": latents_of(model.accepted, 2)}
    nan = good["latents"].clone()
    nan[1, 0, 0, 0] = torch.nan
    u = torch.tensor([0.5, 0.5])
    wrong = torch.zeros(2, model.accepted.channels + 1, 8, 8)
    cases: list[tuple[dict[str, torch.Tensor], Any, int, str]] = [
        ({"latents": good["latents"].double()}, "a", 400, "latents: dtype must be F32 or F16 or BF16, not 'F64'"),
        ({"latents": nan}, "a", 422, "latents holds NaN or infinity"),
        (
            {"latents": wrong},
            "a",
            422,
            f"latents: C of (B, C, h, w) is {model.accepted.channels + 1}, but {model.accepted.channels}",
        ),
        ({"latents": good["latents"][0]}, "a", 400, "latents: shape must be (B, C, h, w), whole numbers from 1 on"),
        ({"latents": torch.zeros(65, model.accepted.channels, 8, 8)}, "a", 413, "latents: rows 65 is over"),
        (good | {"u": u[:1]}, "a", 422, "u: B of (B) is 1, but 2 in this model or other tensors; give B = 2"),
        (good | {"u": u + 1}, "a", 422, "u holds 1.5; noise levels lie in [0, 1]"),
        (good | {"u": u * torch.nan}, "a", 422, "u holds NaN"),
        (good | {"seeds": torch.tensor([1, 2])}, "a", 422, "seeds are given without u"),
        (good | {"x": u}, "a", 400, "holds 'x'"),
        (good, ["a"], 422, "1 prompts for 2 rows of latents"),
        (good, ["a", "b" * 10_001], 422, "prompt 1 has 10001 characters"),
        (good, ["a", "\ud800"], 400, "__metadata__.prompts: Invalid JSON: unexpected end of hex escape"),
    ]
    for tensors, prompts, status, message in cases:
        reply = ask(address, "score_latents", body_of(tensors, prompts))
        assert (reply.status_code, message in reply.json()["error"]) == (status, True), reply.text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "give __metadata__ one of prompt"),
        ({"prompt": "a", "prompts": "[]"}, "give __metadata__ one of prompt"),
        ({"prompts": "a cat"}, "__metadata__.prompts: Invalid JSON: expected value"),
        ({"prompts": "[" * 20_000}, "__metadata__.prompts: Invalid JSON: recursion limit"),
        ({"prompts": '["a", 1]'}, "__metadata__.prompts.1: Input should be a valid string"),
        ({"prompts": '{"a": "b"}'}, "__metadata__.prompts: Input should be a valid array"),
        ({"prompt": "a", "promt": "b"}, "__metadata__.promt: Extra inputs are not permitted"),
    ],
)
def test_bad_prompts(served: tuple[str, ServedModel], texts: dict[str, str] | None, message: str) -> None:
    address, model = served
    reply = ask(address, "score_latents", save({"latents": latents_of(model.accepted, 1)}, metadata=texts))
    assert reply.status_code == 400 and message in reply.json()["error"]


def test_bad_states(served: tuple[str, ServedModel]) -> None:
    address, model = served
    states, channels = latents_of(model.accepted, 2, 3), model.accepted.channels
    cases: list[tuple[dict[str, torch.Tensor], int, str]] = [
        ({"latents": states, "timesteps": TIMES[:2]}, 422, "timesteps: S of (S) is 2, but 3 in"),
        ({"latents": states, "timesteps": TIMES.expand(3, 3)}, 422, "timesteps: N of (N, S) is 3, but 2 in"),
        ({"latents": states, "timesteps": TIMES * 2}, 422, "timestep 1800 is out of range"),
        ({"latents": states, "timesteps": -TIMES}, 422, "timestep -900 is out of range"),
        ({"latents": states, "timesteps": TIMES * torch.nan}, 422, "timesteps holds NaN or infinity"),
        ({"latents": states, "timesteps": TIMES.double()}, 400, "timesteps: dtype must be F32 or I64"),
        ({"latents": states * torch.inf, "timesteps": TIMES}, 422, "latents holds NaN or infinity"),
        ({"latents": states}, 400, "lacks 'timesteps'"),
        (
            {"latents": states[0], "timesteps": TIMES},
            400,
            "latents: shape must be (N, S, C, h, w), whole numbers from 1 on",
        ),
        ({"latents": torch.zeros(11, 3, channels, 8, 8), "timesteps": TIMES}, 413, "latents: N · S 33 is over"),
    ]
    for tensors, status, message in cases:
        reply = ask(address, "score_states", body_of(tensors, "a"))
        assert (reply.status_code, message in reply.json()["error"]) == (status, True), reply.text
    whole = body_of({"latents": states, "timesteps": torch.tensor([900, 400, 20])}, "a")
    assert ask(address, "score_states", whole).status_code == 200


def test_bad_bytes(served: tuple[str, ServedModel]) -> None:
    address, _ = served
    long = json.dumps({"__metadata__": {"prompt": "a" * 2**20}}).encode()
    for path in ("score_latents", "score_states"):
        assert ask(address, path, b"").status_code == 400
        assert ask(address, path, b"{}", **{"content-type": "application/json"}).status_code == 415
        reply = ask(address, path, struct.pack("<Q", len(long)) + long)
        assert reply.status_code == 400 and "at most 1048576 are read" in reply.json()["error"]
