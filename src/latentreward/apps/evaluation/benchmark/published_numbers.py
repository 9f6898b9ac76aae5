"""Accuracies that others published, shown beside ours; each belongs to the protocol closest to the paper's.

The same model measured by two code bases differs by about a percentage point, because image sizes, precision and ties
are treated differently. Where a paper does not state its protocol, the source says so.
"""

from collections.abc import Mapping

from latentreward.reports.tables import Row

AVERAGE = "four_benchmarks"
"""Key of the mean accuracy over :data:`FOUR_BENCHMARKS`, in the place of a protocol's key."""
FOUR_BENCHMARKS = {
    "imagereward test": "imagereward/micro",
    "hpdv2 test": "hpdv2/micro",
    "hpdv3 test": "hpdv3",
    "genai_bench_tiger test": "genai_bench_tiger/no_tie",
}
"""Data set and split → key of the protocol whose accuracy is averaged."""
HPSV2 = "HPSv2's README (arXiv:2306.09341), measured by its authors"
MPS = "MPS's README (github.com/Kwai-Kolors/MPS, arXiv:2405.14705), measured by its authors"
HPSV3 = "HPSv3's README (arXiv:2508.03789), measured by its authors"
HPSV3_PICKAPIC = "HPSv3 (arXiv:2508.03789), measured by its authors; treatment of ties not stated"
PICKSCORE = "PickScore (arXiv:2305.01569), measured by its authors"
DINA = "DiNa-LRM (arXiv:2602.11146), measured by its authors; evaluation code not released"
DINA_GENAI = f"{DINA}; which GenAI-Bench is not stated, TIGER's very likely"
UNIFIED_REWARD = (
    "UnifiedReward's card (huggingface.co/CodeGoat24/UnifiedReward-7b-v1.5, arXiv:2503.05236), measured by its authors"
)
TABLES: tuple[tuple[Mapping[str, str], Mapping[str, tuple[float | None, ...]]], ...] = (
    (
        {"imagereward/macro": HPSV2, "hpdv2/macro": HPSV2},
        {
            "Aesthetic": (57.4, 76.8),
            "ImageReward": (65.1, 74.0),
            "HPS": (61.2, 77.6),
            "PickScore": (62.9, 79.8),
            "HPSv2": (65.7, 83.3),
            "HPSv2.1": (66.8, 84.1),
            "single human": (65.3, 78.1),
        },
    ),
    (
        {"imagereward/micro": MPS, "hpdv2/macro": MPS},
        {
            "CLIP": (54.3, 71.2),
            "Aesthetic": (57.4, 72.6),
            "ImageReward": (65.1, 70.6),
            "HPS": (61.2, 73.1),
            "PickScore": (62.9, 79.8),
            "HPSv2": (65.7, 83.3),
            "MPS": (67.5, 83.5),
        },
    ),
    (
        {"imagereward/micro": HPSV3, "hpdv2/micro": HPSV3, "hpdv3": HPSV3, "pickapic/strict": HPSV3_PICKAPIC},
        {
            "CLIP ViT-H/14": (None, None, 48.6, None),
            "Aesthetic": (None, None, 59.9, None),
            "ImageReward": (None, None, 58.6, None),
            "PickScore": (61.6, None, 65.6, None),
            "HPSv2": (None, None, 65.3, None),
            "MPS": (None, None, 64.3, None),
            "HPSv3": (66.8, 85.4, 76.9, 72.8),
        },
    ),
    (
        {"pickapic/pickscore": PICKSCORE},
        {"CLIP ViT-H/14": (60.8,), "Aesthetic": (56.8,), "PickScore": (70.5,), "single human": (68.0,)},
    ),
    (  # the last three rows are the ablations of the paper's table 2, of which not all have cells beside the average
        {
            "imagereward/micro": DINA,
            "hpdv2/micro": DINA,
            "hpdv3": DINA,
            "genai_bench_tiger/no_tie": DINA_GENAI,
            AVERAGE: DINA,
        },
        {
            "DiNa-LRM": (60.34, 82.13, 75.04, 68.43, 71.49),
            "DiNa-LRM (ensemble)": (61.75, 84.31, 74.86, 68.98, 72.48),
            "LRM-SDXL": (60.35, 71.19, 53.80, 61.58, 61.73),
            "HPSv3": (67.03, 85.36, 76.03, 70.95, 74.84),
            "MPS": (66.37, 83.27, 64.33, 68.08, 70.51),
            "UnifiedReward": (63.82, 83.10, 71.96, 72.38, 72.81),
            "DiNa-LRM, constant variance": (None, 78.72, 75.11, 68.01, 70.68),
            "DiNa-LRM, trained at t = 0 alone": (None, 59.20, 74.37, 67.55, 64.93),
            "DiNa-LRM, frozen backbone": (None, None, 73.52, 67.09, 70.27),
        },
    ),
    (
        {"genai_bench_tiger/no_tie": UNIFIED_REWARD},
        {
            "PickScore": (67.2,),
            "HPSv2": (68.4,),
            "ImageReward": (65.0,),
            "VisionReward": (66.4,),
            "UnifiedReward": (70.9,),
            "UnifiedReward 1.5": (72.4,),
        },
    ),
    ({"genai_bench_tiger/4way": "chance: four equally likely answers"}, {"random": (25.0,)}),
)
"""Tables of publications: key of the protocol → source, for each column; model → accuracies in per cent."""
PUBLISHED: tuple[Row, ...] = tuple(
    {"protocol": protocol, "model": model, "value": round(cells[column] / 100, 6), "source": source}
    for columns, models in TABLES
    for column, (protocol, source) in enumerate(columns.items())
    for model, cells in models.items()
    if cells[column] is not None
)
"""Rows with an accuracy ``value`` in [0, 1], the key of the ``protocol`` that it is comparable with, the name of the
``model``, and the ``source``: publication, and who measured it."""


def published_for(protocols: tuple[str, ...]) -> tuple[Row, ...]:
    """Return the published numbers of the given protocols, in the order of the protocols."""
    return tuple(number for key in protocols for number in PUBLISHED if number["protocol"] == key)
