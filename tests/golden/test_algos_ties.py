"""SoliReward's loss: pairs, ties, and labels of single images."""

from dataclasses import replace

import pytest
import torch

from latentreward.core.contracts import PairTargets
from latentreward.reward import LabelLoss, TieLoss
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_within
from tests.reward.losses.pairs import scores_of


@pytest.mark.parametrize("case", cases("algos/tie_losses"), ids=lambda case: case.name)
def test_loss(case: Case) -> None:
    """The files' second term has a value for every pair, tie or not; ours has factors beside that on pairs."""
    data = case.tensors()
    qualities = data["in.quality_win"], data["in.quality_lose"]
    targets = PairTargets(*((quality > 0).float() for quality in qualities))
    for variant, settings in case.options["variants"].items():
        chosen, rejected = (data[f"in.{side}"].clone().requires_grad_() for side in ("chosen", "rejected"))
        label = torch.where(qualities[0] == qualities[1], 0.5, 1.0)
        scores = replace(scores_of(chosen, label), rejected=rejected, targets=targets)
        margin, smoothing, factor = settings["margin"], settings["label_smoothing"], settings["bt"]
        loss = factor * TieLoss(margin, settings["btt"] / factor, smoothing, settings["bce"] / factor)(scores)
        loss.backward()
        pairs, ties = (replace(scores, label=torch.full_like(chosen, value)) for value in (1.0, 0.5))
        found = {
            "loss": loss,
            "bt": TieLoss(margin, 1.0, smoothing).per_pair(pairs),
            "btt": TieLoss(margin, 1.0, smoothing).per_pair(ties),
            "bce": LabelLoss(smoothing)(scores),
            "grad_chosen": chosen.grad,
            "grad_rejected": rejected.grad,
        }
        for name, value in found.items():
            assert_within(value, data[f"{variant}.{name}"], f"{variant}.{name}", 1e-5)
