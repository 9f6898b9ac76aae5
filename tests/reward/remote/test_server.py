"""What a connection does with servers that fail, are late, refuse or answer something else."""

import gzip
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentreward.core.errors import InputError
from latentreward.core.interrupts import stop_asked
from latentreward.reward import PlainJSON, RemoteError, RemoteServer
from latentreward.reward.remote import client as remote_server
from latentreward.reward.remote.client import Connection, RemoteImages
from tests.reward.remote.judges import Judge, breaks_off, drips_headers, hangs_up, judging, says, trickles

REQUEST = json.dumps({"prompts": [], "images": []}).encode()
DEAD = "http://127.0.0.1:9"
"""Nobody listens there."""
PACKED = gzip.compress(gzip.compress(bytes(2**20)))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_server, "FIRST_PAUSE_S", 0.01)


def ask(judge: Judge, **settings: Any) -> Any:
    return answer(RemoteServer(judge.url, **{"retry_s": 5.0, "timeout_s": 5.0, **settings}))


def answer(server: RemoteServer) -> Any:
    connection = Connection(server)
    return connection.result(connection.start(connection.asked, "/score", REQUEST))


@pytest.mark.parametrize(
    "fault",
    [says(503), says(429, {"error": "busy"}), hangs_up, breaks_off, trickles, drips_headers],
)
def test_a_failed_try_is_followed_by_another(fault, caplog: pytest.LogCaptureFixture) -> None:
    """Also one that would go on without end."""
    with judging(faults=[fault, fault]) as judge, caplog.at_level(logging.WARNING):
        assert ask(judge, timeout_s=0.5) == {"scores": []}
        assert len(judge.headers) == 3
    assert caplog.records[0].message.startswith(f"reward server {judge.url}: ")
    assert "answers again" in caplog.records[1].message
    assert len(caplog.records) == 2


def test_the_servers_own_pause_is_kept() -> None:
    with judging(faults=[says(503, retry_after="1")]) as judge:
        began = time.monotonic()
        ask(judge)
        assert time.monotonic() - began >= 1


def test_a_server_that_asks_for_no_pause_is_not_asked_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_server, "FIRST_PAUSE_S", 0.2)
    with judging(faults=[says(503, retry_after="0")] * 50) as judge, pytest.raises(RemoteError, match="HTTP 503"):
        ask(judge, retry_s=0.5)
    assert len(judge.headers) <= 4


def test_a_pause_beyond_the_limit_is_not_waited_for() -> None:
    told = r"no scores after 1 try .* HTTP 503: maintenance; it asks for a pause of 3600 seconds; start the server"
    fault = says(503, {"error": "maintenance"}, retry_after="3600")
    with judging(faults=[fault]) as judge, pytest.raises(RemoteError, match=told):
        ask(judge)


def test_an_outage_ends_after_its_limit() -> None:
    began = time.monotonic()
    with pytest.raises(RemoteError, match=rf"reward server {DEAD}: no scores after \d+ tries .*retry_s=0\.3\)"):
        answer(RemoteServer(DEAD, retry_s=0.3))
    assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (says(401, {"error": "no token"}), "HTTP 401: no token; look at server.url, its token"),
        (says(404), r"HTTP 404: \(no text\); look at server.url"),
        (says(413, {"error": "too long"}), "HTTP 413: too long"),
        (says(422, {"detail": [{"msg": "image 0 is none\n\x1b[2J"}]}), r"HTTP 422: .*image 0 is none"),
        (says(302, location="http://127.0.0.1:9/"), "HTTP 302: "),
        (says(200, b"<html>hello</html>"), r"the answer is no JSON \(JSONDecodeError\): <html>hello</html>"),
        (says(200, b"[" * 100_000), r"the answer is no JSON \(RecursionError\)"),
        (says(200, b" " * (16 * 2**20 + 1)), "the answer is longer than 16 MiB"),
        (says(200, PACKED, content_encoding="gzip, gzip"), "the answer is no JSON"),
    ],
)
def test_a_refusal_is_told_at_once_in_one_line(fault, told: str) -> None:
    with judging(faults=[fault]) as judge, pytest.raises(RemoteError, match=told) as raised:
        ask(judge)
    assert len(judge.headers) == 1
    assert str(raised.value).isprintable()


def test_a_signal_ends_the_wait() -> None:
    timer = threading.Timer(0.2, stop_asked.set)
    timer.start()
    try:
        with pytest.raises(RemoteError, match="a signal ended the wait"):
            answer(RemoteServer(DEAD, retry_s=86400.0))
    finally:
        stop_asked.clear()


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    monkeypatch.setenv("JUDGE_TOKEN", "from-env")
    with judging() as judge:
        ask(judge, token_file=str(file))
        ask(judge, token_env="JUDGE_TOKEN")
        ask(judge)
        assert [one.get("authorization") for one in judge.headers] == ["Bearer from-file", "Bearer from-env", None]
        assert "from-env" not in repr(RemoteServer(judge.url, token_env="JUDGE_TOKEN"))


TOKEN = "ab/cd+eF9secret"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b'{"error": "unknown token ab\\/cd+eF9secret"}'),
        (401, b'{"error": "unknown token \\u0061b/cd+eF9secret"}'),
        (503, b"ab/cd+eF9secret"),
        (200, b'{"Bearer ab/cd+eF9secret": 1}'),
        (200, json.dumps({"scores": [], "model": TOKEN}).encode()),
    ],
)
def test_a_token_that_the_server_repeats_is_not_shown(
    status: int, body: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    with judging(faults=[says(status, body)] * 9) as judge:
        server = RemoteServer(judge.url, token_env="JUDGE_TOKEN", retry_s=0.1)
        with pytest.raises(RemoteError) as raised:
            RemoteImages(server, PlainJSON(), 1).begin(["a cat"], [Image.new("RGB", (8, 8))])()
    told = f"{raised.value}{caplog.text}"
    assert "ab/cd" not in told and "secret" not in told


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", DEAD)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with judging() as judge:
        assert ask(judge) == {"scores": []}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "judge:8080"}, "is no HTTP address"),
        ({"url": "ftp://judge"}, "is no HTTP address"),
        ({"url": "http://[judge"}, "is no HTTP address"),
        ({"url": "http://judge/\x00"}, "is no HTTP address"),
        ({"url": "http://me:secret@judge"}, "token_file or token_env"),
        ({"url": "ftp://me:secret@judge:99999"}, "token_file or token_env"),
        ({"url": "http://judge?key=secret"}, "token_file or token_env"),
        ({"url": "http://judge#secret"}, "token_file or token_env"),
        ({"timeout_s": 0}, "server.timeout_s=0 must be"),
        ({"retry_s": -1}, "server.retry_s=-1 must be"),
        ({"retry_s": float("inf")}, "server.retry_s=inf must be"),
        ({"parallel": 0}, "server.parallel=0 must be"),
        ({"token_env": "NOT_SET_AT_ALL"}, "server.token_env=NOT_SET_AT_ALL must hold a token"),
        ({"token_file": "/nowhere/token"}, "server.token_file=/nowhere/token cannot be read"),
        ({"token_file": "a", "token_env": "b"}, "either token_file or token_env"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as raised:
        RemoteServer(**{"url": "http://judge", **settings})
    assert "secret" not in str(raised.value)
