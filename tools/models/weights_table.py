"""Table of the weights that can be loaded: published ones, those in the package, and rewards of pilots."""

from collections.abc import Sequence
from dataclasses import dataclass

from latentreward.pilot.results import PilotResult
from latentreward.reports.tables import Table

NOT_MEASURED = "not measured"
HEADER = ("model", "weights", "trained on", "licence", "command", "measured")
IN_PACKAGE, DRAWN, TINY = "in the package", "drawn pictures", "yes, in the tiny world"


@dataclass(frozen=True)
class LoadableWeights:
    """Weights that somebody can load; see docs/licences.md for the sources of licences.

    Attributes:
        model: Name of the model.
        weights: Hub id, or where else they are.
        data: What they were trained on.
        licence: Licence or terms.
        command: Command that uses them.
        measured: Where they were measured by this program; empty if a pilot decides.
        pilot: Name of the pilot that measures them beside its own reward.
    """

    model: str
    weights: str
    data: str
    licence: str
    command: str
    measured: str = ""
    pilot: str = ""


LOADABLE = (
    LoadableWeights(
        "LRM-SD1.5",
        "casiatao/LRM",
        "Pick-a-Pic v1, filtered (the paper)",
        "code MIT; terms of SD1.5",
        "latentreward score pictures scores.csv --model casiatao/LRM/FOLDER --base $SD15_PATH",
        pilot="sd15",
    ),
    LoadableWeights(
        "LRM-SDXL",
        "casiatao/LRM",
        "Pick-a-Pic v1, filtered (the paper)",
        "code MIT; terms of SDXL",
        "latentreward score pictures scores.csv --model casiatao/LRM/FOLDER --base $SDXL_PATH",
    ),
    LoadableWeights(
        "DiNa-LRM",
        "liuhuohuo/DiNa-LRM-SD35M-12layers",
        "HPDv3 (the paper)",
        "code Apache-2.0; terms of SD3.5-Medium",
        "latentreward score pictures scores.csv --model liuhuohuo/DiNa-LRM-SD35M-12layers",
        pilot="sd35m",
    ),
    *(
        LoadableWeights(
            f"{name}, a generator",
            IN_PACKAGE,
            DRAWN,
            "Apache-2.0",
            f"latentreward generate prompts.txt pictures --policy.source {name}",
            TINY,
        )
        for name in ("sd_tiny", "sd35_tiny")
    ),
    *(
        LoadableWeights(
            f"{name}, a scorer of pixels",
            IN_PACKAGE,
            "pairs of " + DRAWN,
            "Apache-2.0",
            "latentreward benchmark report --config configs/benchmark/tiny.yaml",
            TINY,
        )
        for name in ("held_out_tiny", "spm_tiny")
    ),
)


def weights_table(rewards: Sequence[tuple[str, str]], results: Sequence[PilotResult]) -> Table:
    """Return one row for all weights that exist; a pilot's reward has one if its result names published weights.

    ``rewards`` are the names of pilots of full size with those of their rewards.
    """
    rows = []
    for one in LOADABLE:
        runs = [result for result in results if result.pilot == one.pilot]
        measured = one.measured or (f"yes, by the runs of pilot {one.pilot} below" if runs else NOT_MEASURED)
        rows.append((one.model, one.weights, one.data, one.licence, one.command, measured))
    for pilot, reward in rewards:
        for number, result in enumerate((one for one in results if one.pilot == pilot), start=1):
            if result.weights:
                rows.append(
                    (
                        f"{reward}, run {number} below",
                        result.weights,
                        f"{result.cut['pairs']} pairs, as configs/pilot/{pilot}.yaml says",
                        "see its model card",
                        f"latentreward score pictures scores.csv --model {result.weights}",
                        f"yes, as run {number} below",
                    )
                )
    return Table(HEADER, tuple(rows))
