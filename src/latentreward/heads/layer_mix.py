"""LayerMix: the mean image tokens of several blocks, and an MLP on all of them."""

import torch
from torch import Tensor, nn

from latentreward.contracts import Features, FeatureSpec
from latentreward.errors import check_at_least_one
from latentreward.heads.base import RewardHead


class LayerMixHead(RewardHead):
    """Head after DiT-Reward (arXiv:2606.23626): mean over image tokens per tap, concatenation, layer norm, MLP.

    The prompt has its effect through the network's blocks, which let image tokens attend to text tokens.

    Args:
        spec: Widths of the backbone's features.
        width: Width of the MLP's hidden layer.

    Raises:
        InputError: If a number is below 1.

    Note:
        The paper's abstract names text-conditioned image tokens of several layers, a light MLP and a frozen network; no
        code is released, and pooling, sizes and layers are unknown. Those here are ours.
    """

    reads_text = False
    reads_temb = False

    def __init__(self, spec: FeatureSpec, width: int = 1024) -> None:
        super().__init__()
        check_at_least_one(width=width)
        total = sum(tap.width for tap in spec.visual)
        self.mlp = nn.Sequential(nn.LayerNorm(total), nn.Linear(total, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Features) -> Tensor:
        """See :meth:`RewardHead.forward`; unbounded."""
        pooled = torch.cat([tokens.float().mean(dim=1) for tokens in features.visual], dim=-1)
        with torch.autocast(pooled.device.type, enabled=False):  # bfloat16 would round close scores to one value
            return self.mlp(pooled).squeeze(-1)
