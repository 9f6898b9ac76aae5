"""serve: what it says before it serves."""

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from latentreward.apps.cli import main
from latentreward.apps.commands import serve as command


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_taken_port_is_said_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = error_of(capsys, "no-such-model", f"--port={taken.getsockname()[1]}")
    assert "cannot serve at 127.0.0.1:" in error and "--port" in error and error.count("\n") == 1


def test_a_missing_extra_names_its_cure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str, *rest: Any) -> Any:
        return None if name == "uvicorn" else importlib.util.find_spec(name, *rest)

    monkeypatch.setattr(command, "find_spec", find)
    assert "serve needs uvicorn" in (error := error_of(capsys, "model")) and "'latentreward[serve]'" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queue=-1"], "queue=-1"),
        (["--max_wait_ms=.inf"], "max_wait_ms: inf"),
        (["--max_body_mb=0"], "max_body_mb=0"),
        (["--max_body_mb=.inf"], "max_body_mb: inf is not finite"),
        (["--max_body_mb=.nan"], "max_body_mb: nan is not finite"),
        (["--timeout=.inf"], "timeout: inf is not finite"),
        (["--token_file=nowhere.txt"], "token_file=nowhere.txt cannot be read"),
        (["--port=0"], "no-such-model"),
        (["--host=no.such.host.invalid"], "cannot serve at"),
        (["--port=70000"], "port"),
        (["--port=-1"], "port"),
    ],
)
def test_wrong_settings(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    error = error_of(capsys, "no-such-model", *options)
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "two\nlines", "é"])
def test_tokens_that_no_header_can_hold(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    assert "printable ASCII" in error_of(capsys, "no-such-model", f"--token_file={file}")


def test_an_open_address_without_a_token_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = "can be reached from other machines"
    assert warning in error_of(capsys, "no-such-model", "--host=0.0.0.0", "--port=0")
    assert warning not in error_of(capsys, "no-such-model", "--port=0")
    monkeypatch.setenv(command.TOKEN_VARIABLE, "s3cret")
    assert warning not in error_of(capsys, "no-such-model", "--host=0.0.0.0", "--port=0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{}", "give either model, or rewards"),
        ("{model: a, rewards: {b: {model: c}}}", "give either model, or rewards"),
        ("{device: cpu, rewards: {b: {model: c}}}", "device"),
        ("{rewards: {'b/c': {model: c}}}", "'b/c'"),
        ("{rewards: {b: {model: c, queue: 1}}}", "queue"),
        ("{rewards: {b: {modle: c}}}", "modle"),
        ("{rewards: {b: {model: no-such-model, device: cpu}}}", "no-such-model"),
    ],
)
def test_wrong_rewards(capsys: pytest.CaptureFixture[str], tmp_path: Path, settings: str, message: str) -> None:
    file = tmp_path / "rewards.yaml"
    file.write_text(settings)
    error = error_of(capsys, f"--config={file}", "--port=0")
    assert message in error and error.count("\n") == 1
