"""Random numbers of a batch of pairs, from one seeded generator per pair."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from latentreward.contracts import PreferenceBatch
from latentreward.noise import LevelSampler, NoiseProcess
from latentreward.seeding import pair_generator


class PairDraws:
    """Random numbers for a batch of pairs that depend only on seed, epoch, purpose, pair and, if asked for, image.

    Results therefore depend neither on the number of processes or workers nor on where a run was resumed.

    Args:
        batch: The pairs.
        seed: Seed of the run.
        epoch: Epoch number; validation uses 0.
    """

    def __init__(self, batch: PreferenceBatch, seed: int, epoch: int) -> None:
        self.batch, self.seed, self.epoch = batch, seed, epoch

    def _generators(self, purpose: str, keys: Sequence[str | None] | None) -> list[Generator]:
        if keys is None:
            keys = [None] * len(self.batch)
        return [
            pair_generator(self.seed, purpose, self.epoch, pair_id, key)
            for pair_id, key in zip(self.batch.pair_ids, keys, strict=True)
        ]

    def _sides(self, per_image: bool) -> list[Sequence[str] | None]:
        return [self.batch.chosen_keys, self.batch.rejected_keys] if per_image else [None]

    def normal(self, purpose: str, shape: Sequence[int], per_image: bool) -> Tensor:
        """Draw standard normal numbers ``(2B, *shape)`` on the CPU, chosen images first.

        Numbers for different purposes are independent. With ``per_image`` the two images of a pair get different ones.
        """
        sides = [
            torch.stack([torch.randn(*shape, generator=generator) for generator in self._generators(purpose, keys)])
            for keys in self._sides(per_image)
        ]
        return torch.cat([sides[0], sides[-1]])

    def timesteps(self, sampler: LevelSampler, process: NoiseProcess, per_image: bool) -> Tensor:
        """Draw timesteps ``(2B,)`` on the CPU, chosen images first; ``per_image`` as in :meth:`normal`."""
        sides = [
            torch.cat([sampler.draw(generator, process) for generator in self._generators("timestep", keys)])
            for keys in self._sides(per_image)
        ]
        return torch.cat([sides[0], sides[-1]])
