"""Random numbers belong to a pair and an image: not to a batch, an order, a side or a global generator."""

import pytest
import torch

from latentreward.core.contracts import PreferenceBatch
from latentreward.diffusion import FlowMatching, UniformSigma
from latentreward.reward.modules.reward import PairDraws
from tests.alignment.modules.batches import exchanged, pixel_batch, rows

PROCESS = FlowMatching()
SHAPE = (4, 3, 3)


def draw(batch: PreferenceBatch, per_image: bool, seed: int = 0, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = PairDraws(batch, seed, epoch)
    return draws.normal("noise", SHAPE, per_image), draws.timesteps(UniformSigma(), PROCESS, per_image)


@pytest.mark.parametrize("per_image", [False, True])
def test_batch_order_and_global_state_do_not_matter(per_image: bool) -> None:
    batch = pixel_batch()
    noise, timesteps = draw(batch, per_image)
    torch.rand(13)
    order = [4, 1, 5]
    part, part_timesteps = draw(rows(batch, order), per_image)
    expected = [*order, *(len(batch) + index for index in order)]
    torch.testing.assert_close(part, noise[expected], rtol=0, atol=0)
    torch.testing.assert_close(part_timesteps, timesteps[expected], rtol=0, atol=0)


@pytest.mark.parametrize("per_image", [False, True])
def test_numbers_follow_the_image_when_sides_change(per_image: bool) -> None:
    batch = pixel_batch()
    noise, timesteps = draw(batch, per_image)
    turned, turned_timesteps = draw(exchanged(batch), per_image)
    torch.testing.assert_close(torch.cat(turned.chunk(2)[::-1]), noise, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(turned_timesteps.chunk(2)[::-1]), timesteps, rtol=0, atol=0)


def test_shared_or_own_numbers() -> None:
    batch = pixel_batch()
    for per_image in (False, True):
        for numbers in draw(batch, per_image):
            chosen, rejected = numbers.chunk(2)
            assert torch.equal(chosen, rejected) is not per_image


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_everything(change: dict[str, int]) -> None:
    batch = pixel_batch()
    for first, second in zip(draw(batch, True), draw(batch, True, **change), strict=True):
        assert (first != second).float().mean() > 0.9


def test_an_image_against_itself_has_one_noise() -> None:
    batch = pixel_batch(2)
    same = PreferenceBatch(**{**vars(batch), "rejected_keys": batch.chosen_keys})
    chosen, rejected = PairDraws(same, 0, 0).normal("noise", SHAPE, True).chunk(2)
    torch.testing.assert_close(chosen, rejected, rtol=0, atol=0)


def test_purposes_pairs_and_images_are_independent() -> None:
    batch = pixel_batch()
    draws = PairDraws(batch, 0, 0)
    noise, posterior = draws.normal("noise", (2000,), True), draws.normal("posterior", (2000,), True)
    table = torch.cat([noise, posterior])
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    assert correlation.abs().max() < 0.1
    assert noise.mean().abs() < 0.03
    assert noise.std().item() == pytest.approx(1, abs=0.03)
