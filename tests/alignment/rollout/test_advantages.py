"""Rewards relative to those of the same group (golden case 10 holds more)."""

import pytest
import torch

from latentreward.alignment import GDPO, GroupAdvantage, group_advantages


def test_spreads_by_hand() -> None:
    """Of two prompts with rewards 1, 3, 5 and 0, 6: means 3 and 3, all differ from 3 by 2, 0, 2, 3, 3."""
    rewards, groups = torch.tensor([1.0, 3.0, 5.0, 0.0, 6.0]), torch.tensor([0, 0, 0, 1, 1])
    for rule, spreads in (
        (GroupAdvantage(), [(8 / 3) ** 0.5] * 3 + [3.0] * 2),
        (GroupAdvantage(ddof=1), [2.0] * 3 + [18**0.5] * 2),
        (GroupAdvantage("all"), [(26 / 5) ** 0.5] * 5),
        (GroupAdvantage("none"), [1.0 - 1e-4] * 5),
    ):
        wanted = [one / (spread + 1e-4) for one, spread in zip([-2, 0, 2, -3, 3], spreads, strict=True)]
        assert rule(rewards, groups).tolist() == pytest.approx(wanted, rel=1e-5)
    candidates = group_advantages(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))  # of each state, by themselves
    torch.testing.assert_close(candidates, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), rtol=1e-3, atol=0)


def test_half_precision_scores_far_from_0() -> None:
    scores = torch.tensor([[1000.0], [1001.0]], dtype=torch.float16)
    assert group_advantages(scores).dtype == torch.float32
    torch.testing.assert_close(group_advantages(scores), torch.tensor([[-1.0], [1.0]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [0.1, 25.3, -1e4 / 3])
@pytest.mark.parametrize("samples", [2, 3, 7, 24])
def test_gdpo_of_equal_rewards_is_0(value: float, samples: int) -> None:
    """Exactly: a mean that is off by rounding would be divided by the least standard deviation, twice."""
    groups = torch.arange(2).repeat_interleave(samples)
    equal = torch.full((2 * samples, 2), value)
    assert not GDPO()(equal, groups).any()
    equal[:samples, 1] = torch.arange(float(samples))  # one reward of one prompt tells its samples apart
    advantages = GDPO()(equal, groups)
    assert advantages.isfinite().all()
    assert not advantages[samples:].abs().max() > 1e-6
    assert advantages[:samples].diff().min() > 0


def test_gdpo_of_a_group_of_one_is_0() -> None:
    rewards, alone = torch.randn(4, 2, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 0, 0, 1])
    advantages = GDPO([1.0, 0.5])(rewards, alone)
    assert advantages[3].abs() < 1e-6
    torch.testing.assert_close(advantages.std(correction=0), torch.tensor(1.0))
    assert not GDPO()(rewards, torch.arange(4)).any()
    assert not GDPO()(rewards[:1], alone[:1]).any()


def test_trim_leaves_the_least_and_the_largest_rewards_out_of_mean_and_spread() -> None:
    rewards = [9.0, 1.0, 100.0, 3.0, -50.0]
    advantages = GroupAdvantage(trim=0.2)(
        torch.tensor(rewards), torch.zeros(5, dtype=torch.int64)
    )  # of 1, 3 and 9: mean 13/3, variance 104/9
    assert advantages.tolist() == pytest.approx([(reward - 13 / 3) / ((104 / 9) ** 0.5 + 1e-4) for reward in rewards])


def test_a_trimmed_share_counts_as_it_is_written() -> None:
    rewards = torch.cat([torch.full((29,), -9.0), torch.zeros(42), torch.full((29,), 8.0)])  # 100 · 0.29 is 28.999…
    advantages = GroupAdvantage(std="none", trim=0.29)(rewards, torch.zeros(100, dtype=torch.int64))
    assert torch.equal(advantages, rewards)
