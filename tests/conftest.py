"""Shared by all tests: one thread, so that parallel runs on few cores do not fight, and no downloads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """One seed, and one thread, which changes the last bits too: Lightning sets their number for several processes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
