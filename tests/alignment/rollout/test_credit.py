"""Credit of steps, and windows of steps with noise."""

import pytest
import torch

from latentreward.alignment import (
    DiversityAdvantage,
    GainCredit,
    MovingWindow,
    RandomWindow,
    Sampling,
    StateCredit,
    TurningPointCredit,
    WindowedSampler,
)
from latentreward.alignment.rollout.advantages import balance
from tests.alignment.rollout.tiny_rollout import tiny_policy


def rewards(rows: int = 5, states: int = 7) -> torch.Tensor:
    return torch.randn(rows, states, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_gains_add_up_to_the_whole() -> None:
    values = rewards()
    own, whole = GainCredit(0.0)(values), GainCredit(1.0)(values)
    torch.testing.assert_close(own.sum(dim=1), values[:, -1] - values[:, 0])
    torch.testing.assert_close(whole, values[:, -1:] - values[:, :-1])
    half = GainCredit(0.5)(values)
    torch.testing.assert_close(half[:, 0], (own * 0.5 ** torch.arange(6)).sum(dim=1))
    assert torch.equal(StateCredit()(values), values[:, :-1])


@pytest.mark.parametrize(
    "credit", [GainCredit(0.0), GainCredit(0.7), TurningPointCredit(), TurningPointCredit("gain", "total")]
)
def test_a_constant_reward_gives_no_credit(credit: GainCredit | TurningPointCredit) -> None:
    assert not credit(torch.full((3, 5), 2.5)).any()


def test_a_first_gain_of_one_sign_is_no_turning_point_elsewhere() -> None:
    credit = TurningPointCredit("gain", "total", weight=2.0)
    main, bonus = credit.parts(torch.tensor([[0.0, -1.0, 2.0, 3.0], [0.0, 1.0, 1.0, 2.0], [1.0, 2.0, 0.0, 1.0]]))
    assert main.tolist() == [[-1.0, 3.0, 1.0], [1.0, 0.0, 1.0], [1.0, -2.0, 1.0]]
    assert bonus.tolist() == [[0.0, 6.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_bonuses_are_balanced_among_the_steps_that_are_trained_on() -> None:
    credit = TurningPointCredit("gain", "total", balanced=True)
    rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, -1.0, -1.5, -2.0], [0.0, -3.0, 1.0, 9.0], [0.0] * 4]).double()
    _, bonus = credit.parts(rewards)
    assert bonus[:, 0].tolist() == [0.0, -2.0, 0.0, 0.0] and bonus[2, 1] == 9.0  # the largest of each sign
    own = rewards.diff(dim=1)
    torch.testing.assert_close(
        credit.of_steps(rewards, [0]), own[:, [0]] + torch.tensor([[3.0], [-2.0], [0.0], [0.0]]).double()
    )


def test_of_equal_bonuses_the_earlier_steps_stay() -> None:
    turning, bonus = torch.ones(1, 70, dtype=torch.bool), torch.ones(1, 70).double()
    bonus[0, 68:] = -1.0
    assert balance(turning, bonus).nonzero()[:, 1].tolist() == [0, 1, 68, 69]


def test_a_bonus_of_zero_has_no_sign() -> None:
    turning = torch.ones(1, 4, dtype=torch.bool)
    assert balance(turning, torch.tensor([[1.0, 0.0, -1.0, -2.0]])).nonzero()[:, 1].tolist() == [0, 3]


def starts(window: MovingWindow, steps: int, until: int) -> list[int]:
    return [window.start(steps, iteration, torch.Generator()) for iteration in range(until)]


def test_a_window_moves_and_is_never_empty() -> None:
    assert starts(MovingWindow(3, every=2, stride=2), 8, 10) == [0, 0, 2, 2, 4, 4, 5, 5, 0, 0]
    assert starts(MovingWindow(3, every=2, stride=2, restart=False), 8, 10) == [0, 0, 2, 2, 4, 4, 5, 5, 5, 5]
    assert starts(MovingWindow(8, every=1), 8, 4) == [0, 0, 0, 0]
    for steps in range(1, 9):
        for size in range(1, steps + 1):
            assert all(0 <= start <= steps - size for start in starts(MovingWindow(size, 1, 3), steps, 20))


def test_a_random_window_reaches_both_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    found = {RandomWindow(2).start(5, 0, generator) for _ in range(100)}
    assert found == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["sd15", "sd35_tiny"])
def test_steps_outside_a_window_are_those_without_noise(name: str) -> None:
    family = tiny_policy(name).family
    noisy, plain = Sampling(5).with_noise().sampler(family), Sampling(5).sampler(family)
    windowed = WindowedSampler(noisy, plain, [1, 2])
    assert (windowed.noise_std > 0).tolist() == [False, True, True, False, False]
    generator = torch.Generator().manual_seed(0)
    shape = (5, *Sampling().latent_shape(family))
    latents, output = (torch.randn(shape, generator=generator) for _ in range(2))
    found = windowed.transition(latents, output, noisy.timesteps)
    wanted = [plain, noisy, noisy, plain, plain]
    for row, sampler in enumerate(wanted):
        one = sampler.transition(latents[[row]], output[[row]], noisy.timesteps[[row]])
        torch.testing.assert_close(found.mean[[row]], one.mean)
        assert found.std[row].item() == pytest.approx(one.std.item() if sampler is noisy else 0.0)


def test_of_good_samples_the_lonely_one_counts_most() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.05]])
    scores, groups = torch.tensor([1.0, 1.0, 1.0, -3.0]), torch.zeros(4, dtype=torch.int64)
    found = DiversityAdvantage()(scores, groups, features)
    assert found[3].item() == -3.0
    assert found[2] > found[1] > 0
    assert torch.equal(DiversityAdvantage()(scores, groups, torch.ones(4, 2)), scores)
    assert not DiversityAdvantage()(scores, torch.arange(4), features).any()
