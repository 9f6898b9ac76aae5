"""A report of made-up numbers, with names and prompts that try to be markup."""

from typing import Any

from latentreward.apps.evaluation.benchmark.base import BenchmarkReport
from latentreward.core.bootstrap import Interval

HOSTILE = "<script>document.title='hacked'</script> | **bold** $x_1$ {{ 7*7 }} [a](javascript:alert(1)) \u202e\ud800 `"
PROTOCOL, DATA = "hpdv3", "hpdv3 test"
MODELS = ("dina", "pickscore", "clipscore")


def estimate(value: float, width: float = 0.05) -> Interval:
    return Interval(value, value - width, value + width, 400)


def result(scorer: str, number: float, **more: Any) -> dict[str, Any]:
    return {"protocol": PROTOCOL, "scorer": scorer, "estimate": estimate(number), "benchmark": DATA, **more}


def report(hostile: str = HOSTILE) -> BenchmarkReport:
    more = {"threshold": 0.7}
    counts = {"pairs": 100, "groups": 80}
    curve = ((40, 0.55, 0.5), (30, 0.75, 0.7), (30, 0.95, 0.97))
    both = {"benchmark": DATA, "first": "dina", "pairs": 100}
    return BenchmarkReport(
        scorers={"dina": f"RewardModelScorer {hostile}", "pickscore": "PickScorer x", "clipscore": "CLIPScorer y"},
        protocols=[
            result(name, 0.75 - 0.1 * n, **counts, equal_scores=n, excluded={"tie": n}, details=more if n == 0 else {})
            for n, name in enumerate(MODELS)
        ],
        differences=[{**both, "protocol": PROTOCOL, "second": "pickscore", "estimate": estimate(0.1)}],
        subgroups=[
            result(name, 0.6, column="models", value=hostile if n else "sdxl against flux", pairs=40)
            for n in (0, 1)
            for name in MODELS
        ],
        levels=[result("dina", 0.8 - 0.3 * sigma, sigma=sigma, timestep=1000 * sigma) for sigma in (0.1, 0.5, 0.9)],
        calibration=[result(name, 0.0, temperature=1.5, error=estimate(0.05, 0.02), curve=curve) for name in MODELS],
        agreement=[
            {**both, "second": name, "pair": estimate(pair), "spearman": estimate(rank), "pearson": estimate(linear)}
            for name, pair, rank, linear in (("pickscore", 0.8, 0.6, 0.62), ("clipscore", 0.5, 0.1, float("nan")))
        ],
        published=[
            {
                "protocol": PROTOCOL,
                "model": f"HPSv3 {hostile}",
                "value": 0.769,
                "source": "its README, measured by its authors",
            }
        ],
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
        settings={"seed": 0, "data": hostile},
        notes=["Only the first 100 pairs of each split were scored."],
    )
