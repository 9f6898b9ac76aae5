"""Heads of a few layers: what they read, scores by hand, two axes, frames of clips. Numbers: tests/golden."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from latentreward.core.contracts import Features, TapSpec
from latentreward.reward import DRMHead, GatedQFormerHead, LayerMixHead, PAVRMHead, RewardHead
from tests.reward.heads.features import DIT_SPEC, SPECS, random_features

SPEC = replace(DIT_SPEC, output=TapSpec(4, (16, 16)))


def features(*shape: int) -> Features:
    return replace(random_features(SPEC, batch=3), output=torch.randn(3, 4, *shape))


def test_reads_the_output_map_alone() -> None:
    head, given = DRMHead(SPEC, widths=(8, 16), groups=4, hidden=8).eval(), features(16, 16)
    others = replace(random_features(SPEC, batch=3), output=given.output)
    torch.testing.assert_close(head(others), head(given), rtol=0, atol=0)
    assert head(given).shape == (3,)
    assert not torch.allclose(head(replace(given, output=given.output + 1)), head(given))
    head(given).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_averages_the_frames_of_a_clip() -> None:
    """Of equal frames the mean is that of one: an image with a time axis scores as without."""
    head, image = DRMHead(SPEC, widths=(8,), groups=4).eval(), features(8, 12)
    clip = replace(image, output=image.output.unsqueeze(2).expand(-1, -1, 5, -1, -1))
    torch.testing.assert_close(head(clip), head(image))


def test_the_mlp_reads_the_mean_over_the_last_stages_pixels() -> None:
    head, given = DRMHead(SPEC, widths=(8,), groups=4, hidden=8).eval(), features(4, 4)
    pixels = head.stages(given.output)
    assert pixels.shape == (3, 8, 2, 2)
    expected = sum(pixels[:, :, row, column] for row in range(2) for column in range(2)) / 4
    torch.testing.assert_close(head(given), head.mlp(expected).squeeze(1))


def test_reads_the_last_tap_alone_and_in_any_order() -> None:
    head, given = PAVRMHead(DIT_SPEC), random_features(DIT_SPEC)
    score, last = head(given), given.visual[-1]
    earlier = replace(random_features(DIT_SPEC), visual=(*random_features(DIT_SPEC).visual[:-1], last))
    torch.testing.assert_close(head(earlier), score, rtol=0, atol=0)
    torch.testing.assert_close(head(replace(given, visual=(*given.visual[:-1], last.flip(1)))), score)


@pytest.mark.parametrize("add_query", [True, False])
def test_the_query_is_added_to_what_it_attended_to(add_query: bool) -> None:
    """Of equal tokens, attention returns out(value(token)), whatever its weights."""
    head, given = PAVRMHead(DIT_SPEC, num_queries=2, add_query=add_query), random_features(DIT_SPEC)
    token = given.visual[-1][:, :1]
    attention, width = head.attention, head.queries.shape[1]
    value = token @ attention.in_proj_weight[2 * width :].T + attention.in_proj_bias[2 * width :]
    expected = attention.out_proj(value).squeeze(1) + (head.queries.mean(dim=0) if add_query else 0)
    torch.testing.assert_close(head.pool(token.expand(-1, 16, -1)), expected)


@pytest.mark.parametrize("name", SPECS)
def test_score_by_hand(name: str) -> None:
    head, given = LayerMixHead(SPECS[name], width=6).double(), random_features(SPECS[name], dtype=torch.float64)
    given = replace(given, visual=tuple(tokens / 3 for tokens in given.visual))  # no float32 numbers
    pooled = torch.cat([tokens.sum(dim=1) / tokens.shape[1] for tokens in given.visual], dim=1)
    centred = pooled - pooled.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    first, last = head.mlp[1], head.mlp[3]
    expected = F.silu(normed @ first.weight.T + first.bias) @ last.weight[0] + last.bias
    assert head(given).dtype == torch.float64
    torch.testing.assert_close(head(given), expected, rtol=1e-12, atol=1e-12)
    for index in range(len(given.visual)):
        visual = tuple(v + torch.randn(v.shape[2]) * (i == index) for i, v in enumerate(given.visual))
        assert not torch.allclose(head(replace(given, visual=visual)), head(given))


AXES = (0.25, 0.75)
HEADS = {
    "pavrm": lambda axes: PAVRMHead(DIT_SPEC, widths=(8,), axes=axes),
    "drm": lambda axes: DRMHead(SPEC, widths=(8,), groups=4, axes=axes).eval(),
    "layer_mix": lambda axes: LayerMixHead(DIT_SPEC, width=8, axes=axes),
    "gated_qformer": lambda axes: GatedQFormerHead(DIT_SPEC, num_heads=2, axes=axes),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())


def outputs_of(head: RewardHead) -> torch.Tensor:
    return head(features(8, 8) if isinstance(head, DRMHead) else random_features(DIT_SPEC))


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
