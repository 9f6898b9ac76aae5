"""Servers in a thread, with real sockets; and a tiny reward model to serve."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import uvicorn

from latentreward.apps.serving.app import configuration
from latentreward.apps.serving.service import ScoringService, ServedModel
from latentreward.apps.serving.settings import ServiceSettings, bind
from latentreward.reward import RewardModel
from tests.alignment.modules.batches import MODULES


@cache
def tiny_reward(name: str = "sd35", method: str = "dina") -> RewardModel:
    """A frozen reward on a tiny pipeline with random weights; do not change it."""
    return MODULES[method](name).model.eval().requires_grad_(False)


def service_of(*rewards: RewardModel, names: str = "reward", **settings: Any) -> ScoringService:
    """Rewards on a server that has not been started."""
    return ScoringService(dict(zip(names.split(), rewards, strict=True)), ServiceSettings(**settings))


def served_model(reward: RewardModel, **settings: Any) -> ServedModel:
    """A reward alone on a server that has not been started."""
    return service_of(reward, **settings).default


@contextmanager
def serving(reward: RewardModel, **settings: Any) -> Iterator[tuple[str, ServedModel]]:
    """Address and reward of a server that runs while the context lasts; it holds no memory at the end."""
    service = service_of(reward, **settings)
    with started(service) as address:
        yield address, service.default
    assert service.memory.held == 0


@contextmanager
def started(service: ScoringService) -> Iterator[str]:
    """Address of a server that runs while the context lasts."""
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(configuration(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(300)
        assert not thread.is_alive(), "the server does not stop"


def raw(address: str, *parts: bytes, pause: float = 0.0, timeout: float = 60.0) -> bytes:
    """Everything that a server answers to bytes on a socket, until it closes the connection."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        received = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while chunk := connection.recv(65536):
                received += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass
        return received
