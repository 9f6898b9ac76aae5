"""Clients of UniRL and Flow-Factory against a server of two rewards."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from PIL import Image

from latentreward.apps.serving.app import create_app
from latentreward.apps.serving.dialects import Dialect
from latentreward.apps.serving.service import ScoringService
from latentreward.core.errors import InputError
from tests.apps.serving.framework_clients import FlowFactoryClient, UniRLClient, encoded
from tests.apps.serving.servers import service_of, started, tiny_reward
from tests.reward.scoring.models import pictures


class Names(Dialect):
    """A wire format of one's own."""

    def router(self) -> APIRouter:
        router = APIRouter()
        router.get("/names", summary="The names of the rewards")(self.names)
        return router

    async def names(self) -> list[str]:
        return [*self.service.models]


class Taken(Names):
    """A wire format with a route of another."""

    def router(self) -> APIRouter:
        router = APIRouter()
        router.post("/score", summary="UniRL's")(self.names)
        return router


PROMPTS = ["a cat", "two dogs", "a cat"]


def two(own: Any = None, **settings: Any) -> ScoringService:
    """Two rewards; ``own`` are limits of the second."""
    rewards = tiny_reward("sd35", "dina"), tiny_reward("sd15", "lrm")
    return service_of(*rewards, names="taste lrm-1.5", own=own, **{"max_wait_ms": 1, **settings})


@pytest.fixture(scope="module")
def service() -> ScoringService:
    return two(batch_size=4, queue=8, dialects=(f"{__name__}.Names",))


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
        (f"{__name__}.ScoringService", "is not a subclass of latentreward.apps.serving.dialects.Dialect; give"),
        ("latentreward.apps.serving.dialects.Dialect", ": Dialect lacks router of Dialect; define what is missing"),
        (f"{__name__}.Taken", "there are two routes POST /score; give one another path"),
    ],
)
def test_a_wrong_dialect_is_refused(path: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        create_app(service_of(tiny_reward(), dialects=(path,)))


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
        ("score", sample(required_rewards="taste"), 400, "requests.0.required_rewards"),
        ("score", sample(history=[]), 400, "requests.0.history"),
        ("score", sample(history=[{"text": "a"}]), 422, "image '0'"),
        ("score", sample(history=[{"image_b64": "aa"}]), 400, "requests.0.history.0.text"),
        ("score", sample(history=[{"text": "a", "image_b64": "%"}]), 400, "image 0"),
        ("score", sample(history=[BROKEN]), 422, "image '0'"),
        ("score", sample(history=[{"text": "a", "video_path": "/etc/passwd"}]), 400, "video_path"),
        ("score", sample(history=[{"text": "a", "image_ipc": "x"}]), 400, "image_ipc"),
        ("score", sample(history=[BROKEN | {"text": "a" * 10_001}]), 422, "prompt 0"),
        ("score", sample(scorer_version="3"), 400, "scorer_version"),
        ("score", sample(source_rank="0"), 400, "source_rank"),
        ("score", sample(metadata=[]), 400, "metadata"),
        ("score", sample() | {"protocol_version": "2"}, 400, "protocol_version"),
        ("score", sample() | {"grad_mode": True}, 400, "grad_mode"),
        ("score", {"requests": [GOOD] * 9}, 413, "samples for taste 9"),
        ("score", {}, 400, "requests"),
        ("score", [], 400, "the body"),
        ("compute", computed(prompt=["a", "b"]), 422, "2 prompts"),
        ("compute", computed(prompt="a"), 400, "prompt"),
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


def test_more_samples_than_a_rewards_queue_holds_are_refused_for_good() -> None:
    """The queue of another reward may be longer; 503 would make the client try again without end."""
    with started(two({"queue": 2}, queue=8)) as address:
        sent = {"requests": [GOOD, *[GOOD | {"required_rewards": ["taste", "lrm-1.5"]}] * 3]}
        reply = httpx.post(f"{address}/score", json=sent, timeout=300)
    assert reply.status_code == 413 and "samples for lrm-1.5 3 is over" in reply.json()["error"]


def test_no_reward_scores_a_request_that_another_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends the whole request again."""
    service = two({"concurrency": 1})
    monkeypatch.setattr(service.named("lrm-1.5"), "_under_way", 1)
    with started(service) as address:
        reply = httpx.post(f"{address}/score", json=sample(required_rewards=["taste", "lrm-1.5"]), timeout=300)
        text = httpx.get(f"{address}/metrics").text
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
    assert 'latentreward_reward_refused_total{reward="lrm-1.5"} 1.0' in text
    assert 'latentreward_reward_passes_total{reward="taste"}' not in text


def test_images_that_fit_the_memory_of_one_reward_only_are_refused_for_good() -> None:
    """Each reward decodes the images for itself; 503 would make the client try again without end."""
    image = {"history": [{"text": "a", "image_b64": encoded(Image.new("RGB", (245, 245)))}]}
    service = two(max_body_mb=0.05)  # 0.8 MiB for all requests
    with started(service) as address:
        replies = [
            httpx.post(f"{address}/score", json=sample(**image, required_rewards=names), timeout=300)
            for names in (["taste"], ["taste", "lrm-1.5"])
        ]
    assert [reply.status_code for reply in replies] == [200, 413], replies[0].text
    assert "the request needs" in replies[1].json()["error"] and service.memory.held == 0


def test_flow_factorys_client(address: str, service: ScoringService) -> None:
    images = pictures(3)
    for name, url in (("taste", address), ("lrm-1.5", f"{address}/rewards/lrm-1.5")):
        client = FlowFactoryClient(url)
        assert client.healthy()  # asked before training: the client gives up without
        found = client.compute(PROMPTS, images)
        assert found == pytest.approx(service.named(name).reward.score(PROMPTS, images).tolist(), abs=2e-5)
    assert not FlowFactoryClient(f"{address}/rewards/other").healthy()
    assert FlowFactoryClient(address).compute(PROMPTS[:1], images[:1], kwargs=None)
