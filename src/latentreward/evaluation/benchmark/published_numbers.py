"""Accuracies that others published, shown beside ours; each belongs to the protocol closest to the paper's.

The same model measured by two code bases differs by about a percentage point, because image sizes, precision and ties
are treated differently. Where a paper does not state its protocol, the source says so.
"""

from collections.abc import Mapping
from typing import NamedTuple


class PublishedNumber(NamedTuple):
    """Accuracy published by others.

    Attributes:
        protocol: Key of the protocol that the accuracy is comparable with.
        model: Name of the model.
        value: Accuracy in [0, 1].
        source: Publication, and who measured the number.
    """

    protocol: str
    model: str
    value: float
    source: str


HPSV2 = "HPSv2's README (arXiv:2306.09341), measured by its authors"
MPS = "MPS's README (github.com/Kwai-Kolors/MPS, arXiv:2405.14705), measured by its authors"
UNIFIED_REWARD = (
    "UnifiedReward's card (huggingface.co/CodeGoat24/UnifiedReward-7b-v1.5, arXiv:2503.05236), measured by its authors"
)
HPSV3 = "HPSv3's README (arXiv:2508.03789), measured by its authors"
PICKSCORE = "PickScore (arXiv:2305.01569), measured by its authors"
DINA = "DiNa-LRM (arXiv:2602.11146), measured by its authors; evaluation code not released"
DINA_GENAI = f"{DINA}; which GenAI-Bench is not stated, TIGER's very likely"
DINA_CONSTANT = "DiNa-LRM, constant variance"
DINA_CLEAN = "DiNa-LRM, trained at t = 0 alone"
DINA_FROZEN = "DiNa-LRM, frozen backbone"
"""The ablations of which the paper's table 2 has cells beside the average."""
HPSV3_PICKAPIC = "HPSv3 (arXiv:2508.03789), measured by its authors; treatment of ties not stated"

PERCENT: dict[tuple[str, str], Mapping[str, float]] = {
    ("imagereward/macro", HPSV2): {
        "Aesthetic": 57.4,
        "ImageReward": 65.1,
        "HPS": 61.2,
        "PickScore": 62.9,
        "HPSv2": 65.7,
        "HPSv2.1": 66.8,
        "single human": 65.3,
    },
    ("hpdv2/macro", HPSV2): {
        "Aesthetic": 76.8,
        "ImageReward": 74.0,
        "HPS": 77.6,
        "PickScore": 79.8,
        "HPSv2": 83.3,
        "HPSv2.1": 84.1,
        "single human": 78.1,
    },
    ("imagereward/micro", MPS): {
        "CLIP": 54.3,
        "Aesthetic": 57.4,
        "ImageReward": 65.1,
        "HPS": 61.2,
        "PickScore": 62.9,
        "HPSv2": 65.7,
        "MPS": 67.5,
    },
    ("hpdv2/macro", MPS): {
        "CLIP": 71.2,
        "Aesthetic": 72.6,
        "ImageReward": 70.6,
        "HPS": 73.1,
        "PickScore": 79.8,
        "HPSv2": 83.3,
        "MPS": 83.5,
    },
    ("imagereward/micro", HPSV3): {"PickScore": 61.6, "HPSv3": 66.8},
    ("hpdv2/micro", HPSV3): {"HPSv3": 85.4},
    ("hpdv3", HPSV3): {
        "CLIP ViT-H/14": 48.6,
        "Aesthetic": 59.9,
        "ImageReward": 58.6,
        "PickScore": 65.6,
        "HPSv2": 65.3,
        "MPS": 64.3,
        "HPSv3": 76.9,
    },
    ("pickapic/pickscore", PICKSCORE): {
        "CLIP ViT-H/14": 60.8,
        "Aesthetic": 56.8,
        "PickScore": 70.5,
        "single human": 68.0,
    },
    ("pickapic/strict", HPSV3_PICKAPIC): {"HPSv3": 72.8},
    ("imagereward/micro", DINA): {
        "DiNa-LRM": 60.34,
        "DiNa-LRM (ensemble)": 61.75,
        "LRM-SDXL": 60.35,
        "HPSv3": 67.03,
        "MPS": 66.37,
        "UnifiedReward": 63.82,
    },
    ("hpdv2/micro", DINA): {
        "DiNa-LRM": 82.13,
        "DiNa-LRM (ensemble)": 84.31,
        "LRM-SDXL": 71.19,
        "HPSv3": 85.36,
        "MPS": 83.27,
        "UnifiedReward": 83.10,
        DINA_CONSTANT: 78.72,
        DINA_CLEAN: 59.20,
    },
    ("hpdv3", DINA): {
        "DiNa-LRM": 75.04,
        "DiNa-LRM (ensemble)": 74.86,
        "LRM-SDXL": 53.80,
        "HPSv3": 76.03,
        "MPS": 64.33,
        "UnifiedReward": 71.96,
        DINA_CONSTANT: 75.11,
        DINA_CLEAN: 74.37,
        DINA_FROZEN: 73.52,
    },
    ("genai_bench_tiger/no_tie", DINA_GENAI): {
        "DiNa-LRM": 68.43,
        "DiNa-LRM (ensemble)": 68.98,
        "LRM-SDXL": 61.58,
        "HPSv3": 70.95,
        "MPS": 68.08,
        "UnifiedReward": 72.38,
        DINA_CONSTANT: 68.01,
        DINA_CLEAN: 67.55,
        DINA_FROZEN: 67.09,
    },
    ("genai_bench_tiger/no_tie", UNIFIED_REWARD): {
        "PickScore": 67.2,
        "HPSv2": 68.4,
        "ImageReward": 65.0,
        "VisionReward": 66.4,
        "UnifiedReward": 70.9,
        "UnifiedReward 1.5": 72.4,
    },
    ("genai_bench_tiger/4way", "chance: four equally likely answers"): {"random": 25.0},
}
"""(key of the protocol, source) → name of the model → accuracy in per cent."""


PUBLISHED = tuple(
    PublishedNumber(protocol, model, round(value / 100, 6), source)
    for (protocol, source), models in PERCENT.items()
    for model, value in models.items()
)


def published_for(protocols: tuple[str, ...]) -> tuple[PublishedNumber, ...]:
    """Return the published numbers of the given protocols, in the order of the protocols."""
    return tuple(number for key in protocols for number in PUBLISHED if number.protocol == key)
