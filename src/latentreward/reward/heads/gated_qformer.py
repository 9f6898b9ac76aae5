"""DiNa-LRM's head: FiLM modulation by timestep, gated attention of learned queries, and a scalar per query."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import Features, FeatureSpec
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.reward.heads.base import AXES, RewardHead, check_axes


class LogisticSquash(nn.Module):
    r"""Logistic squashing of scores into (−2, 2), DiNa-LRM's ``use_logistic``.

    Computes ``4 / (1 + exp(−(x − η₃) / (|η₄| + 10⁻⁶))) − 2``.

    Args:
        eta3: Initial value of the trained midpoint η₃.
        eta4: Initial value of the trained width η₄.

    Note:
        The published files do not contain η₃ and η₄, so that a loaded model has the initial values. The released code
        has a NaN gradient for x far below η₃, where exp overflows; the sigmoid used here does not.
    """

    def __init__(self, eta3: float = 0.0, eta4: float = 0.15) -> None:
        super().__init__()
        self.eta3 = nn.Parameter(torch.tensor(eta3))
        self.eta4 = nn.Parameter(torch.tensor(eta4))

    def forward(self, x: Tensor) -> Tensor:
        """Squash scores of any shape."""
        return 4 * torch.sigmoid((x - self.eta3) / (self.eta4.abs() + 1e-6)) - 2


class RMSNorm(nn.Module):
    """Root-mean-square norm over the features, computed in float32, with an explicit epsilon."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., width)``; the result has the input's dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class FiLMAdapter(nn.Module):
    """FiLM modulation (arXiv:1709.07871) of one tap's tokens by the timestep, followed by a projection to ``out_dim``.

    Computes ``proj(x · (1 + γ) + β + layer_embed)``, where an MLP computes ``γ, β`` from the timestep embedding. Both
    are 0 at initialisation. Tokens of another width than ``width`` are projected to it first, with ``use_proj_in`` all.
    """

    def __init__(self, in_dim: int, width: int, out_dim: int, temb_dim: int, use_proj_in: bool) -> None:
        super().__init__()
        if use_proj_in or in_dim != width:
            self.proj_in = nn.Linear(in_dim, width)
        self.cond_mlp = nn.Sequential(nn.Linear(temb_dim, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        nn.init.zeros_(self.cond_mlp[2].weight)
        nn.init.zeros_(self.cond_mlp[2].bias)
        self.layer_embed = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.proj = nn.Linear(width, out_dim)

    def modulate(self, tokens: Tensor, temb: Tensor) -> Tensor:
        """Modulate tokens ``(B, N, in_dim)`` by ``temb`` ``(B, temb_dim)``; returns ``(B, N, width)``."""
        if hasattr(self, "proj_in"):
            tokens = self.proj_in(tokens)
        gamma, beta = self.cond_mlp(temb).unsqueeze(1).chunk(2, dim=-1)
        return tokens * (1 + gamma) + beta + self.layer_embed

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        """Modulate and project tokens: ``(B, N, in_dim)``, ``(B, temb_dim)`` → ``(B, N, out_dim)``."""
        return self.proj(self.modulate(tokens, temb))


class QueryAttention(nn.Module):
    """Cross-attention of queries to visual tokens and, optionally, to text tokens with a separate softmax.

    The results of the two attentions are added. With ``gated``, each token's value is multiplied by a gate: the sigmoid
    of an MLP on the normalised token, ½ at initialisation. The residual connection adds the queries before their norm.
    """

    def __init__(self, width: int, num_heads: int, with_text: bool, gated: bool, eps: float) -> None:
        super().__init__()
        self.num_heads, self.gated = num_heads, gated
        self.norm_q, self.norm_v = RMSNorm(width, eps), RMSNorm(width, eps)
        self.to_q = nn.Linear(width, width)
        self.to_k_vis, self.to_v_vis = nn.Linear(width, width), nn.Linear(width, width)
        if gated:
            self.gate_vis = gate(width)
        if with_text:
            self.norm_t = RMSNorm(width, eps)
            self.to_k_text, self.to_v_text = nn.Linear(width, width), nn.Linear(width, width)
            if gated:
                self.gate_text = gate(width)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def _attend(self, query: Tensor, tokens: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
        """Attend to normed tokens by the layers of their kind, ``vis`` or ``text``."""
        key, value = getattr(self, f"to_k_{kind}")(tokens), getattr(self, f"to_v_{kind}")(tokens)
        if self.gated:
            value = torch.sigmoid(getattr(self, f"gate_{kind}")(tokens)) * value
        q, k, v = (tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tensor in (query, key, value))
        keys = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)

    def forward(
        self, queries: Tensor, visual: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """Attend: queries ``(B, Q, width)``, visual ``(B, N, width)``, text ``(B, M, width)`` → ``(B, Q, width)``.

        Text tokens where ``text_mask`` ``(B, M)`` is false are ignored.
        """
        query = self.to_q(self.norm_q(queries))
        hidden = self._attend(query, self.norm_v(visual), "vis")
        if text is not None:
            hidden = hidden + self._attend(query, self.norm_t(text), "text", text_mask)
        return queries + self.to_out(hidden)


def gate(width: int) -> nn.Sequential:
    """Build an MLP that computes one gate logit per token, 0 at initialisation."""
    layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    nn.init.zeros_(layers[2].weight)
    nn.init.zeros_(layers[2].bias)
    return layers


class GatedQFormerHead(RewardHead):
    """DiNa-LRM's head (arXiv:2602.11146, section 3.3); parameter names are those of the published files.

    Each tap has a FiLM adapter. The adapted visual taps are concatenated along the features and mixed by a linear
    layer; the adapted text taps are concatenated and mixed by another. Learned queries attend to the mixed tokens. Each
    query yields a scalar, and the mean of the scalars is the score.

    Args:
        spec: Widths of the backbone's features.
        width: Width of the head; None takes the width of the widest visual tap.
        num_queries: Number of learned queries.
        num_heads: Number of attention heads; must divide ``width``.
        out_dim: Number of scores per image.
        use_proj_in: Whether to project each tap to ``width`` first even if its width equals ``width``.
        rms_eps: Epsilon of the RMS norms. The published weights were trained with a PyTorch whose default in bfloat16
            was 2⁻⁷ = 0.0078125; newer PyTorch uses 1.19e-7.
        dropout: Dropout probability of the mixed tokens.
        use_logistic: Whether to squash the score into (−2, 2), see :class:`LogisticSquash`.
        grid: Token grid to which visual taps are resampled before they are concatenated: ``smallest`` or ``largest``
            grid among the taps, or its sides.
        ensemble: Computation of a score from several noise levels: ``tokens`` lets the queries attend to the tokens of
            all levels at once, ``scores`` averages the levels' scores.
        axes: Weights of fidelity and aesthetics in the score, for a head with these two outputs, whatever ``out_dim``.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        width: int | None = None,
        num_queries: int = 4,
        num_heads: int = 8,
        out_dim: int = 1,
        use_proj_in: bool = False,
        rms_eps: float = 1.1920928955078125e-07,
        dropout: float = 0.0,
        use_logistic: bool = False,
        grid: str | Sequence[int] = "smallest",
        ensemble: Literal["tokens", "scores"] = "tokens",
        axes: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        width = max(tap.width for tap in spec.visual) if width is None else width
        check_at_least_one(width=width, num_queries=num_queries, num_heads=num_heads, out_dim=out_dim)
        if width % num_heads:
            raise InputError(f"num_heads={num_heads} must divide the head's width {width}")
        narrow = max(width // 4, 1)
        common_grid([tap.grid for tap in spec.visual], grid)
        self.grid, self.ensemble = grid, ensemble

        def adapters(taps: Sequence) -> nn.ModuleList:
            return nn.ModuleList(FiLMAdapter(tap.width, width, narrow, spec.temb_dim, use_proj_in) for tap in taps)

        self.layer_adapters_visual = adapters(spec.visual)
        self.agg_visual = nn.Linear(len(spec.visual) * narrow, width)
        if spec.text:
            self.layer_adapters_text = adapters(spec.text)
            self.agg_text = nn.Linear(len(spec.text) * narrow, width)
        self.token_dropout = nn.Dropout(dropout)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, num_queries, width))
        self.attn1 = QueryAttention(width, num_heads, bool(spec.text), gated=True, eps=rms_eps)
        self.attn2 = QueryAttention(width, num_heads, False, gated=False, eps=rms_eps)
        self.norm_ff = RMSNorm(width, rms_eps)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.axis_weights = check_axes(axes)
        self.outputs = out_dim
        self.head = nn.Linear(width, out_dim if self.axis_weights is None else len(AXES))
        self.logistic = LogisticSquash() if use_logistic else None

    def tokens(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Compute mixed visual tokens ``(B, N, width)`` and text tokens ``(B, M, width)``, None without text taps."""
        dtype = self.query_tokens.dtype
        temb = features.temb.to(dtype)
        target = common_grid(features.visual_grids, self.grid)
        visual = [
            adapter(resample_tokens(tokens.to(dtype), grid, target), temb)
            for adapter, tokens, grid in zip(
                self.layer_adapters_visual, features.visual, features.visual_grids, strict=True
            )
        ]
        mixed = self.token_dropout(self.agg_visual(torch.cat(visual, dim=-1)))
        if not features.text:
            return mixed, None
        text = [
            adapter(tokens.to(dtype), temb)
            for adapter, tokens in zip(self.layer_adapters_text, features.text, strict=True)
        ]
        return mixed, self.token_dropout(self.agg_text(torch.cat(text, dim=-1)))

    def pool(self, visual: Tensor, text: Tensor | None, text_mask: Tensor | None = None) -> Tensor:
        """Compute scores ``(B, out_dim)`` from mixed tokens and the text tokens' mask; see :meth:`tokens`."""
        queries = self.query_tokens.expand(len(visual), -1, -1)
        queries = self.attn1(queries, visual, text, text_mask)
        queries = self.attn2(queries, visual)
        queries = queries + self.ff(self.norm_ff(queries))
        with torch.autocast(queries.device.type, enabled=False):  # bfloat16 would round scores 0.01 apart to one value
            score = self.head(queries.to(self.head.weight.dtype)).mean(dim=1)
        return score if self.logistic is None else self.logistic(score)

    def forward(self, features: Features) -> Tensor:
        return self.pool(*self.tokens(features), features.text_mask).squeeze(-1)

    def score_ensemble(self, levels: Sequence[Features]) -> Tensor:
        """Compute one score per image from several noise levels; see ``ensemble``.

        With ``ensemble="tokens"`` each level's tokens are modulated by their timestep, then concatenated along the
        token axis.
        """
        if self.ensemble == "scores":
            return super().score_ensemble(levels)
        visual, text = zip(*(self.tokens(features) for features in levels), strict=True)
        masks = [features.text_mask for features in levels if features.text_mask is not None]
        mask = torch.cat(masks, dim=1) if masks else None
        joined = None if text[0] is None else torch.cat(text, dim=1)
        return self.pool(torch.cat(visual, dim=1), joined, mask).squeeze(-1)


def resample_tokens(tokens: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Resample tokens ``(B, prod(grid), D)`` to ``(B, prod(target), D)`` by adaptive average pooling.

    Grids have one to three axes (text, image, video), in row-major order. Tokens repeat where ``target`` is finer.
    """
    if grid == target:
        return tokens
    field = tokens.transpose(1, 2).unflatten(2, grid)
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(grid)]
    return pool(field, target).flatten(2).transpose(1, 2)


def common_grid(grids: Sequence[tuple[int, ...]], choice: str | Sequence[int] = "smallest") -> tuple[int, ...]:
    """Return the grid to which all taps are resampled; raise InputError for a ``choice`` that is none for them."""
    if choice == "smallest":
        return min(grids, key=prod)
    if choice == "largest":
        return max(grids, key=prod)
    if isinstance(choice, str) or len(choice) != len(grids[0]) or min(choice) < 1:
        raise InputError(f"grid={choice!r} must be 'smallest', 'largest' or {len(grids[0])} positive whole numbers")
    return tuple(choice)
