"""Clients of UniRL and Flow-Factory against a server of two rewards."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import Request
from fastapi.responses import JSONResponse
from PIL import Image

from latentreward.apps.serving.app import routes_of
from latentreward.apps.serving.dialects import Dialect
from latentreward.apps.serving.resources import Resources
from latentreward.apps.serving.routes import Route
from latentreward.apps.serving.served import ScoringService, ServedModel
from latentreward.apps.serving.settings import RewardToServe, ServiceSettings
from latentreward.core.errors import InputError
from tests.apps.serving.framework_clients import FlowFactoryClient, UniRLClient, encoded
from tests.apps.serving.servers import started, tiny_reward
from tests.reward.scoring.models import pictures


class Names(Dialect):
    """A wire format of one's own."""

    def routes(self) -> list[Route]:
        return [Route("GET", "/names", self.names, "The names of the rewards")]

    async def names(self, request: Request) -> JSONResponse:
        return JSONResponse([*self.service.models])


class Taken(Dialect):
    """A wire format with a route of another."""

    def routes(self) -> list[Route]:
        return [Route("POST", "/score", self.routes, "UniRL's")]


PROMPTS = ["a cat", "two dogs", "a cat"]


@pytest.fixture(scope="module")
def service() -> ScoringService:
    resources = Resources(ServiceSettings(batch_size=4, max_wait_ms=1, queue=8, dialects=(f"{__name__}.Names",)))
    models = [
        ServedModel(tiny_reward("sd35", "dina"), resources, name="taste"),
        ServedModel(tiny_reward("sd15", "lrm"), resources, name="lrm-1.5"),
    ]
    return ScoringService(models, resources)


@pytest.fixture(scope="module")
def address(service: ScoringService) -> Iterator[str]:
    with started(service) as address:
        yield address


def test_a_dialect_of_ones_own_answers_beside_the_others(address: str) -> None:
    assert httpx.get(f"{address}/names").json() == ["taste", "lrm-1.5"]
    assert "/names" in httpx.get(f"{address}/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere.Dialect", r"dialects='nowhere\.Dialect' cannot be imported"),
        (f"{__name__}.Route", "is not a subclass of latentreward.apps.serving.dialects.Dialect; give"),
        ("latentreward.apps.serving.dialects.Dialect", ": Dialect lacks routes of Dialect; define what is missing"),
        (f"{__name__}.Taken", "there are two routes POST /score; give one another path"),
    ],
)
def test_a_wrong_dialect_is_refused(path: str, reason: str, service: ScoringService) -> None:
    resources = Resources(ServiceSettings(dialects=(path,)))
    with pytest.raises(InputError, match=reason):
        routes_of(ScoringService([ServedModel(service.default.reward, resources)], resources))


def test_unirls_client_gets_the_mean_of_the_rewards_it_names(address: str, service: ScoringService) -> None:
    weights = {"taste": 0.25, "lrm-1.5": 0.75}
    client = UniRLClient(address, weights)
    assert client.missing() == [] and UniRLClient(address, {"tatse": 1.0}).missing() == ["tatse"]
    images = pictures(3)
    columns = [service.named(name).reward.score(PROMPTS, images) * weight for name, weight in weights.items()]
    found = client.rewards(PROMPTS, images, "png")
    assert found == pytest.approx(sum(columns).tolist(), abs=2e-5)
    assert client.rewards(PROMPTS, images) != found  # JPEG, as the client sends by default


def test_health_names_the_scores_of_each_reward(address: str) -> None:
    reply = httpx.get(f"{address}/health").json()
    assert reply == {"status": "ok", "rewards": {"taste": ["score"], "lrm-1.5": ["score"]}}


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


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"required_rewards": ["unknown"]}, 400, "no reward 'unknown' is served here; this server has taste, lrm-1.5"),
        ({"required_rewards": []}, 422, "requests.0.required_rewards is empty"),
        ({"required_rewards": "taste"}, 400, "requests.0.required_rewards: Input should be a valid"),
        ({"history": []}, 422, "requests.0.history is empty"),
        ({"history": [{"text": "a"}]}, 422, "the last turn has no image_b64"),
        ({"history": [{"image_b64": "aa"}]}, 400, "requests.0.history.0.text: Field required"),
        ({"history": [{"text": "a", "image_b64": "%"}]}, 400, "requests.0: image_b64 is no base64"),
        ({"history": [{"text": "a", "image_b64": "aaaa"}]}, 422, "unknown image format"),
        ({"history": [{"text": "a", "video_path": "/etc/passwd"}]}, 422, "video_path is given"),
        ({"history": [{"text": "a", "image_ipc": "x"}]}, 422, "image_ipc is given"),
        ({"history": [{"text": "a" * 10_001, "image_b64": "aaaa"}]}, 422, "a prompt has 10001 characters"),
        ({"scorer_version": "3"}, 422, "this server pins no versions"),
        ({"source_rank": "0"}, 400, "requests.0.source_rank"),
        ({"metadata": []}, 400, "requests.0.metadata"),
    ],
)
def test_bad_samples(address: str, change: dict[str, Any], status: int, message: str) -> None:
    reply = httpx.post(f"{address}/score", json={"requests": [GOOD | change]}, timeout=300)
    assert reply.status_code == status and message in reply.json()["error"] and "\n" not in reply.json()["error"]


