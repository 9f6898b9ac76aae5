"""``latentreward serve`` as a process: load, hostile bodies, and how it ends."""

import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from safetensors.torch import save
from torch import Tensor

from latentreward.apps.serving.bodies import Accepted
from latentreward.apps.serving.service import ServedModel
from latentreward.apps.serving.settings import ServiceSettings
from tests.alignment.rewards.stored import write_run
from tests.apps.serving.latent_requests import HEADERS, tensors_of
from tests.apps.serving.mutated_bodies import fuzz_route, routes
from tests.apps.serving.processes import ServerProcess, forked_server, load
from tests.apps.serving.servers import serving, tiny_reward

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, "dina", "sd35", lora={"rank": 2})
    return folder


@pytest.fixture
def server(request: pytest.FixtureRequest, run: Path) -> Iterator[ServerProcess]:
    with forked_server("serve", str(run), "--port=0", "--device=cpu", *request.param) as process:
        yield process


@pytest.mark.rotated
@pytest.mark.parametrize("server", [["--max_wait_ms=2"]], indirect=True)
def test_1_000_requests_32_at_a_time_and_10_000_malformed_ones(server: ServerProcess) -> None:
    bodies = [save(_tensors(seed)) for seed in range(16)]
    answers = load(server.address, bodies, 1000, 32)
    assert answers.statuses == {200: 1000}, answers.unexpected[:3]
    assert 'latentreward_queue_rows{reward="reward"} 0' in httpx.get(f"{server.address}/metrics").text
    answers = fuzz_route(server.address, next(routes(_accepted())), 10_000, server.rss)
    assert not answers.unexpected, answers.unexpected[:3]
    assert set(answers.statuses) <= {200, 400, 413, 422} and answers.statuses[400] > 5_000
    settled, last = answers.rss[4], answers.rss[-1]  # after 2 000
    assert last - settled < 16 * 2**20, [round(size / 2**20) for size in answers.rss]
    assert httpx.post(f"{server.address}/v1/score", content=save(_tensors(0)), headers=HEADERS).status_code == 200
    assert server.stop() == 0


# 60 rows wait 3 s for more that would fill their pass.
@pytest.mark.parametrize("server", [["--batch_size=64", "--max_wait_ms=3000"]], indirect=True)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_under_way_finish(server: ServerProcess, sent: signal.Signals) -> None:
    replies: list[httpx.Response] = []
    body = save(_tensors(0, rows=60))

    def ask() -> None:
        replies.append(httpx.post(f"{server.address}/v1/score", content=body, headers=HEADERS, timeout=300))

    thread = threading.Thread(target=ask)
    thread.start()
    with httpx.Client(base_url=server.address) as client:
        while _in_queue(client) < 16:
            assert thread.is_alive(), "all rows were scored before the signal"
            time.sleep(0.02)
    assert server.stop(sent) == 0
    thread.join(300)
    assert replies[0].status_code == 200 and len(replies[0].json()["raw_scores"]) == 60
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address)


def test_several_rewards_by_a_config(run: Path, tmp_path: Path) -> None:
    one = {"model": str(run), "device": "cpu"}
    config = tmp_path / "rewards.yaml"
    config.write_text(yaml.safe_dump({"rewards": {"taste": one, "again": one}}, sort_keys=False))
    with forked_server("serve", f"--config={config}", "--port=0") as server:
        assert "taste: " in server.process.stdout and "serving taste, again at http" in server.process.stdout
        rewards = httpx.get(f"{server.address}/v1/rewards").json()["rewards"]
        assert [reward["name"] for reward in rewards] == ["taste", "again"]
        body = save(_tensors(0))
        scores = [
            httpx.post(f"{server.address}{start}/v1/score", content=body, headers=HEADERS, timeout=300).json()
            for start in ("", "/rewards/again")
        ]
        assert scores[0] == scores[1]
        assert server.stop() == 0


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, ServedModel]]:
    with serving(tiny_reward(), max_wait_ms=1) as started:
        yield started


@pytest.mark.parametrize("number", range(6))
def test_no_body_brings_a_server_down(running: tuple[str, ServedModel], number: int) -> None:
    address, model = running
    every = list(routes(model.accepted))
    assert len(every) == 6
    route = every[number]
    before = httpx.post(f"{address}{route.path}", content=route.good, headers=route.headers, timeout=300)
    assert before.status_code == 200, before.text
    answers = fuzz_route(address, route, 500)
    assert not answers.unexpected, answers.unexpected[:5]
    assert answers.statuses[200] < 400 and set(answers.statuses) <= {200, 400, 413, 415, 422}
    after = httpx.post(f"{address}{route.path}", content=route.good, headers=route.headers, timeout=300)
    assert after.status_code == 200 and after.json().keys() == before.json().keys()


def _accepted() -> Accepted:
    return Accepted.of(tiny_reward(), ServiceSettings())


def _tensors(seed: int, rows: int = 1) -> dict[str, Tensor]:
    return tensors_of(_accepted(), rows=rows, seed=seed)


def _in_queue(client: httpx.Client) -> int:
    text = client.get("/metrics").text
    return int(float(re.search(r"^latentreward_queue_rows\S* (\S+)", text, re.MULTILINE)[1]))
