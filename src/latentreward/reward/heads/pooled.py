"""Heads of a few layers: DRM's convolutions on the output map, LayerMix's means over tokens, and PAVRM's attention."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import Features, FeatureSpec
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.reward.heads.base import AXES, RewardHead, check_axes


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
            return self.mlp(pooled.to(self.mlp[0].weight.dtype)).squeeze(-1)


class LayerMixHead(RewardHead):
    """Head after DiT-Reward (arXiv:2606.23626): mean over image tokens per tap, concatenation, layer norm, MLP.

    The head does not read the prompt: in the network's blocks, image tokens attend to text tokens.

    Args:
        spec: Widths of the backbone's features.
        width: Width of the MLP's hidden layer.
        axes: Weights of fidelity and aesthetics in the score, for a head with these two outputs; None for one output.

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
            return self.mlp(pooled).squeeze(-1)


class PAVRMHead(RewardHead):
    r"""Head of PAVRM, the reward of PRFL (arXiv:2511.21541): pooling by a learned query, then an MLP.

    .. math:: o = \mathrm{MHA}(q, x, x), \qquad z = \mathrm{MLP}\bigl(\tfrac1Q \textstyle\sum_q (o + q)\bigr)

    The score is the logit z; with a loss on labels, its logistic function is the probability of a good sample. The head
    reads the last visual tap only; later blocks of the network are removed.

    Args:
        spec: Widths of the backbone's features.
        num_queries: Number Q of learned queries, over which the pooled tokens are averaged.
        num_heads: Number of attention heads; must divide the width of the last tap's tokens.
        add_query: Whether to add the query to the attention's output.
        normalise: Whether to apply a layer norm without weights to the tokens and to the attention's output.
        widths: Widths of the MLP's hidden layers.
        dropout: Dropout probability of the attention weights.
        axes: Weights of fidelity and aesthetics in the score, for a head with these two outputs; None for one output.

    Note:
        The released code adds the query in a batch of one; in larger batches its shapes would mix examples. Here each
        example is computed separately. Dropout is 0 in the released configs and 0.1 by default in the class.
    """

    reads_text = False
    reads_temb = False

    def __init__(
        self,
        spec: FeatureSpec,
        num_queries: int = 1,
        num_heads: int = 8,
        add_query: bool = True,
        normalise: bool = False,
        widths: tuple[int, ...] = (1024, 512),
        dropout: float = 0.0,
        axes: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        width = spec.visual[-1].width
        check_at_least_one(num_queries=num_queries, num_heads=num_heads, widths=min(widths, default=1))
        if width % num_heads:
            raise InputError(f"num_heads={num_heads} must divide {width}, the width of the last visual tap")
        self.add_query, self.normalise, self.axis_weights = add_query, normalise, check_axes(axes)
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_queries, width)))
        self.attention = nn.MultiheadAttention(width, num_heads, dropout, batch_first=True)
        sizes = [width, *widths, 1 if self.axis_weights is None else len(AXES)]
        layers = [nn.Linear(before, after) for before, after in itertools.pairwise(sizes)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), layers[-1])

    def pool(self, tokens: Tensor) -> Tensor:
        """Pool tokens ``(B, N, D)`` to ``(B, D)``."""
        queries = self.queries.expand(len(tokens), -1, -1)
        tokens = self._norm(tokens.to(queries.dtype))
        pooled = self._norm(self.attention(queries, tokens, tokens, need_weights=False)[0])
        return (pooled + queries if self.add_query else pooled).mean(dim=1)

    def forward(self, features: Features) -> Tensor:
        """See :meth:`RewardHead.forward`; the logit, unbounded."""
        pooled = self.pool(features.visual[-1])
        with torch.autocast(pooled.device.type, enabled=False):  # bfloat16 would round close scores to one value
            return self.mlp(pooled.to(self.queries.dtype)).squeeze(-1)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.normalise else x
