"""Pictures that prompts edit: the sizes that pipelines give them, and encoding of such prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from latentreward.contracts import Conditioning, sources_of
from latentreward.encoders.prompts import PromptEncoder, encode_texts
from latentreward.errors import InputError

if TYPE_CHECKING:
    from latentreward.encoders.source_encoder import SourceEncoder


class SourceSize(NamedTuple):
    """Size that a pipeline gives to a picture that it edits.

    Attributes:
        resized: (height, width) in pixels to which the whole picture is resized.
        cropped: (height, width) of the centre that is then kept; None for all.
    """

    resized: tuple[int, int]
    cropped: tuple[int, int] | None = None


def encode_edits(
    text_encoder: PromptEncoder,
    prompts: Sequence[str],
    encoder: SourceEncoder | None,
    sources: Sequence[Tensor] = (),
    latents: bool = False,
) -> Conditioning:
    """Encode B prompts, and the pictures that they edit, to B rows.

    Args:
        text_encoder: Encoder of texts.
        prompts: B prompts.
        encoder: Encoder of pictures; None for a network that takes none.
        sources: Pixels ``(B, 3, H, W)`` of each picture that the prompts edit; empty reads those of the prompts.
        latents: Whether ``sources`` are latents ``(B, C, ...)`` instead.

    Raises:
        InputError: If there are pictures, and ``encoder`` is None because the network takes none.
    """
    conditioning = encode_texts(text_encoder, prompts)
    edit = next((prompt for prompt in prompts if sources_of(prompt)), None)
    if edit is None:
        return conditioning
    if encoder is None:
        raise InputError(
            f"the prompt {str(edit)[:80]!r} edits a picture, but the network makes pictures from text alone; give a "
            "network that edits, or prompts without pictures"
        )
    device = conditioning.prompt_embeds.device
    found = sources if latents else encoder(prompts, sources)
    return replace(conditioning, source_latents=tuple(one.to(device) for one in found))
