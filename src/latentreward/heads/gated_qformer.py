"""DiNa-LRM's head: FiLM by timestep, gated query attention, a scalar per query."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.contracts import Features, FeatureSpec
from latentreward.errors import InputError
from latentreward.heads.base import RewardHead
from latentreward.heads.grids import common_grid, resample_tokens


class LogisticSquash(nn.Module):
    r"""``4 / (1 + exp(−(x − η₃) / (|η₄| + 10⁻⁶))) − 2``, in (−2, 2): DiNa-LRM's ``use_logistic``.

    Args:
        eta3: Initial midpoint; trains.
        eta4: Initial width; trains.

    Note:
        The published files do not hold η₃ and η₄, so a loaded model has the initial values. The released form's
        gradient is NaN for x far below η₃ (exp overflows); this one uses the sigmoid.
    """

    def __init__(self, eta3: float = 0.0, eta4: float = 0.15) -> None:
        super().__init__()
        self.eta3 = nn.Parameter(torch.tensor(eta3))
        self.eta4 = nn.Parameter(torch.tensor(eta4))

    def forward(self, x: Tensor) -> Tensor:
        """Squash any shape."""
        return 4 * torch.sigmoid((x - self.eta3) / (self.eta4.abs() + 1e-6)) - 2


class RMSNorm(nn.Module):
    """Root-mean-square norm over features, computed in float32, with its epsilon stated.

    Args:
        width: Features.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., width)``; the result has the input's dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class FiLMAdapter(nn.Module):
    """Tokens of one tap, modulated by the timestep (FiLM, arXiv:1709.07871) and narrowed.

    ``proj(x · (1 + γ) + β + layer_embed)`` with ``γ, β`` from the timestep embedding; γ = β = 0 at the start.

    Args:
        in_dim: Width of the tap's tokens.
        width: Width of the head; tokens of another width are projected first.
        out_dim: Width after narrowing.
        temb_dim: Width of the timestep embedding.
        use_proj_in: Project first even if the widths agree.
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
        """``(B, N, in_dim)`` → ``(B, N, width)``."""
        if hasattr(self, "proj_in"):
            tokens = self.proj_in(tokens)
        gamma, beta = self.cond_mlp(temb).unsqueeze(1).chunk(2, dim=-1)
        return tokens * (1 + gamma) + beta + self.layer_embed

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        """``(B, N, in_dim)``, ``(B, temb_dim)`` → ``(B, N, out_dim)``."""
        return self.proj(self.modulate(tokens, temb))


class QueryAttention(nn.Module):
    """Queries attend to visual tokens and, if it has a text side, to text tokens by a second softmax.

    With gates, each value is scaled by a sigmoid of its own normalised token; ½ at the start. The residual is the
    un-normalised query.

    Args:
        width: Width of queries and tokens.
        num_heads: Attention heads.
        with_text: Whether there is a text side.
        gated: Whether values are gated.
        eps: Epsilon of the norms.
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

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def forward(self, queries: Tensor, visual: Tensor, text: Tensor | None = None) -> Tensor:
        """``(B, Q, width)``, ``(B, N, width)``, ``(B, M, width)`` → ``(B, Q, width)``."""
        query, tokens = self.to_q(self.norm_q(queries)), self.norm_v(visual)
        value = self.to_v_vis(tokens)
        hidden = self._attend(
            query, self.to_k_vis(tokens), torch.sigmoid(self.gate_vis(tokens)) * value if self.gated else value
        )
        if text is not None:
            tokens = self.norm_t(text)
            value = self.to_v_text(tokens)
            hidden = hidden + self._attend(
                query, self.to_k_text(tokens), torch.sigmoid(self.gate_text(tokens)) * value if self.gated else value
            )
        return queries + self.to_out(hidden)


def gate(width: int) -> nn.Sequential:
    """One logit per token, 0 at the start."""
    layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    nn.init.zeros_(layers[2].weight)
    nn.init.zeros_(layers[2].bias)
    return layers


class GatedQFormerHead(RewardHead):
    """DiNa-LRM's head (arXiv:2602.11146, section 3.3); parameter names are those of the published files.

    Each tap goes through a FiLM adapter of its own; taps of a stream are joined on features and mixed; a few learned
    queries attend to them; each query gives a scalar, and the mean is the score.

    Args:
        spec: Widths of the backbone's features.
        width: Width of the head; None takes the taps' common width, or the widest tap's.
        num_queries: Learned queries.
        num_heads: Attention heads; must divide ``width``.
        out_dim: Scores per image.
        use_proj_in: Project every tap first, even if the widths agree.
        rms_eps: Epsilon of the RMS norms. The published weights were made where PyTorch's default in bfloat16 was
            2⁻⁷ = 0.0078125; newer PyTorch has 1.19e-7.
        dropout: Dropout on the mixed tokens.
        use_logistic: Squash the score into (−2, 2).
        grid: Visual grid on which taps of different grids are joined: ``smallest``, ``largest`` or its sides.
        ensemble: A score at several noise levels from all levels' ``tokens`` at once, or the mean of their ``scores``.

    Raises:
        InputError: If ``num_heads`` does not divide the width.
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
    ) -> None:
        super().__init__()
        width = width or max(tap.width for tap in spec.visual)
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
        self.head = nn.Linear(width, out_dim)
        self.logistic = LogisticSquash() if use_logistic else None

    def tokens(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Mixed visual tokens ``(B, N, width)`` and text tokens ``(B, M, width)``, None if no text was read."""
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

    def pool(self, visual: Tensor, text: Tensor | None) -> Tensor:
        """Scores ``(B, out_dim)`` of mixed tokens; see :meth:`tokens`."""
        queries = self.query_tokens.expand(len(visual), -1, -1)
        queries = self.attn1(queries, visual, text)
        queries = self.attn2(queries, visual)
        queries = queries + self.ff(self.norm_ff(queries))
        with torch.autocast(queries.device.type, enabled=False):  # bfloat16 scores would tie from about 1 / 100 apart
            score = self.head(queries.to(self.head.weight.dtype)).mean(dim=1)
        return score if self.logistic is None else self.logistic(score)

    def forward(self, features: Features) -> Tensor:
        """See :meth:`RewardHead.forward`; unbounded unless ``use_logistic``."""
        return squeeze_single(self.pool(*self.tokens(features)))

    def score_ensemble(self, levels: Sequence[Features]) -> Tensor:
        """One score from the tokens of all levels, joined along the tokens after each was modulated by its timestep.

        Args:
            levels: The same images at K noise levels.
        """
        if self.ensemble == "scores":
            return super().score_ensemble(levels)
        visual, text = zip(*(self.tokens(features) for features in levels), strict=True)
        return squeeze_single(self.pool(torch.cat(visual, dim=1), None if text[0] is None else torch.cat(text, dim=1)))


def squeeze_single(score: Tensor) -> Tensor:
    """``(B, 1)`` → ``(B,)``; several outputs stay ``(B, out_dim)``."""
    return score.squeeze(-1) if score.shape[-1] == 1 else score
