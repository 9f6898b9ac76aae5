"""Base class of the training settings of the tiny world's networks."""

from dataclasses import asdict, dataclass, replace
from typing import Self


@dataclass(frozen=True)
class TrainingRecipe:
    """Training settings that can be scaled down for a quick trial."""

    def scaled(self, factor: float) -> Self:
        """Return a copy with ``factor`` times the steps, pictures, pairs and prompts, at least 2 of each."""
        names = [name for name in asdict(self) if name.endswith(("pictures", "steps", "pairs", "prompts"))]
        return replace(self, **{name: max(2, round(factor * getattr(self, name))) for name in names})
