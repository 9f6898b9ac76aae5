from itertools import chain

import pytest

from latentreward.core.errors import InputError
from latentreward.data import PairBatchSampler


def samplers(rows: int, batch_size: int, world: int, epoch: int = 0, **options) -> list[PairBatchSampler]:
    ranks = [PairBatchSampler(rows, batch_size, num_replicas=world, rank=rank, **options) for rank in range(world)]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    return ranks


def steps(ranks: list[PairBatchSampler]) -> list[set[int]]:
    """Pairs that meet in each step; ranks must agree on the number of steps and on the size of each."""
    batches = [list(sampler) for sampler in ranks]
    assert {len(part) for part in batches} == {ranks[0].remaining()}
    assert all(len(set(map(len, step))) == 1 for step in zip(*batches, strict=True))
    return [set(chain(*step)) for step in zip(*batches, strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_same_pairs_meet_for_every_split_of_a_global_batch(world: int) -> None:
    whole = steps(samplers(60, 12, 1, epoch=3, seed=5))
    assert steps(samplers(60, 12 // world, world, epoch=3, seed=5)) == whole
    assert sorted(chain(*whole)) == list(range(60))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(epoch: int, **options) -> list[int]:
        return list(chain(*samplers(40, 7, 1, epoch, **options)[0]))

    first = order(0, seed=1)
    assert order(0, seed=1) == first
    assert order(1, seed=1) != first
    assert order(0, seed=2) != first
    assert order(7, shuffle=False) == list(range(40))


@pytest.mark.parametrize("rows", [7, 8, 9])
def test_ranks_get_equally_many_pairs_to_train_on(rows: int) -> None:
    assert sum(map(len, steps(samplers(rows, 3, 4)))) == rows - rows % 4


@pytest.mark.parametrize(("batch_size", "world"), [(4, 2), (8, 1), (2, 4), (4, 1), (3, 2), (1, 3)])
def test_an_epoch_goes_on_with_the_unused_pairs_under_any_sizing(batch_size: int, world: int) -> None:
    before = samplers(50, 4, 2, epoch=2, seed=9)
    used = steps(before)[:3]
    states = [sampler.state_dict(3) for sampler in before]
    assert states[0] == states[1]
    after = samplers(50, batch_size, world, seed=9)
    for sampler in after:
        assert len(sampler) == -(-(50 // world) // batch_size)
        sampler.load_state_dict(states[0])
        sampler.set_epoch(2)
        assert len(sampler) == -(-(50 // world) // batch_size)
    rest = steps(after)
    seen = [*chain(*used), *chain(*rest)]
    assert len(seen) == len(set(seen)) >= 50 - world + 1
    again = samplers(50, 4, 2, seed=9)  # a second stop in the same epoch
    for sampler in again:
        sampler.load_state_dict(after[0].state_dict(1))
        assert sampler.epoch == 2
    assert list(chain(*steps(again)))[:1]
    assert not set(chain(*steps(again))) & {*chain(*used), *rest[0]}


def test_state_at_the_end_of_an_epoch_leaves_nothing_and_the_next_epoch_is_whole() -> None:
    (sampler,) = samplers(50, 4, 1)
    (fresh,) = samplers(50, 4, 1)
    sampler.load_state_dict(fresh.state_dict(13))
    assert list(sampler) == []
    assert sampler.remaining() == 0
    sampler.set_epoch(1)
    assert len(list(sampler)) == 13
    (single,) = samplers(50, 1, 1)
    single.load_state_dict(fresh.state_dict(13))  # the last batch had 2 of 4 rows
    assert single.remaining() == 0


def test_state_of_other_data_is_refused() -> None:
    (sampler,) = samplers(50, 4, 1)
    with pytest.raises(InputError, match=r"data\.train has 50 pairs, but the checkpoint stopped in an epoch of 51"):
        sampler.load_state_dict({"epoch": 0, "used": 8, "rows": 51})


@pytest.mark.parametrize(
    ("other", "message"),
    [({"seed": 7}, "data.seed. is 7, but 0 in the ch"), ({"shuffle": False}, "data.shuffle is False, but True in the")],
)
def test_state_of_another_order_is_refused(other: dict[str, int], message: str) -> None:
    state = PairBatchSampler(50, 4).state_dict(2)
    resumed = PairBatchSampler(50, 4, **other)
    with pytest.raises(InputError, match=message):
        resumed.load_state_dict(state)
