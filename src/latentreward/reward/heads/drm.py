"""DRM's head: strided convolutions on the network's output map, and an MLP on their mean."""

import itertools

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Features, FeatureSpec
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.reward.heads.base import AXES, RewardHead, check_axes, squeeze_single


class DRMHead(RewardHead):
    """Head of DRM (arXiv:2605.25661), which reads the output map at the latents' resolution, and no text or timestep.

    Each stage halves the sides: convolution 3 × 3 with stride 2, group norm, ReLU. The mean over the last stage's
    pixels goes through an MLP. Frames of a clip are read one by one, and their means are averaged.

    Args:
        spec: Widths of the backbone's features; the backbone needs ``output_map: true``.
        widths: Channels after each stage.
        groups: Number of groups of the group norms; must divide each of ``widths``.
        hidden: Width of the MLP's hidden layer.
        dropout: Dropout probability of the hidden layer.
        axes: Weights of fidelity and aesthetics in the score, for a head with these two outputs; None for one output.

    Raises:
        InputError: If the backbone returns no output map, a number is below 1, or ``groups`` does not divide a width.

    Note:
        The paper's text has an MLP on the tokens before they become a map; the released code, followed here, has the
        network's own pretrained output layers.
    """

    reads_text = False
    reads_temb = False
    reads_output = True

    def __init__(
        self,
        spec: FeatureSpec,
        widths: tuple[int, ...] = (256, 512, 512),
        groups: int = 32,
        hidden: int = 512,
        dropout: float = 0.1,
        axes: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if spec.output is None:
            raise InputError("DRMHead reads the network's output map; set the backbone's output_map: true")
        check_at_least_one(widths=min(widths, default=0), groups=groups, hidden=hidden)
        if uneven := [width for width in widths if width % groups]:
            raise InputError(f"groups={groups} must divide each of widths={list(widths)}; {uneven[0]} is no multiple")
        self.axis_weights = check_axes(axes)
        channels = [spec.output.width, *widths]
        stages = [
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(groups, after), nn.ReLU())
            for before, after in itertools.pairwise(channels)
        ]
        self.stages = nn.Sequential(*stages)
        outputs = 1 if self.axis_weights is None else len(AXES)
        self.mlp = nn.Sequential(
            nn.Linear(channels[-1], hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)
        )

    def forward(self, features: Features) -> Tensor:
        """See :meth:`RewardHead.forward`; unbounded."""
        assert features.output is not None
        output = features.output.to(self.mlp[0].weight.dtype)
        frames = output.movedim(1, -3).flatten(0, -4)  # (B, C, h, w) stays as it is
        pooled = self.stages(frames).mean(dim=(2, 3)).unflatten(0, (len(output), -1)).mean(dim=1)
        with torch.autocast(pooled.device.type, enabled=False):  # bfloat16 would round close scores to one value
            return squeeze_single(self.mlp(pooled.to(self.mlp[0].weight.dtype)))
