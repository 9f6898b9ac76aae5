"""Sampling of the images that a folder lacks, by the processes of a command."""

from collections.abc import Callable, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

from torch import Tensor

from latentreward.contracts import PromptBatch
from latentreward.errors import InputError
from latentreward.generation.image_folder import ImageFolder, Name, Row, write_images
from latentreward.policies import Policy
from latentreward.ranks.shared_work import SharedWork
from latentreward.rollout import Sampling
from latentreward.storage.progress import Progress

DETERMINISTIC = Sampling(eta=0.0, noise_level=0.0)
"""Sampling settings without noise in the steps, for DDIM and for flow matching."""


def write_batch(
    folder: Path,
    draw: Callable[[PromptBatch], tuple[Tensor, Tensor | None]],
    decode: Callable[[Tensor], Tensor],
    seed: int,
    batch: Sequence[Sequence[Any]],
    key: Callable[[int, int], str] = "{}/{}".format,
) -> list[Row]:
    """Sample, decode and write one batch of images; return their rows of the table.

    Args:
        folder: Folder that gets the images.
        draw: Function that samples B prompts: finished latents ``(B, C, ...)``, and scores ``(N, B)`` of the N samples
            per prompt from which they were chosen, or None.
        decode: Function from latents to pixels in [-1, 1] on the CPU, see :func:`write_images`.
        seed: Seed written to the table.
        batch: Images as [index of the prompt, number of the image, prompt].
        key: Function from index of the prompt and number of the image to the key that seeds the noise of this image.
    """
    names = [(place, image) for place, image, _ in batch]
    prompts = PromptBatch(tuple(prompt for _, _, prompt in batch), tuple(starmap(key, names)))
    latents, scores = draw(prompts)
    return write_images(folder, names, prompts.prompts, decode(latents), scores, seed)


def make_pictures(
    work: SharedWork, task: str, folder: ImageFolder, wanted: Sequence[Name], texts: Sequence[str], batch_size: int
) -> None:
    """Let the processes of a command make the missing ones of the ``wanted`` images, and add them to the folder.

    Wanted images are cut into batches, and then those that are there are left out: a run that goes on samples a batch
    together with the images that a run without a stop would sample it with, to the last bit. ``texts`` are the prompts
    by their index; the task is a :func:`write_batch`.
    """
    left = {*folder.missing(wanted, texts)}
    cut = (wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size))
    batches = ([[place, image, texts[place]] for place, image in batch if (place, image) in left] for batch in cut)
    with Progress(folder.folder.name, len(left), "pictures", processes=work.size) as progress:
        work.run(task, [batch for batch in batches if batch], folder.add, lambda batch: progress.add(len(batch)))


def decode_latents(policy: Policy, latents: Tensor) -> Tensor:
    """Decode latents to pixels ``(B, 3, H, W)``, or ``(B, 3, F, H, W)`` for clips, in [-1, 1] on the CPU.

    Raises:
        InputError: If the policy has no VAE.
    """
    if policy.vae is None:
        raise InputError(f"{policy.source} has no VAE to decode with")
    return policy.vae.decode(latents).cpu()
