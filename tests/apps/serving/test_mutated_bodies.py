"""500 mutated bodies for each route; ``benchmarks/serving.py fuzz`` sends 10 000 to a process."""

from collections.abc import Iterator

import httpx
import pytest

from latentreward.apps.serving.service import ServedModel
from tests.apps.serving.mutated_bodies import FuzzedRoute, fuzz_route, routes
from tests.apps.serving.servers import serving, tiny_reward

pytestmark = pytest.mark.slow
NUMBER = 7


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, ServedModel]]:
    with serving(tiny_reward(), max_wait_ms=1) as started:
        yield started


def ask(address: str, route: FuzzedRoute) -> httpx.Response:
    return httpx.post(f"{address}{route.path}", content=route.good, headers=route.headers, timeout=300)


@pytest.mark.parametrize("number", range(NUMBER))
def test_no_body_brings_a_server_down(
    running: tuple[str, ServedModel], number: int, caplog: pytest.LogCaptureFixture
) -> None:
    address, model = running
    every = list(routes(model.accepted))
    assert len(every) == NUMBER
    route = every[number]
    before = ask(address, route)
    assert before.status_code == 200, before.text
    answers = fuzz_route(address, route, 500)
    assert not answers.unexpected, answers.unexpected[:5]
    assert answers.statuses[200] < 400 and set(answers.statuses) <= {200, 400, 413, 415, 422}
    assert not [one for one in caplog.records if one.name.startswith("python_multipart")]
    after = ask(address, route)
    assert after.status_code == 200 and after.json().keys() == before.json().keys()
