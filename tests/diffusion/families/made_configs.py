"""Configs of a pipeline that exist in memory only."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class MadeConfigs:
    """A :class:`~latentreward.diffusion.PipelineConfigs` of given configs by part."""

    source = named = "made configs"

    def __init__(self, parts: Mapping[str, Mapping[str, Any]], **index: Any) -> None:
        self.index, self._parts = {**{part: ["diffusers", ""] for part in parts}, **index}, parts

    def has(self, part: str) -> bool:
        return part in self._parts

    def config(self, part: str) -> dict[str, Any]:
        return dict(self._parts[part])

    def tensors(self, part: str, names: Sequence[str]) -> list[Tensor]:
        raise NotImplementedError
