import itertools

import pytest
import torch

from latentreward.core.running import coin_flips, pair_generator


def draw(*args: object) -> list[float]:
    return torch.rand(4, generator=pair_generator(*args)).tolist()


def test_equal_arguments_give_equal_draws_whatever_the_global_state() -> None:
    torch.manual_seed(1)
    first = draw(3, "noise", 2, "pair")
    torch.manual_seed(99)
    assert draw(3, "noise", 2, "pair") == first


@pytest.mark.parametrize(
    "other", [(4, "noise", 2, "pair"), (3, "side", 2, "pair"), (3, "noise", 1, "pair"), (3, "noise", 2, "other")]
)
def test_each_argument_matters(other: tuple) -> None:
    assert draw(*other) != draw(3, "noise", 2, "pair")


def test_names_do_not_run_into_each_other() -> None:
    names = [("a", None), ("a", ""), ("a", "b"), ("ab", ""), ("", "ab"), ('a","b', None), ("a", "None"), ("a", "null")]
    draws = [tuple(draw(0, "noise", 0, *name)) for name in names]
    assert len(set(draws)) == len(names)
    assert draw(1, "x", 12, "p") != draw(11, "x", 2, "p")


def test_draws_are_pinned() -> None:
    """Numbers of a run may change only knowingly: they decide whether a run can be repeated."""
    assert pair_generator(0, "noise", 0, "a").initial_seed() == 2916922524763060755
    assert 0 <= pair_generator(-1, "ü", 10**9, "\n", "k").initial_seed() < 2**63


def test_draws_look_uniform_over_pairs() -> None:
    draws = torch.tensor(
        [draw(0, "timestep", epoch, f"{i}")[0] for epoch, i in itertools.product(range(2), range(2000))]
    )
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(draws.view(2, -1))[0, 1]) < 0.07


def test_coins_are_the_first_draws_of_the_pairs_generators() -> None:
    names = ["", "a", 'a","b', "ü\n", *map(str, range(60))]
    drawn = [bool(torch.randint(2, (), generator=pair_generator(7, "side", 3, name))) for name in names]
    assert coin_flips(7, "side", 3, names) == drawn
    assert 10 < sum(drawn) < 54
