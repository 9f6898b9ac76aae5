"""Who is whose child."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from latentreward.core.shared_work import PARENT, bind_to_parent, forget_children, is_child


def test_only_a_rank_that_lightning_started_is_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's end is told to its parent, which for others is a shell or a cluster's launcher."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    strategy: Any = SimpleNamespace(cluster_environment=LightningEnvironment())
    assert not is_child(strategy)
    bind_to_parent(strategy)  # it has no parent, and names itself
    assert os.environ[PARENT] == str(os.getpid())
    assert not is_child(strategy)
    forget_children()
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert is_child(strategy)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not is_child(strategy)