def test_more_samples_than_a_rewards_queue_holds_are_refused_for_good() -> None:
    """The queue of another reward may be longer; 503 would make the client try again without end."""
    resources = Resources(ServiceSettings(max_wait_ms=1, queue=8))
    limits = RewardToServe("", queue=2).limits(resources.settings)
    models = [
        ServedModel(tiny_reward("sd35", "dina"), resources, name="taste"),
        ServedModel(tiny_reward("sd15", "lrm"), resources, limits, "small"),
    ]
    with started(ScoringService(models, resources)) as address:
        sent = {"requests": [GOOD, *[GOOD | {"required_rewards": ["taste", "small"]}] * 3]}
        reply = httpx.post(f"{address}/score", json=sent, timeout=300)
    assert reply.status_code == 413
    told = (
        "requests: samples for small 3 is over this server's limit of 2; send several requests, or raise the server's"
    )
    assert reply.json()["error"] == f"{told} --queue"


def test_no_reward_scores_a_request_that_another_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends the whole request again."""
    resources = Resources(ServiceSettings(max_wait_ms=1))
    limits = RewardToServe("", concurrency=1).limits(resources.settings)
    models = [
        ServedModel(tiny_reward("sd35", "dina"), resources, name="taste"),
        ServedModel(tiny_reward("sd15", "lrm"), resources, limits, "busy"),
    ]
    monkeypatch.setattr(models[1], "_under_way", 1)
    with started(ScoringService(models, resources)) as address:
        reply = httpx.post(
            f"{address}/score", json={"requests": [GOOD | {"required_rewards": ["taste", "busy"]}]}, timeout=300
        )
        text = httpx.get(f"{address}/metrics").text
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
    assert 'latentreward_reward_refused_total{reward="busy"} 1.0' in text
    assert 'latentreward_reward_passes_total{reward="taste"}' not in text


def test_images_that_fit_the_memory_of_one_reward_only_are_refused_for_good(service: ScoringService) -> None:
    """Each reward decodes the images for itself; 503 would make the client try again without end."""
    resources = Resources(ServiceSettings(max_wait_ms=1, max_body_mb=0.05))  # 0.8 MiB for all requests
    models = [ServedModel(model.reward, resources, name=name) for name, model in service.models.items()]
    image = encoded(Image.new("RGB", (245, 245)))
    with started(ScoringService(models, resources)) as address:
        sample = {"history": [{"text": "a", "image_b64": image}], "required_rewards": ["taste"]}
        one = httpx.post(f"{address}/score", json={"requests": [sample]}, timeout=300)
        sample["required_rewards"].append("lrm-1.5")
        both = httpx.post(f"{address}/score", json={"requests": [sample]}, timeout=300)
    assert one.status_code == 200, one.text
    assert both.status_code == 413 and "the request needs" in both.json()["error"]
    assert resources.memory.held == 0


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"requests": [GOOD], "protocol_version": "2"}, 400, "protocol_version is '2'"),
        ({"requests": [GOOD], "grad_mode": True}, 422, "no gradients"),
        ({"requests": [GOOD] * 9}, 413, "requests: samples 9 is over this server's limit of 8"),
        ({}, 400, "requests: Field required"),
        ([], 400, "the body: Input should be an object"),
    ],
)
def test_bad_bodies_of_unirl(address: str, body: Any, status: int, message: str) -> None:
    reply = httpx.post(f"{address}/score", json=body, timeout=300)
    assert reply.status_code == status and message in reply.json()["error"]


def test_flow_factorys_client(address: str, service: ScoringService) -> None:
    images = pictures(3)
    for name, url in (("taste", address), ("lrm-1.5", f"{address}/rewards/lrm-1.5")):
        client = FlowFactoryClient(url)
        assert client.healthy()  # asked before training: the client gives up without
        found = client.compute(PROMPTS, images)
        assert found == pytest.approx(service.named(name).reward.score(PROMPTS, images).tolist(), abs=2e-5)
    assert not FlowFactoryClient(f"{address}/rewards/other").healthy()
    assert FlowFactoryClient(address).compute(PROMPTS[:1], images[:1], kwargs=None)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompt": ["a", "b"]}, 422, "2 prompts for 1 images"),
        ({"prompt": "a"}, 400, "prompt: Input should be a valid"),
        ({"image": None}, 422, "the request holds no image"),
        ({"image": ["%"]}, 400, "image 0 is no base64"),
        ({"video": [["aaaa"]]}, 422, "video is given"),
        ({"condition_images": [["aaaa"]]}, 422, "condition_images is given"),
        ({"prompt": ["a"] * 9, "image": ["aaaa"] * 9}, 413, "image: images 9 is over this server's limit of 8"),
    ],
)
def test_bad_bodies_of_flow_factory(address: str, change: dict[str, Any], status: int, message: str) -> None:
    body = FlowFactoryClient(address).payload(["a"], pictures(1)) | change
    reply = httpx.post(f"{address}/compute", json=body, timeout=300)
    assert reply.status_code == status and message in reply.json()["error"]
