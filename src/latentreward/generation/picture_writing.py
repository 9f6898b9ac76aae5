"""Sampling of images for prompts into a folder; images that are already there are skipped by the caller."""

from collections.abc import Callable, Sequence
from itertools import starmap

from torch import Tensor

from latentreward.contracts import PromptBatch
from latentreward.errors import InputError
from latentreward.generation.image_folder import ImageFolder
from latentreward.policies import Policy
from latentreward.rollout import Sampling
from latentreward.storage.progress import Progress

DETERMINISTIC = Sampling(eta=0.0, noise_level=0.0)
"""Sampling settings without noise in the steps, for DDIM and for flow matching."""

Name = tuple[int, int]
"""Index of a prompt, and number of an image of this prompt, both from 0."""


def write_pictures(
    folder: ImageFolder,
    texts: Sequence[str],
    missing: Sequence[Name],
    draw: Callable[[PromptBatch], tuple[Tensor, Tensor | None]],
    decode: Callable[[Tensor], Tensor],
    seed: int,
    batch_size: int,
    key: Callable[[int, int], str] = "{}/{}".format,
) -> None:
    """Sample, decode and write images; each batch is on disk before the next one is sampled.

    Args:
        folder: Folder that gets the images.
        texts: All prompts.
        missing: Images to make, as (index into ``texts``, number of the image).
        draw: Function that samples B prompts: finished latents ``(B, C, ...)``, and scores ``(N, B)`` of the N samples
            per prompt from which they were chosen, or None.
        decode: Function from latents to pixels in [-1, 1] on the CPU, see :meth:`ImageFolder.add`.
        seed: Seed written to the table.
        batch_size: Images sampled at once.
        key: Function from index of the prompt and number of the image to the key that seeds the noise of this image.
    """
    with Progress(folder.folder.name, len(missing), "pictures") as progress:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            prompts = PromptBatch(tuple(texts[index] for index, _ in batch), tuple(starmap(key, batch)))
            latents, scores = draw(prompts)
            folder.add(batch, prompts.prompts, decode(latents), scores, seed)
            progress.add(len(batch))


def decode_latents(policy: Policy, latents: Tensor) -> Tensor:
    """Decode latents to pixels ``(B, 3, H, W)``, or ``(B, 3, F, H, W)`` for clips, in [-1, 1] on the CPU.

    Raises:
        InputError: If the policy has no VAE.
    """
    if policy.vae is None:
        raise InputError(f"{policy.source} has no VAE to decode with")
    return policy.vae.decode(latents).cpu()
