"""LayerMix: the mean image tokens of several blocks, and an MLP on all of them."""

import torch
from torch import Tensor, nn

from latentreward.core.contracts import Features, FeatureSpec
from latentreward.core.errors import check_at_least_one
from latentreward.reward.heads.base import AXES, RewardHead, check_axes, squeeze_single


class LayerMixHead(RewardHead):
    """Head after DiT-Reward (arXiv:2606.23626): mean over image tokens per tap, concatenation, layer norm, MLP.

    The head does not read the prompt: in the network's blocks, image tokens attend to text tokens.

    Args:
        spec: Widths of the backbone's features.
        width: Width of the MLP's hidden layer.
        axes: Weights of fidelity and aesthetics in the score, for a head with these two outputs; None for one output.

    Raises:
        InputError: If a number is below 1.

    Note:
        The paper's abstract names text-conditioned image tokens of several layers, a light MLP and a frozen network; no
        code is released, and pooling, sizes and layers are unknown. Those of this class are ours.
    """

    reads_text = False
    reads_temb = False

    def __init__(self, spec: FeatureSpec, width: int = 1024, axes: tuple[float, float] | None = None) -> None:
        super().__init__()
        check_at_least_one(width=width)
        self.axis_weights = check_axes(axes)
        total, outputs = sum(tap.width for tap in spec.visual), 1 if self.axis_weights is None else len(AXES)
        self.mlp = nn.Sequential(nn.LayerNorm(total), nn.Linear(total, width), nn.SiLU(), nn.Linear(width, outputs))

    def forward(self, features: Features) -> Tensor:
        """See :meth:`RewardHead.forward`; unbounded."""
        dtype = self.mlp[0].weight.dtype
        pooled = torch.cat([tokens.to(dtype).mean(dim=1) for tokens in features.visual], dim=-1)
        with torch.autocast(pooled.device.type, enabled=False):  # bfloat16 would round close scores to one value
            return squeeze_single(self.mlp(pooled))
