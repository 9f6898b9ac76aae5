"""DRM's head: what it reads, frames of clips, and what it refuses."""

from dataclasses import replace

import torch

from latentreward.core.contracts import Features, TapSpec
from latentreward.reward import DRMHead
from tests.reward.heads.features import DIT_SPEC, random_features

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
