"""Change of what an edit should leave alone, in latents and without a decoder."""

from torch import Tensor

from latentreward.core.errors import InputError


def unchanged_region_change(latents: Tensor, sources: Tensor, share: float = 0.5) -> Tensor:
    """Compute how much the least changed region of edits differs from the pictures that were edited.

    An edit of part of a picture leaves other places alone; where everything moves, the edit did more than it was asked
    to. At each place the change is the mean square of the difference over channels. The measure is the root mean of
    the smallest ``share`` of these: 0 if at least this share of the picture is unchanged. Scaled latents have a
    variance of about 1, so that two unrelated pictures are about 1 apart. An instruction that changes all places, such
    as one for the style, has a large value by right: compare results of one prompt.

    Args:
        latents: ``(N, C, ...)`` clean latents of the results; the measure is differentiable in them.
        sources: ``(N, C, ...)`` clean latents of the pictures that were edited, in the same size.
        share: Share of the places that an edit may be expected to leave alone, in (0, 1].

    Returns:
        ``(N,)`` float32, at least 0, in units of the latents.

    Raises:
        InputError: If results and sources have unlike sizes.
    """
    if latents.shape != sources.shape:
        raise InputError(
            f"edited latents {tuple(latents.shape[1:])} and those of their source {tuple(sources.shape[1:])} differ in "
            "size; set policy.source_size: made"
        )
    changes = (latents.float() - sources.float()).square().mean(dim=1).flatten(1)
    count = max(round(share * changes.shape[1]), 1)
    # The small constant keeps the gradient of the root finite where nothing has changed.
    return (changes.topk(count, dim=1, largest=False).values.mean(dim=1) + 1e-12).sqrt()
