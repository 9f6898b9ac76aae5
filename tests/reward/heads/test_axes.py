"""Heads with two axes: two outputs of each head, their weighted sum, and refused weights."""

import pytest
import torch

from latentreward.reward import DRMHead, GatedQFormerHead, LayerMixHead, PAVRMHead, RewardHead
from tests.reward.heads.features import DIT_SPEC, random_features
from tests.reward.heads.test_drm import SPEC
from tests.reward.heads.test_drm import features as with_map

AXES = (0.25, 0.75)
HEADS = {
    "pavrm": lambda axes: PAVRMHead(DIT_SPEC, widths=(8,), axes=axes),
    "drm": lambda axes: DRMHead(SPEC, widths=(8,), groups=4, axes=axes).eval(),
    "layer_mix": lambda axes: LayerMixHead(DIT_SPEC, width=8, axes=axes),
    "gated_qformer": lambda axes: GatedQFormerHead(DIT_SPEC, num_heads=2, axes=axes),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())


def outputs_of(head: RewardHead) -> torch.Tensor:
    return head(with_map(8, 8) if isinstance(head, DRMHead) else random_features(DIT_SPEC))


@every_head
def test_two_outputs_and_their_weighted_sum(make) -> None:
    head = make(AXES)
    outputs = outputs_of(head)
    assert outputs.shape == (3, 2)
    torch.testing.assert_close(head.total(outputs), 0.25 * outputs[:, 0] + 0.75 * outputs[:, 1])
    levels = torch.stack([outputs, 2 * outputs], dim=1)
    torch.testing.assert_close(head.total(levels)[:, 1], 2 * head.total(outputs))


def test_a_weighted_sum_is_not_rounded_under_autocast() -> None:
    outputs = torch.tensor([[1.5005, 1.5005], [1.5010, 1.5010]])
    with torch.autocast("cpu", torch.bfloat16):
        found = HEADS["pavrm"](AXES).total(outputs)
    torch.testing.assert_close(found, outputs[:, 0])


@every_head
def test_one_output_is_the_score(make) -> None:
    head = make(None)
    outputs = outputs_of(head)
    assert outputs.shape == (3,)
    assert head.total(outputs) is outputs
