"""A server of two rewards: names, limits, turns, metrics, description, and clients of UniRL and Flow-Factory."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from safetensors.torch import save

from latentreward.apps.serving.service import ScoringService
from tests.apps.serving.framework_clients import FlowFactoryClient, UniRLClient, encoded
from tests.apps.serving.latent_requests import HEADERS, tensors_of
from tests.apps.serving.prompted_requests import body_of, latents_of
from tests.apps.serving.servers import service_of, started, tiny_reward
from tests.reward.scoring.models import pictures

PROMPTS = ["a cat", "two dogs", "a cat"]


def two(**settings: Any) -> ScoringService:
    rewards = tiny_reward("sd35", "dina"), tiny_reward("sd15", "lrm")
    return service_of(*rewards, names="taste lrm-1.5", **{"max_wait_ms": 1, **settings})


@pytest.fixture(scope="module")
def service() -> ScoringService:
    return two(batch_size=4, queue=8)


@pytest.fixture(scope="module")
def address(service: ScoringService) -> Iterator[str]:
    with started(service) as address:
        yield address


def test_unirls_client_gets_the_mean_of_the_rewards_it_names(address: str, service: ScoringService) -> None:
    weights = {"taste": 0.25, "lrm-1.5": 0.75}
    client = UniRLClient(address, weights)
    assert client.missing() == [] and UniRLClient(address, {"tatse": 1.0}).missing() == ["tatse"]
    images = pictures(3)
    columns = [service.named(name).reward.score(PROMPTS, images) * weight for name, weight in weights.items()]
    found = client.rewards(PROMPTS, images, "png")
    assert found == pytest.approx(sum(columns).tolist(), abs=2e-5)
    assert client.rewards(PROMPTS, images) != found  # JPEG, as the client sends by default


def test_samples_may_want_different_rewards_and_have_several_turns(address: str, service: ScoringService) -> None:
    images = pictures(2)
    sent = UniRLClient(address, {"taste": 1.0}).payload(PROMPTS[:2], images, "png")
    sent["requests"][1]["required_rewards"] = ["lrm-1.5", "lrm-1.5"]
    condition = {"text": "before", "image_b64": encoded(Image.new("RGB", (9, 9)))}
    sent["requests"][0]["history"].insert(0, condition)
    sent["later"] = sent["requests"][0]["later"] = True  # a newer client's fields are ignored, as by UniRL's server
    results = httpx.post(f"{address}/score", json=sent, timeout=300).json()["results"]
    assert [[*result] for result in results] == [["taste"], ["lrm-1.5"]]
    wanted = [service.named(name).reward.score(PROMPTS[i], [images[i]]).item() for i, name in enumerate(service.models)]
    found = [results[0]["taste"]["score"], results[1]["lrm-1.5"]["score"]]
    assert found == pytest.approx(wanted, abs=2e-5)


def test_an_older_client_without_version_and_marks(address: str) -> None:
    sample = {"history": [{"text": "a", "image_b64": encoded(pictures(1)[0])}], "required_rewards": ["taste"]}
    reply = httpx.post(f"{address}/score", json={"requests": [{**sample, "metadata": None}]}, timeout=300).json()
    assert len(reply["results"]) == 1 and set(reply["identities"][0].values()) == {None}
    assert httpx.post(f"{address}/score", json={"requests": []}).json()["results"] == []


def test_a_reward_that_fails_is_told_beside_the_others(
    address: str, service: ScoringService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.named("taste").reward, "score", fail, raising=False)
    client = UniRLClient(address, {"taste": 1.0, "lrm-1.5": 1.0})
    sent = client.payload(PROMPTS[:1], pictures(1))
    reply = httpx.post(f"{address}/score", json=sent, timeout=300).json()
    result, errors = client.checked(sent["requests"], reply)[0]
    assert errors == {"taste": "the model failed (RuntimeError)"} and [*result] == ["lrm-1.5"]


GOOD = {"history": [{"text": "a", "image_b64": encoded(Image.new("RGB", (16, 16)))}], "required_rewards": ["taste"]}
BROKEN = {"text": "a", "image_b64": "aaaa"}


def sample(**change: Any) -> dict[str, Any]:
    return {"requests": [GOOD | change]}


def computed(**change: Any) -> dict[str, Any]:
    return FlowFactoryClient("").payload(["a"], pictures(1)) | change


@pytest.mark.parametrize(
    ("path", "body", "status", "key"),
    [
        ("score", sample(required_rewards=["unknown"]), 400, "no reward 'unknown'"),
        ("score", sample(required_rewards=[]), 400, "requests.0.required_rewards"),
        ("score", sample(history=[]), 400, "requests.0.history"),
        ("score", sample(history=[{"text": "a"}]), 422, "image '0'"),
        ("score", sample(history=[{"image_b64": "aa"}]), 400, "requests.0.history.0.text"),
        ("score", sample(history=[{"text": "a", "image_b64": "%"}]), 400, "image 0"),
        ("score", sample(history=[{"text": "a", "video_path": "/etc/passwd"}]), 400, "video_path"),
        ("score", sample(history=[BROKEN | {"text": "a" * 10_001}]), 422, "prompt 0"),
        ("score", sample(scorer_version="3"), 400, "scorer_version"),
        ("score", sample() | {"protocol_version": "2"}, 400, "protocol_version"),
        ("score", {"requests": [GOOD] * 9}, 413, "samples 9"),
        ("score", [], 400, "the body"),
        ("compute", computed(prompt=["a", "b"]), 422, "2 prompts"),
        ("compute", computed(image=None), 422, "image"),
        ("compute", computed(image=["%"]), 400, "image 0"),
        ("compute", computed(video=[["aaaa"]]), 400, "video"),
        ("compute", computed(condition_images=[["aaaa"]]), 422, "1 sources"),
        ("compute", computed(prompt=["a"] * 9, image=["aaaa"] * 9), 413, "images 9"),
    ],
)
def test_what_is_no_request_is_refused_in_one_line(address: str, path: str, body: Any, status: int, key: str) -> None:
    reply = httpx.post(f"{address}/{path}", json=body, timeout=300)
    assert (reply.status_code, key in reply.json()["error"]) == (status, True), reply.text
    assert "\n" not in reply.json()["error"]


def test_no_reward_scores_a_request_that_another_has_no_room_for(
    address: str, service: ScoringService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client sends the whole request again."""
    monkeypatch.setattr(service.named("lrm-1.5").batcher, "queue", 0)
    before = passes_of("taste", address)
    reply = httpx.post(f"{address}/score", json=sample(required_rewards=["taste", "lrm-1.5"]), timeout=300)
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1" and passes_of("taste", address) == before


