"""A report of made-up numbers, with names and prompts that try to be markup."""

from dataclasses import replace

from latentreward.evaluation.benchmark.results import (
    AgreementResult,
    BenchmarkReport,
    CalibrationResult,
    CorrelationResult,
    DifferenceResult,
    Disagreement,
    LevelResult,
    ProtocolResult,
    PublishedNumber,
    SubgroupResult,
)
from latentreward.metrics.bootstrap import Interval

HOSTILE = "<script>document.title='hacked'</script> | **bold** $x_1$ {{ 7*7 }} [a](javascript:alert(1)) \u202e\ud800 `"
PROTOCOL, SPLIT, DATA = "hpdv3", "test", "hpdv3 test"
MODELS = ("dina", "pickscore", "clipscore")


def estimate(value: float, width: float = 0.05) -> Interval:
    return Interval(value, value - width, value + width, 400)


def report(hostile: str = HOSTILE) -> BenchmarkReport:
    draws = {"draws": {"number": 3, "mean": 0.751, "sd": 0.004, "values": [0.75, 0.748, 0.755]}}
    protocols = [
        ProtocolResult(PROTOCOL, name, estimate(0.75 - 0.1 * n), 100, 80, n, {"tie": n}, draws if n == 0 else {}, SPLIT)
        for n, name in enumerate(MODELS)
    ]
    levels = [
        LevelResult(PROTOCOL, "dina", sigma, 1000 * sigma, estimate(0.8 - 0.3 * sigma), DATA)
        for sigma in (0.1, 0.5, 0.9)
    ]
    curve = ((40, 0.55, 0.5), (30, 0.75, 0.7), (30, 0.95, 0.97))
    return BenchmarkReport(
        scorers={"dina": f"RewardModelScorer {hostile}", "pickscore": "PickScorer x", "clipscore": "CLIPScorer y"},
        protocols=tuple(replace(one, benchmark=DATA) for one in protocols),
        differences=(DifferenceResult(PROTOCOL, "dina", "pickscore", 100, estimate(0.1), SPLIT, DATA),),
        subgroups=tuple(
            SubgroupResult(
                PROTOCOL, name, "models", hostile if n else "sdxl against flux", 40, estimate(0.6), SPLIT, DATA
            )
            for n in (0, 1)
            for name in MODELS
        ),
        levels=tuple(levels),
        calibration=tuple(CalibrationResult(PROTOCOL, name, 1.5, estimate(0.05, 0.02), curve, DATA) for name in MODELS),
        agreement=(
            AgreementResult(DATA, "dina", "pickscore", 100, estimate(0.8), estimate(0.6), estimate(0.62)),
            AgreementResult(DATA, "dina", "clipscore", 100, estimate(0.5), estimate(0.1), estimate(float("nan"))),
        ),
        correlations=tuple(
            CorrelationResult(DATA, f"clip_corr_{kind}", "dina", "clipscore", estimate(value))
            for kind, value in {"pearson": float("nan"), "spearman": 0.1, "pair": 0.5}.items()
        ),
        published=(PublishedNumber(PROTOCOL, f"HPSv3 {hostile}", 0.769, "its README, measured by its authors"),),
        data={
            DATA: {
                "pairs": 100,
                "pairs_in_file": 120,
                "prompts": 80,
                "images": 150,
                "unreadable_images": {"missing file": 2},
                "pairs_without_an_image": 3,
                "rows_left_out_by_the_reader": {},
                "remarks_of_the_reader": {},
            }
        },
        telling=(
            Disagreement(
                DATA,
                3,
                f"pair {hostile}",
                hostile * 9,
                1.0,
                {"dina": (0.5, -1.25), "pickscore": (20.0, 21.5)},
                {"dina": 2.5, "pickscore": -1.4},
            ),
        ),
        settings={"seed": 0, "data": hostile},
        notes=("Only the first 100 pairs of each split were scored.",),
    )
