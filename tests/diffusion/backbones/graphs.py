"""Count of the graphs that blocks are compiled to; they are captured, and no code is generated."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentreward.diffusion.backbones import compilation


def counted_graphs(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Return the number of graphs of each structure of a block, by its number; it grows as blocks are called."""
    found: Counter[int] = Counter()
    compiled = compilation.compiled

    def counted(forward: Any, backend: Any) -> Callable[..., Any]:
        number = len(found)
        found[number] = 0

        def capture(graph: Any, inputs: Any) -> Any:
            found[number] += 1
            return graph.forward

        return compiled(forward, capture)

    monkeypatch.setattr(compilation, "compiled", counted)
    compilation.compiled_class.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return found
