"""Several rewards on one server: names, turns on a device, limits of each, metrics, and the description."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from safetensors.torch import save

from latentreward.apps.serving import check_name
from latentreward.apps.serving.service import ScoringService
from latentreward.core.errors import InputError
from tests.apps.serving.latent_requests import HEADERS, tensors_of
from tests.apps.serving.prompted_requests import body_of, latents_of
from tests.apps.serving.servers import service_of, started, tiny_reward

KIND = {"content-type": "application/octet-stream"}


def two(own: dict[str, Any], **settings: Any) -> ScoringService:
    """Two rewards on one device; ``own`` are limits of the second."""
    return service_of(
        tiny_reward("sd35", "dina"), tiny_reward("sd15", "lrm"), names="first second", own=own, **settings
    )


@pytest.fixture(scope="module")
def service() -> ScoringService:
    return two({"queue": 7, "batch_size": 2, "concurrency": 3}, max_wait_ms=1, token="s3cret")


@pytest.fixture(scope="module")
def address(service: ScoringService) -> Iterator[str]:
    with started(service) as address:
        yield address.replace("://", "://user:s3cret@")


def test_a_path_names_the_reward_and_the_first_is_the_default(address: str, service: ScoringService) -> None:
    for start, name in (("", "first"), ("/rewards/first", "first"), ("/rewards/second", "second")):
        model = service.named(name)
        latents = latents_of(model.accepted, 1)
        body = body_of({"latents": latents}, "a cat")
        reply = httpx.post(f"{address}{start}/v1/score_latents", content=body, headers=KIND, timeout=300).json()
        assert reply["scores"] == pytest.approx(model.reward.score_latents("a cat", latents).tolist(), abs=2e-5)
        assert httpx.get(f"{address}{start}/v1/model").json()["model"] == model.reward.identity
    reply = httpx.post(f"{address}/rewards/third/v1/score_latents", content=b"", headers=KIND)
    assert reply.status_code == 404 and "no reward 'third' is served here" in reply.json()["error"]


def test_limits_and_devices_are_told(address: str) -> None:
    first, second = httpx.get(f"{address}/v1/rewards").json()["rewards"]
    told = [
        (one["name"], one["device"], one["queue"], one["batch_size"], one["concurrency"]) for one in (first, second)
    ]
    assert told == [("first", "cpu", 256, 8, None), ("second", "cpu", 7, 2, 3)]
    assert first["passes_per_device"] == 1 and second["scores"] == ["score"]


def test_metrics_name_the_reward(address: str, service: ScoringService) -> None:
    body = save(tensors_of(service.named("second").accepted, tokens=service.named("second").accepted.tokens))
    url = f"{address}/rewards/second/v1/score"
    assert httpx.post(url, content=body, headers=HEADERS, timeout=300).status_code == 200
    text = httpx.get(f"{address}/metrics").text
    assert 'latentreward_reward_rows_total{reward="second"}' in text
    assert 'latentreward_reward_queue_rows{reward="first"} 0.0' in text
    assert 'latentreward_requests_total{path="/v1/score",status="200"}' in text and "/rewards/" not in text


@pytest.mark.parametrize("passes", [1, 2])
def test_rewards_on_one_device_compute_at_the_same_time_only_if_set(
    passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, both = two({}, max_wait_ms=0, passes_per_device=passes), threading.Barrier(2)

    def together(score: Any) -> Any:
        return lambda *given, **more: (both.wait(60 if passes == 2 else 1), score(*given, **more))[1]

    for model in service.models.values():
        monkeypatch.setattr(model.reward, "score_latents", together(model.reward.score_latents), raising=False)
    with started(service) as address, ThreadPoolExecutor(2) as pool:

        def ask(name: str) -> int:
            body = body_of({"latents": latents_of(service.named(name).accepted, 1)}, "a")
            url = f"{address}/rewards/{name}/v1/score_latents"
            return httpx.post(url, content=body, headers=KIND, timeout=300).status_code

        assert set(pool.map(ask, ["first", "second"])) == {200 if passes == 2 else 500}


def test_the_description_names_every_route(address: str) -> None:
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    of_reward = {"/v1/model", "/v1/score", "/v1/score_latents", "/v1/score_states", "/v1/score_images"}
    of_reward |= {"/score", "/compute", "/health"}
    prefixed = {f"/rewards/{{reward}}{path}" for path in of_reward}
    assert set(paths) == of_reward | prefixed | {"/v1/rewards", "/healthz", "/metrics"}
    assert all(operation["summary"] for path in paths.values() for operation in path.values())
    content = paths["/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "text" in content["$defs"]["Turn"]["properties"]
    assert {*paths["/v1/score_images"]["post"]["requestBody"]["content"]} == {"application/json", "multipart/form-data"}
    assert {one["name"] for one in paths["/v1/score"]["post"]["parameters"]} >= {"x-prompt", "x-drm-protocol-version"}


@pytest.mark.parametrize("name", ["", "a/b", "-x", "a b", "é", "x" * 65, "..", "{reward}"])
def test_names_that_no_address_can_hold(name: str) -> None:
    with pytest.raises(InputError, match="cannot stand in an address"):
        check_name(name)
