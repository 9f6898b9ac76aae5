"""Recipes by which the tiny world's networks were trained."""

from dataclasses import asdict, dataclass, replace
from typing import Self


@dataclass(frozen=True)
class TrainingRecipe:
    """Settings of a training that can be run at a fraction of its length."""

    def scaled(self, factor: float) -> Self:
        """Copy the recipe with ``factor`` times the steps, pictures, pairs and prompts: for a quick trial."""
        names = [name for name in asdict(self) if name.endswith(("pictures", "steps", "pairs", "prompts"))]
        return replace(self, **{name: max(2, round(factor * getattr(self, name))) for name in names})
