"""Settings that make no sense: each is refused by one line that names it, where the part is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.core.errors import InputError
from latentreward.reward import (
    BradleyTerryLoss,
    Calibration,
    CallableScorer,
    CLIPProjectionHead,
    ConstantVarianceThurstoneLoss,
    DRMHead,
    GatedQFormerHead,
    HPSv2Scorer,
    LabelLoss,
    LayerMixHead,
    LRMLoss,
    PairCalibration,
    PairwiseAccuracy,
    PAVRMHead,
    RankingDistillation,
    ScoringNoise,
    ThurstoneLoss,
    TieLoss,
    WarmupSchedule,
)
from latentreward.reward.scoring.publishing import check_target
from tests.alignment.modules.batches import lrm
from tests.reward.heads.features import DIT_SPEC, UNET_SPEC
from tests.reward.heads.test_pooled import HEADS, SPEC

NAN, INF = float("nan"), float("inf")
NOISE = ScoringNoise(sigmas=(0.4,))


def schedule(**settings: Any) -> WarmupSchedule:
    return WarmupSchedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), **settings)


REFUSED: list[tuple[Callable[..., Any], list[tuple[dict[str, Any], str]]]] = [
    (
        lambda **given: CLIPProjectionHead(UNET_SPEC, **given),
        [
            ({"text_projection_source": "/nowhere"}, "text_projection_source="),
            ({"embed_dim": 7, "project_text": False}, "embed_dim=7 differs from the pooled text's width 20"),
        ],
    ),
    (
        lambda **given: DRMHead(SPEC, **given),
        [({"widths": (8, 12), "groups": 8}, "12"), ({"widths": ()}, "widths"), ({"hidden": 0}, "hidden")],
    ),
    (lambda: DRMHead(DIT_SPEC), [({}, "output_map: true")]),
    (
        lambda **given: GatedQFormerHead(UNET_SPEC, **given),
        [
            ({"num_heads": 5}, "num_heads=5 must divide the head's width 24"),
            ({"width": 0}, "width is 0"),
            *(({"grid": grid}, "grid=.* must be 'smallest', 'largest' or 2") for grid in ("middle", (4,), (0, 4))),
        ],
    ),
    (lambda **given: LayerMixHead(DIT_SPEC, **given), [({"width": 0}, "width")]),
    (
        lambda **given: PAVRMHead(DIT_SPEC, **given),
        [({"num_heads": 5}, "num_heads=5"), ({"num_queries": 0}, "num_queries"), ({"widths": (0,)}, "widths")],
    ),
    (BradleyTerryLoss, [({"margin": margin}, "margin=") for margin in (-0.1, NAN, INF)]),
    (
        LRMLoss,
        [
            ({"mode": "bath"}, "did you mean 'batch'"),
            ({"batch_coeff": -1.0}, "batch_coeff=-1 must be at least 0"),
            ({"aux_loss_coeff": INF}, "aux_loss_coeff=inf must be at least 0 and finite"),
        ],
    ),
    (
        ThurstoneLoss,
        [
            ({"sigma_u": 0.0}, "sigma_u=0 must lie"),
            ({"sigma_u": NAN}, "sigma_u=nan must lie"),
            ({"k": -1.0}, "k=-1 must be at least 0"),
            ({"objective": "fidelty"}, "did you mean 'fidelity'"),
            ({"form": "hellinger"}, "ThurstoneLoss: form='hellinger'"),
        ],
    ),
    (ConstantVarianceThurstoneLoss, [({"variance": 0.0}, "variance=0")]),
    (
        TieLoss,
        [({"margin": -1.0}, "margin=-1"), ({"tie_weight": NAN}, "tie_weight"), ({"label_smoothing": 0.6}, "label_sm")],
    ),
    (LabelLoss, [({"label_smoothing": -0.1}, "label_smoothing")]),
    (RankingDistillation, [({"temperature": 0.0}, "temperature=0")]),
    (PairCalibration, [({"bins": 0}, "bins=0")]),
    (PairwiseAccuracy, [({"equal": "halff"}, "did you mean 'half'")]),
    (
        schedule,
        [
            ({"decay": "linear"}, "needs total_steps above warmup_steps"),
            ({"decay": "cosine", "warmup_steps": 5, "total_steps": 5}, "needs total_steps above warmup_steps"),
            ({"decay": "exponential", "total_steps": 5}, "decay='exponential'"),
            ({"warmup_steps": -1}, "warmup_steps=-1"),
        ],
    ),
    (
        lrm,
        [
            ({"eval_timesteps": ()}, "eval_timesteps and eval_sigmas are both empty"),
            ({"eval_timesteps": (1000,)}, r"eval_timesteps=\[1000\]: timestep 1000"),
            ({"eval_sigmas": (1.2,)}, "eval_sigmas=1.2"),
            ({"ensemble_sigmas": (0.2, 0.5, 0.2)}, "ensemble_sigmas="),
        ],
    ),
    (
        ScoringNoise,
        [
            ({}, "give levels as one of the two"),
            ({"sigmas": (0.4,), "timesteps": (1,)}, "give levels as one of the two"),
            ({"sigmas": (1.2,)}, r"noise.sigmas holds 1.2"),
            ({"sigmas": (NAN,)}, "noise.sigmas holds nan"),
            ({"sigmas": (0.4, 0.5), "seeds": range(501)}, "levels times seeds are 1002"),
            *(({"sigmas": (0.4,), "seeds": seeds}, "noise.seeds=") for seeds in ((), (1, 1), ("1",), (True,), (1.5,))),
        ],
    ),
    (
        lambda scores: Calibration.fit(scores, "my images", NOISE),
        [
            ({"scores": torch.randn(19)}, "'my images': 19 scores are too few"),
            ({"scores": torch.full((50,), 1.5)}, "'my images': all 50 scores are 1.5"),
            ({"scores": torch.tensor([NAN, INF, *range(50)])}, "'my images': 2 of 52 scores are NaN or infinite"),
        ],
    ),
    (HPSv2Scorer, [({"weights": "v3"}, "'v3' is neither v2.0, v2.1 nor a file")]),
    (
        lambda **given: CallableScorer(lambda prompts, images: 0, **given),
        [({"name": "a b"}, "name of a scorer is 'a b'"), ({"name": "own", "batch_size": 0}, "own.batch_size is 0")],
    ),
    *(
        (make, [({"axes": axes}, "axes=.*fidelity and aesthetics") for axes in ((1.0,), (0.0, 0.0), (-1.0, 2.0))])
        for make in HEADS.values()
    ),
    (check_target, [({"folder": Path(place)}, "holds the current folder.*another one") for place in (".", "..")]),
]
ROWS = [(make, *row) for make, rows in REFUSED for row in rows]


@pytest.mark.parametrize(("make", "settings", "key"), ROWS, ids=[f"{n} {key:.30}" for n, (*_, key) in enumerate(ROWS)])
def test_what_makes_no_sense_is_refused(make: Callable[..., Any], settings: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=key) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)