def passes_of(name: str, address: str) -> list[str]:
    text = httpx.get(f"{address}/metrics").text
    return re.findall(rf'latentreward_batch_rows_count{{reward="{name}"}} .*', text)


def test_flow_factorys_client(address: str, service: ScoringService) -> None:
    images = pictures(3)
    for name, url in (("taste", address), ("lrm-1.5", f"{address}/rewards/lrm-1.5")):
        client = FlowFactoryClient(url)
        assert client.healthy()  # asked before training: the client gives up without
        found = client.compute(PROMPTS, images)
        assert found == pytest.approx(service.named(name).reward.score(PROMPTS, images).tolist(), abs=2e-5)
    assert not FlowFactoryClient(f"{address}/rewards/other").healthy()
    assert FlowFactoryClient(address).compute(PROMPTS[:1], images[:1], kwargs=None)


def test_a_path_names_the_reward_and_the_first_is_the_default(address: str, service: ScoringService) -> None:
    for start, name in (("", "taste"), ("/rewards/taste", "taste"), ("/rewards/lrm-1.5", "lrm-1.5")):
        model = service.named(name)
        latents = latents_of(model.accepted, 1)
        body = body_of({"latents": latents}, "a cat")
        reply = httpx.post(f"{address}{start}/v1/score_latents", content=body, headers=HEADERS, timeout=300).json()
        assert reply["scores"] == pytest.approx(model.reward.score_latents("a cat", latents).tolist(), abs=2e-5)
        assert httpx.get(f"{address}{start}/v1/model").json()["model"] == model.reward.identity
    reply = httpx.post(f"{address}/rewards/third/v1/score_latents", content=b"", headers=HEADERS)
    assert reply.status_code == 404 and "no reward 'third' is served here" in reply.json()["error"]


def test_metrics_name_the_reward(address: str, service: ScoringService) -> None:
    body = save(tensors_of(service.named("lrm-1.5").accepted, tokens=service.named("lrm-1.5").accepted.tokens))
    url = f"{address}/rewards/lrm-1.5/v1/score"
    assert httpx.post(url, content=body, headers=HEADERS, timeout=300).status_code == 200
    text = httpx.get(f"{address}/metrics").text
    assert 'latentreward_batch_rows_sum{reward="lrm-1.5"}' in text
    assert 'latentreward_queue_rows{reward="taste"} 0.0' in text
    assert 'latentreward_requests_total{path="/v1/score",status="200"}' in text and "/rewards/" not in text


def test_the_description_names_every_route(address: str) -> None:
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    of_reward = {"/v1/model", "/v1/score", "/v1/score_latents", "/v1/score_states", "/v1/score_images"}
    of_reward |= {"/score", "/compute", "/health"}
    prefixed = {f"/rewards/{{reward}}{path}" for path in of_reward}
    assert set(paths) == of_reward | prefixed | {"/v1/rewards", "/healthz", "/metrics"}
    assert all(operation["summary"] for path in paths.values() for operation in path.values())
