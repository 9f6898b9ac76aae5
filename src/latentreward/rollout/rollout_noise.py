"""Random numbers of a rollout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentreward.seeding import pair_generator


class RolloutDraws:
    """Random numbers that depend only on seed, a prompt's key and step, not on batch, rank or device.

    Args:
        seed: Seed of the run.
        keys: Keys of the B prompts; equal keys give equal numbers.
    """

    def __init__(self, seed: int, keys: Sequence[str]) -> None:
        self._seed, self._keys = seed, tuple(keys)

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal initial latents ``(B, *shape)``, float32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators("rollout start")])

    def noise(self, index: int, count: int, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal noise ``(count, B, *shape)`` for step ``index``, float32 on the CPU."""
        generators = self._generators("rollout noise", index)
        return torch.stack([torch.randn((count, *shape), generator=g) for g in generators], dim=1)

    def choice(self, index: int, count: int) -> Tensor:
        """Draw the index of one of ``count`` candidates per prompt after step ``index``: ``(B,)`` int64 on the CPU."""
        return torch.cat([torch.randint(count, (1,), generator=g) for g in self._generators("rollout choice", index)])

    def resampled(self, index: int, weights: Sequence[Tensor]) -> list[Tensor]:
        """Draw with replacement, in proportion to n weights, n indices per prompt after step ``index``.

        ``weights`` has ``(n,)`` on the CPU for each of the B prompts; n may differ.

        Returns:
            int64 indices ``(n,)`` for each prompt.
        """
        drawn = zip(weights, self._generators("rollout resampling", index), strict=True)
        return [torch.multinomial(part, len(part), replacement=True, generator=g) for part, g in drawn]

    def _generators(self, purpose: str, index: int = 0) -> list[torch.Generator]:
        return [pair_generator(self._seed, purpose, 0, key, f"step {index}") for key in self._keys]
