"""LRM's head: visual feature enhancement, projections, a temperature, a cosine."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.contracts import Features, FeatureSpec
from latentreward.errors import InputError, first_line
from latentreward.heads.base import EmbeddingHead
from latentreward.storage.hub import read_locally

MultiScale = Literal["plain", "single", "enhanced"]


class CLIPProjectionHead(EmbeddingHead):
    r"""Score ``exp(logit_scale) · cos(V, T)`` (LRM, arXiv:2502.01051, eqs. 4–6).

    ``V = W_v [pooled taps …, m]`` and ``T = W_t · pooled text``, where the last visual tap is the mid feature and

    .. math:: m = m_\text{uncond} + g\,(m_\text{cond} - m_\text{uncond})

    is its visual feature enhancement (VFE) by guidance g; taps are mean-pooled over their tokens. On a DiT the tapped
    blocks stand for the down levels and the last of them for mid.

    Args:
        spec: Widths of the backbone's features.
        guidance: g; at 1 or below VFE is off and the empty prompt is not read. Larger g: more text alignment, less
            aesthetics.
        multi_scale: ``plain`` joins the other taps as they are; ``enhanced`` enhances them too (in the published SDXL
            variant all but the first); ``single`` leaves them out.
        enhance_first: With ``enhanced``: whether the first tap is enhanced as well (SD1.5 yes, SDXL no).
        embed_dim: Width of V and T; None takes the pooled text's, or CLIP's if ``text_projection_source`` is given.
        project_text: Whether T has a projection of its own; LRM-SDXL has none, as SDXL's pooled text is already
            projected.
        text_projection_source: Folder or hub id of a CLIP model whose text projection starts ours (LRM-SD1.5:
            CLIP-L); None starts it at N(0, 0.02²).
        logit_scale: Initial log temperature.
    """

    reads_text = False
    reads_temb = False

    def __init__(
        self,
        spec: FeatureSpec,
        guidance: float = 7.5,
        multi_scale: MultiScale = "plain",
        enhance_first: bool = True,
        embed_dim: int | None = None,
        project_text: bool = True,
        text_projection_source: str | None = None,
        logit_scale: float = 2.6592,
    ) -> None:
        super().__init__()
        self.guidance, self.multi_scale, self.enhance_first = guidance, multi_scale, enhance_first
        self.needs_uncond = guidance > 1
        text_weight = None if text_projection_source is None else clip_text_projection(text_projection_source)
        if embed_dim is None:
            embed_dim = spec.pooled_text_dim if text_weight is None else len(text_weight)
        if not project_text and embed_dim != spec.pooled_text_dim:
            raise InputError(
                f"embed_dim={embed_dim} differs from the pooled text's width {spec.pooled_text_dim}; set "
                "project_text: true or leave embed_dim out"
            )
        widths = [tap.width for tap in spec.visual]
        self.visual_projection = nn.Linear(
            widths[-1] if multi_scale == "single" else sum(widths), embed_dim, bias=False
        )
        nn.init.normal_(self.visual_projection.weight, std=0.02)
        self.text_projection = nn.Linear(spec.pooled_text_dim, embed_dim, bias=False) if project_text else nn.Identity()
        if project_text:
            nn.init.normal_(self.text_projection.weight, std=0.02)
        if text_weight is not None:
            if not project_text or text_weight.shape != self.text_projection.weight.shape:
                raise InputError(
                    f"text_projection_source={text_projection_source!r} has a projection of shape "
                    f"{tuple(text_weight.shape)}, but this head needs ({embed_dim}, {spec.pooled_text_dim}) and "
                    "project_text: true"
                )
            self.text_projection.weight.data.copy_(text_weight)
        self.logit_scale = nn.Parameter(torch.tensor([float(logit_scale)]))  # one element: FSDP2 takes no scalars

    def enhance(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """``uncond + g · (cond − uncond)``."""
        return uncond + self.guidance * (cond - uncond)

    def visual_input(self, features: Features) -> Tensor:
        """Pooled, enhanced and joined taps, ``(B, width of visual_projection's input)``."""
        pooled = [pool(tokens) for tokens in features.visual]
        if self.needs_uncond:
            empty = [pool(tokens) for tokens in features.uncond.visual]
            for index in range(len(pooled)):
                is_mid = index == len(pooled) - 1
                is_enhanced_level = self.multi_scale == "enhanced" and (index > 0 or self.enhance_first)
                if is_mid or is_enhanced_level:
                    pooled[index] = self.enhance(pooled[index], empty[index])
        return pooled[-1] if self.multi_scale == "single" else torch.cat(pooled, dim=-1)

    def embed(self, features: Features) -> tuple[Tensor, Tensor]:
        """See :meth:`EmbeddingHead.embed`."""
        text = features.pooled_text
        if isinstance(self.text_projection, nn.Linear):
            text = self.text_projection(text.to(self.text_projection.weight.dtype))
        return self.visual_projection(self.visual_input(features).to(self.visual_projection.weight.dtype)), text

    def similarity(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """See :meth:`EmbeddingHead.similarity`; cosine and temperature in float32."""
        return self.logit_scale.exp() * (unit(image_embeds) * unit(text_embeds)).sum(dim=-1)

    def similarity_matrix(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """See :meth:`EmbeddingHead.similarity_matrix`."""
        with torch.autocast(text_embeds.device.type, enabled=False):
            return self.logit_scale.exp() * unit(text_embeds) @ unit(image_embeds).T

    def forward(self, features: Features) -> Tensor:
        """See :meth:`RewardHead.forward`; scores in ±exp(logit_scale)."""
        return self.similarity(*self.embed(features))


def pool(tokens: Tensor) -> Tensor:
    """Mean over the tokens in float32: guidance multiplies what a half-precision mean would round off."""
    return tokens.mean(dim=1, dtype=torch.float32)


def unit(embeds: Tensor) -> Tensor:
    """Rows scaled to length 1, in float32."""
    return F.normalize(embeds.float(), dim=-1)


def clip_text_projection(source: str) -> Tensor:
    """Text projection weight ``(projection_dim, hidden_size)`` of a CLIP model.

    Raises:
        InputError: If ``source`` is no folder or hub id of a CLIP model with a text projection.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    try:
        local = read_locally(source)
        if torch.get_default_device().type == "meta":  # shapes alone, as the backbones' loaders do
            config = CLIPTextConfig.from_pretrained(source, local_files_only=local)
            return torch.empty(config.projection_dim, config.hidden_size)
        model, report = CLIPTextModelWithProjection.from_pretrained(
            source,
            local_files_only=local,
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
            attn_implementation="eager",  # else its config.json may name one whose code is downloaded; it never runs
        )
    except (OSError, ValueError) as error:
        raise InputError(f"text_projection_source={source!r}: {first_line(error)}") from error
    if "text_projection.weight" in report["missing_keys"]:
        raise InputError(f"text_projection_source={source!r} holds no text_projection.weight; give a whole CLIP model")
    return model.text_projection.weight.detach().clone()
