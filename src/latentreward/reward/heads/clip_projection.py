"""LRM's head: visual feature enhancement, two linear projections, and a cosine with a temperature."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import Features, FeatureSpec, PathText
from latentreward.core.errors import InputError, errors_at
from latentreward.core.storage.hub import read_locally
from latentreward.core.storage.weight_files import find_weights, map_weights
from latentreward.reward.heads.base import EmbeddingHead

MultiScale = Literal["plain", "single", "enhanced"]


class CLIPProjectionHead(EmbeddingHead):
    r"""Score ``exp(logit_scale) · cos(V, T)`` (LRM, arXiv:2502.01051, eqs. 4–6).

    ``V = W_v [pooled taps …, m]`` and ``T = W_t · pooled text``. All visual taps are averaged over their tokens. The
    last one is the mid feature, which visual feature enhancement (VFE) with guidance g turns into

    .. math:: m = m_\text{uncond} + g\,(m_\text{cond} - m_\text{uncond})

    where uncond is the feature of the same latents for the empty prompt. On a DiT the last tapped block is the mid
    feature, and the other tapped blocks are used like the U-Net's down levels.

    Args:
        spec: Widths of the backbone's features.
        guidance: g; at 1 or below VFE is off and the empty prompt is not encoded. A larger g gives text alignment more
            weight and aesthetics less.
        multi_scale: Use of the taps before the last: ``plain`` appends them without VFE, ``enhanced`` applies VFE to
            them too (see ``enhance_first``), ``single`` leaves them out.
        enhance_first: With ``enhanced``: whether VFE is applied to the first tap (published SD1.5: yes, SDXL: no).
        embed_dim: Width of V and T; None takes the width of the pooled text, or of CLIP's projection if
            ``text_projection_source`` is given.
        project_text: Whether T has a trained projection; LRM-SDXL has none, because SDXL's pooled text is already
            projected.
        text_projection_source: Folder or hub id of a CLIP model whose text projection initialises ``W_t`` (LRM-SD1.5:
            CLIP-L); None initialises with N(0, 0.02²).
        logit_scale: Initial value of the log temperature.
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
        text_projection_source: PathText | None = None,
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
                "project_text: true, or embed_dim and text_projection_source to null"
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
        """Apply visual feature enhancement: ``uncond + g · (cond − uncond)``."""
        return uncond + self.guidance * (cond - uncond)

    def visual_input(self, features: Features) -> Tensor:
        """Return the pooled, enhanced and concatenated taps: ``(B, D)``, the input of ``visual_projection``."""
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
        text = features.pooled_text
        if isinstance(self.text_projection, nn.Linear):
            text = self.text_projection(text.to(self.text_projection.weight.dtype))
        return self.visual_projection(self.visual_input(features).to(self.visual_projection.weight.dtype)), text

    def similarity(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """See :meth:`EmbeddingHead.similarity`; cosine and temperature in float32."""
        return self.logit_scale.exp() * (unit(image_embeds) * unit(text_embeds)).sum(dim=-1)

    def similarity_matrix(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        with torch.autocast(text_embeds.device.type, enabled=False):
            return self.logit_scale.exp() * unit(text_embeds) @ unit(image_embeds).T

    def forward(self, features: Features) -> Tensor:
        """See :meth:`RewardHead.forward`; scores lie between -exp(logit_scale) and exp(logit_scale)."""
        return self.similarity(*self.embed(features))


def pool(tokens: Tensor) -> Tensor:
    """Average over the tokens in float32, because guidance would multiply the rounding error of a lower precision."""
    return tokens.mean(dim=1, dtype=torch.float32)


def unit(embeds: Tensor) -> Tensor:
    """Scale rows to Euclidean length 1, in float32."""
    return F.normalize(embeds.float(), dim=-1)


def clip_text_projection(source: str) -> Tensor:
    """Read the text projection weight ``(projection_dim, hidden_size)`` of a CLIP model, and nothing else of it."""
    with errors_at(f"text_projection_source={source!r}: "):
        local = read_locally(source)
        if torch.get_default_device().type == "meta":  # only the shape is needed
            from transformers import CLIPTextConfig

            if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
                raise InputError("no file named config.json; get the files again")  # transformers takes its defaults
            config = CLIPTextConfig.from_pretrained(source, local_files_only=local)
            return torch.empty(config.projection_dim, config.hidden_size)
        weight = map_weights(find_weights(source, local_files_only=local)).get("text_projection.weight")
    if weight is None or weight.ndim != 2:
        raise InputError(f"text_projection_source={source!r} holds no text_projection.weight; give a whole CLIP model")
    return weight.to(torch.float32, copy=True)
