"""Training settings and descriptions of the tiny world's networks."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import Template
from typing import Self

import yaml


@dataclass(frozen=True)
class TrainingRecipe:
    """Training settings that can be scaled down for a quick trial."""

    def scaled(self, factor: float) -> Self:
        """Return a copy with ``factor`` times the steps, pictures, pairs and prompts, at least 2 of each."""
        names = [name for name in asdict(self) if name.endswith(("pictures", "steps", "pairs", "prompts"))]
        return replace(self, **{name: max(2, round(factor * getattr(self, name))) for name in names})


def readme(name: str, **figures: object) -> str:
    """Return the README of a network with its figures, from ``readmes.yaml``."""
    texts = yaml.safe_load(Path(__file__).with_name("readmes.yaml").read_text(encoding="utf-8"))
    return Template(texts[name]).substitute(figures)
