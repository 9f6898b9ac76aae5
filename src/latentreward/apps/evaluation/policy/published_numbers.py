"""Scores that LPO's authors report, for each base model's evaluation protocol."""

from typing import Literal

from latentreward.reports.tables import Row

Protocol = Literal["lpo_sd15", "lpo_sdxl"]
SOURCE = "arXiv:2502.01051 (LPO), measured by its authors"
SCORES = ("pickscore", "imagereward", "aesthetic", "geneval")
"""Names of our scores that the numbers are comparable with; GenEval is a share in [0, 1], at 20 sampling steps."""
NUMBERS: dict[Protocol, dict[str, tuple[float, ...]]] = {
    "lpo_sd15": {
        "SD1.5": (20.56, 0.008, 5.468, 0.4256),
        "SPO, SD1.5": (21.22, 0.168, 5.927, 0.4046),
        "LPO, SD1.5": (21.69, 0.659, 5.945, 0.4839),
    },
    "lpo_sdxl": {
        "SDXL": (21.65, 0.478, 5.920, 0.4940),
        "SPO, SDXL": (22.70, 0.995, 6.343, 0.5052),
        "LPO, SDXL": (22.86, 1.217, 6.360, 0.5927),
    },
}


def published_scores(protocol: Protocol) -> list[Row]:
    """Return all published scores for the protocol of one base model, as in :attr:`PolicyReport.published`."""
    return [
        {"model": model, "score": score, "value": value, "source": SOURCE}
        for model, values in NUMBERS[protocol].items()
        for score, value in zip(SCORES, values, strict=True)
    ]
