"""Pictures that prompts edit: sizes that pipelines give them, and latents that editors take beside the noisy ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import Conditioning, EditPrompt, ImageRef, sources_of
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import size_and_time
from latentreward.data import ImageError, PixelLoader, decode_image
from latentreward.data.images import MAX_PIXELS, grey_picture, read_header, to_pixels
from latentreward.diffusion.encoders.prompts import PromptEncoder, encode_texts
from latentreward.diffusion.encoders.vae import LatentEncoder

KEPT = 512  # number of pictures whose latents are kept: of 1024² pixels in 16 channels, 0.5 GB of CPU memory


class SourceSize(NamedTuple):
    """Size that a pipeline gives to a picture that it edits.

    Attributes:
        resized: (height, width) in pixels to which the whole picture is resized.
        cropped: (height, width) of the centre that is then kept; None for all.
    """

    resized: tuple[int, int]
    cropped: tuple[int, int] | None = None


@contextmanager
def reading_pictures() -> Iterator[None]:
    """Tell what to do about a picture of a list of prompts that cannot be read; raises ImageError."""
    try:
        yield
    except ImageError as error:
        told = f"picture to edit of a prompt: {error}; replace the file, or leave its rows out of the prompts"
        raise ImageError(told, error.problem) from error


def resized_picture(image: ImageRef, size: Callable[[int, int], SourceSize]) -> Image.Image:
    """Decode a picture, and resize and crop it as ``size``, a function of height and width, says.

    Raises:
        ImageError: If the picture cannot be read.
    """
    decoded = decode_image(image, image.max_pixels or MAX_PIXELS, image.exif)
    resized, cropped = size(decoded.height, decoded.width)
    decoded = decoded.resize(resized[::-1], Image.Resampling.LANCZOS)
    if cropped is not None:
        top, left = (resized[0] - cropped[0]) // 2, (resized[1] - cropped[1]) // 2
        decoded = decoded.crop((left, top, left + cropped[1], top + cropped[0]))
    return decoded


def picture_sides(image: ImageRef) -> tuple[int, int]:
    """Return (height, width) of a picture in pixels from its header; raise ImageError if it cannot be read."""
    return read_header(image, image.max_pixels or MAX_PIXELS, image.exif)[:2]


class SourceEncoder:
    """Encoder of pictures that prompts edit into clean latents: the mode of the VAE's posterior.

    Pictures are encoded one by one, so that the last bits of a picture's latents do not depend on the batch. The
    latents of the last :data:`KEPT` pictures that were read are kept in CPU memory.

    Args:
        vae: Encoder of the network's latent space.
        size: Function that returns the pipeline's size for a picture of (height, width) pixels.

    Attributes:
        loader: Decoder that resizes every picture to the size of the pictures that are made, as editors are trained;
            None resizes each as the pipeline does.
    """

    def __init__(self, vae: LatentEncoder, size: Callable[[int, int], SourceSize]) -> None:
        self.vae, self.size = vae, size
        self.loader: PixelLoader | None = None
        self._kept: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def resize_to(self, height: int, width: int) -> None:
        """Resize every picture, around its centre, to ``height`` × ``width`` pixels."""
        self.loader = PixelLoader(height, width, "center_crop", exif="apply")

    def check_sizes(self, prompts: Sequence[str], setting: str) -> None:
        """Raise InputError if pictures at one place of prompts of a ``setting`` are resized to unlike sizes."""
        if self.loader is not None:
            return
        for images in zip(*map(sources_of, prompts), strict=True):
            found: dict[tuple[int, int], str] = {}
            for image in images:
                resized, cropped = self.size(*picture_sides(image))
                found.setdefault(cropped or resized, image.image_key)
            if len(found) > 1:
                two = [f"{name!r} {height}×{width}" for (height, width), name in found.items()][:2]
                raise InputError(
                    f"{setting}: source_size: pipeline makes {' and '.join(two)} pixels; rows of a batch have one "
                    "size: set policy.source_size: made, or give pictures of one size"
                )

    def pixels(self, image: ImageRef) -> Tensor:
        """Decode and resize a picture to pixels ``(3, H, W)`` in [-1, 1].

        Raises:
            ImageError: If the picture cannot be read.
            InputError: If the pipeline refuses a picture of this size.
        """
        if self.loader is not None:
            return replace(self.loader, max_pixels=image.max_pixels or self.loader.max_pixels)(image)
        return to_pixels(resized_picture(image, self.size))

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        device = next(self.vae.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.vae.encode(pixels[None].to(device))[0]

    def key(self, image: ImageRef) -> tuple[Any, ...]:
        """Return a key of a picture's latents, without its bytes; a file that is written again has another."""
        return image.identity, image.path and size_and_time(image.path), self.loader

    @torch.inference_mode(False)  # what is kept may become part of a graph later
    def latents(self, image: ImageRef) -> Tensor:
        """Return a picture's latents ``(C, ...)`` on the CPU."""
        key = self.key(image)
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._kept[key] = self._encode(self.pixels(image)).cpu()
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]

    def __call__(self, prompts: Sequence[str], pixels: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Return the latents ``(B, C, ...)`` of each picture that B prompts edit, in the order of the pictures.

        Args:
            prompts: B prompts with equally many pictures.
            pixels: Pixels ``(B, 3, H, W)`` of each picture, resized; empty reads those of the prompts.

        Raises:
            InputError: If the prompts have unlike numbers of pictures, or pictures at one place have unlike sizes.
        """
        if pixels:
            return tuple(torch.stack([*map(self._encode, place)]) for place in pixels)
        rows = [sources_of(prompt) for prompt in prompts]
        if len(counts := {len(row) for row in rows}) > 1:
            few, many = min(counts), max(counts)
            raise InputError(f"prompts that edit {few} and {many} pictures are in one batch; give lists of one number")
        found = []
        for images in zip(*rows, strict=True):
            latents = [*map(self.latents, images)]
            if len({one.shape for one in latents}) > 1:
                raise InputError(
                    "pictures to edit of unlike sizes are in one batch; set source_size: made, or one prompt at a time"
                )
            found.append(torch.stack(latents))
        return tuple(found)


def edit_of_grey(text: str = "", number: int = 1) -> EditPrompt:
    """Return a prompt that edits ``number`` grey pictures, to try a network that edits."""
    return EditPrompt(text, [grey_picture()] * number)


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
