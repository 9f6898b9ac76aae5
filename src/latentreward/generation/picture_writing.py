"""Sampling of images for prompts into a folder; images that are already there are skipped by the caller."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from torch import Tensor

from latentreward.contracts import PromptBatch
from latentreward.errors import InputError
from latentreward.generation.image_folder import ImageFolder, Row, write_images
from latentreward.policies import Policy
from latentreward.ranks.shared_work import SharedWork
from latentreward.rollout import Sampling
from latentreward.storage.progress import Progress

DETERMINISTIC = Sampling(eta=0.0, noise_level=0.0)
"""Sampling settings without noise in the steps, for DDIM and for flow matching."""

Name = tuple[int, int]
"""Index of a prompt, and number of an image of this prompt, both from 0."""


@dataclass(frozen=True)
class PictureWriting:
    """Sampling, decoding and writing of batches of images.

    Attributes:
        folder: Folder that gets the images.
        draw: Function that samples B prompts: finished latents ``(B, C, ...)``, and scores ``(N, B)`` of the N samples
            per prompt from which they were chosen, or None.
        decode: Function from latents to pixels in [-1, 1] on the CPU, see :func:`write_images`.
        seed: Seed written to the table.
        key: Function from index of the prompt and number of the image to the key that seeds the noise of this image.
    """

    folder: Path
    draw: Callable[[PromptBatch], tuple[Tensor, Tensor | None]]
    decode: Callable[[Tensor], Tensor]
    seed: int
    key: Callable[[int, int], str] = "{}/{}".format

    def write(self, batch: Sequence[Sequence[Any]]) -> list[Row]:
        """Make one batch of images, given as (index of the prompt, number of the image, prompt); return their rows."""
        names = [(place, image) for place, image, _ in batch]
        prompts = PromptBatch(tuple(prompt for _, _, prompt in batch), tuple(starmap(self.key, names)))
        latents, scores = self.draw(prompts)
        return write_images(self.folder, names, prompts.prompts, self.decode(latents), scores, self.seed)


def picture_batches(
    wanted: Sequence[Name], missing: Sequence[Name], texts: Sequence[str], batch_size: int
) -> list[list[list[Any]]]:
    """Cut the missing images into batches, each image as [index of the prompt, number of the image, prompt].

    Wanted images are cut, and then those that are there are left out: a run that goes on samples a batch together with
    the images that a run without a stop would sample it with, to the last bit.
    """
    left = {*missing}
    cut = (wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size))
    batches = ([[place, image, texts[place]] for place, image in batch if (place, image) in left] for batch in cut)
    return [batch for batch in batches if batch]


def make_pictures(work: SharedWork, task: str, batches: Sequence[list[list[Any]]], folder: ImageFolder) -> None:
    """Let the processes of a command make images, and add them to the folder's table."""

    def keep(found: Sequence[tuple[Any, list[Row]]]) -> None:
        folder.record([row for _, rows in found for row in rows])

    with Progress(folder.folder.name, sum(map(len, batches)), "pictures", processes=work.size) as progress:
        work.run(task, batches, keep, lambda batch: progress.add(len(batch)))


def left_over_rows(work: SharedWork, task: str) -> list[Row]:
    """List the rows of images that a killed run made but did not add to the table."""
    return [row for _, rows in work.left_over(task) for row in rows]


def decode_latents(policy: Policy, latents: Tensor) -> Tensor:
    """Decode latents to pixels ``(B, 3, H, W)``, or ``(B, 3, F, H, W)`` for clips, in [-1, 1] on the CPU.

    Raises:
        InputError: If the policy has no VAE.
    """
    if policy.vae is None:
        raise InputError(f"{policy.source} has no VAE to decode with")
    return policy.vae.decode(latents).cpu()
