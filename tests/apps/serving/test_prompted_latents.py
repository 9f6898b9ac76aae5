"""Latents and whole trajectories with raw prompts: the model's scores, encoded once, and what is refused."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

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
    passes = [
        _metric(text, 'latentreward_batch_rows_count{reward="reward"}')
        for text in (before, httpx.get(f"{address}/metrics").text)
    ]
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


def _metric(text: str, name: str) -> float:
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))
