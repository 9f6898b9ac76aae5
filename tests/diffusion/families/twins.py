"""Twins: pipelines of each family in its own layout, with tiny networks and random weights.

A file ``twin_NAME.py`` of this folder holds the twins of the family NAME; this module finds them.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from diffusers import DiffusionPipeline
from torch import Tensor

from latentreward.alignment import PolicySource, RolloutDraws
from latentreward.diffusion import LoRA
from tests.tiny_pipelines import randomise

PROMPTS = ("a cat", "two dogs on a hill in the rain")
"""Prompts with unequal numbers of tokens."""


def as_released(pipeline: DiffusionPipeline) -> None:
    """Leave a pipeline as it is."""


def same(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Latents of pipelines that work on canonical ones."""
    return latents


@dataclass(frozen=True)
class Twin:
    """A tiny pipeline, and how its results compare with ours.

    Attributes:
        name: Name of the twin.
        family: Name of the family.
        build: Function that makes the pipeline.
        size: (height, width) in pixels of pictures in tests.
        call: Arguments of the pipeline's call, besides prompts, latents, size and steps.
        guidance: ``guidance_scale`` that gives the same; None for the family's own.
        given: Function from canonical latents and size to the ``latents`` that the pipeline's call takes.
        found: Function from the pipeline's latents, as ``output_type="latent"`` returns them, and size to canonical.
        layers: Number of blocks of the network.
        backbone: Name of the registered backbone.
        options: Settings of the policy's source.
        mended: Function that mends a known fault of the pipeline.
        same_network: Whether an earlier twin of the family has the same network.
    """

    name: str
    family: str
    build: Callable[[], DiffusionPipeline]
    size: tuple[int, int] = (32, 48)
    call: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    given: Callable[[Tensor, tuple[int, int]], Tensor] = same
    found: Callable[[Tensor, tuple[int, int]], Tensor] = same
    layers: int = 4
    backbone: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    mended: Callable[[DiffusionPipeline], None] = as_released
    same_network: bool = False

    @property
    def folder(self) -> str:
        """Folder of the pipeline, written once per test run; do not change it (copy it first)."""
        return _folder(self.name)

    def source(self, **options: Any) -> PolicySource:
        """Source of a policy, with adapters of rank 2."""
        return PolicySource(**{"source": self.folder, "lora": LoRA(2, 4.0), **self.options, **options})

    def pipeline(self) -> DiffusionPipeline:
        """Load the pipeline as diffusers does."""
        pipeline = DiffusionPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        self.mended(pipeline)
        return pipeline

    def sample(self, pipeline: Any, prompts: Sequence[str], noise: Tensor, steps: int, output: str = "latent") -> Any:
        """Sample by the pipeline from canonical noise; canonical latents, or what other kinds of output hold."""
        height, width = self.size
        settings = {"height": height, "width": width, "num_inference_steps": steps, "output_type": output}
        made = pipeline(prompt=list(prompts), latents=self.given(noise, self.size), **settings, **self.call)
        result = made.frames if hasattr(made, "frames") else made.images
        return self.found(result, self.size) if output == "latent" else result


_STORE = tempfile.TemporaryDirectory(prefix="twins_")


@cache
def _folder(name: str) -> str:
    """Write a twin; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = TWINS[name].build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            randomise(part)
    folder = Path(_STORE.name) / name
    own = folder.with_name(f"{name}-{os.getpid()}")
    pipeline.save_pretrained(own)
    with suppress(OSError):  # forked ranks share the store, and another one may have written it
        own.rename(folder)
    return str(folder)


class GivenNoise(RolloutDraws):
    """Initial latents that are given; there is no other noise."""

    def __init__(self, noise: Tensor) -> None:
        self._noise = noise

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        assert self._noise.shape[1:] == shape
        return self._noise


def noise_for(shape: Sequence[int], count: int = 2, seed: int = 0) -> Tensor:
    """Standard normal latents."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def _find() -> dict[str, Twin]:
    modules = [
        import_module(f"tests.diffusion.families.{file.stem}")
        for file in sorted(Path(__file__).parent.glob("twin_*.py"))
    ]
    return {twin.name: twin for module in modules for twin in module.TWINS}


TWINS: dict[str, Twin] = _find()


QUICK = ("flux1_dev", "sd35_large", "z_image")
"""Twins that `make test` has of a grid: two streams and then one, two streams, one stream. `.ci/run` has the others."""


def _cases(twins: Iterable[Twin]) -> list[ParameterSet]:
    slow = [pytest.mark.slow]
    return [pytest.param(twin, id=twin.name, marks=slow * (twin.name not in QUICK)) for twin in twins]


every_twin = pytest.mark.parametrize("twin", _cases(TWINS.values()))
"""Runs a test on every twin, in `make test` on :data:`QUICK`."""
every_network = pytest.mark.parametrize("twin", _cases(twin for twin in TWINS.values() if not twin.same_network))
"""Runs a test on every twin with a network of its own, in `make test` on :data:`QUICK`."""


def one_per_family(without: str | None = None) -> list[Twin]:
    """Return the first twin of each family but ``without``; later ones have less, such as no guidance."""
    first = {twin.family: twin for twin in reversed(TWINS.values())}
    return [twin for twin in first.values() if twin.family != without]
