"""One tiny CLIP folder for all tests of the room, and pictures of many shapes."""

import numpy as np
import pytest
from PIL import Image

from tests.reward.scorers.tiny_clip import write_aesthetic, write_clip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="session")
def aesthetic_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_aesthetic(tmp_path_factory.mktemp("aesthetic") / "linearMSE.pth")


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(32, 32), (40, 33), (33, 70), (12, 9), (240, 10), (1, 1)]
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
