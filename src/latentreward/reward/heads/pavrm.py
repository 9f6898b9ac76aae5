"""PAVRM's head: one learned query attends to the last tap's tokens, and an MLP computes the score."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import Features, FeatureSpec
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.reward.heads.base import AXES, RewardHead, check_axes, squeeze_single


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

    Raises:
        InputError: If a number is below 1, or ``num_heads`` does not divide the width of the tokens.

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
            return squeeze_single(self.mlp(pooled.to(self.queries.dtype)))

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.normalise else x
