"""Prompts to pictures in a folder, those that are missing only."""

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

Name = tuple[int, int]
"""Place of a prompt, number of a picture of it."""


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
    """Sample, decode and write pictures; each batch is on disk before the next begins.

    Args:
        folder: Where pictures go.
        texts: All prompts, by place.
        missing: Pictures to make.
        draw: Finished latents ``(B, C, ...)`` of B prompts, and scores ``(N, B)`` of the samples they were chosen from.
        decode: Latents to pixels ``(B, 3, H, W)`` in [-1, 1] on the CPU.
        seed: Noted in the table.
        batch_size: Pictures sampled at once.
        key: Name, of place and number, under which the noise of a picture is drawn.
    """
    with Progress(folder.folder.name, len(missing), "pictures") as progress:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            prompts = PromptBatch(tuple(texts[place] for place, _ in batch), tuple(starmap(key, batch)))
            latents, scores = draw(prompts)
            folder.add(batch, prompts.prompts, decode(latents), scores, seed)
            progress.add(len(batch))


def decode_latents(policy: Policy, latents: Tensor) -> Tensor:
    """Pixels ``(B, 3, H, W)`` in [-1, 1] on the CPU.

    Raises:
        InputError: If the policy has no VAE.
    """
    if policy.vae is None:
        raise InputError(f"{policy.source} has no VAE to decode with")
    return policy.vae.decode(latents).cpu()
