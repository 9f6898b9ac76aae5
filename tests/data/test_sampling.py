from itertools import chain

import pytest

from latentreward.data import PairSampler
from latentreward.data.sampling import even_batch_size


def shares(rows: int, world: int, epoch: int = 0, **options) -> list[list[int]]:
    samplers = [PairSampler(rows, num_replicas=world, rank=rank, **options) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    orders = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(order) for order in orders]
    return orders


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_interleave_to_one_order(world: int) -> None:
    (whole,) = shares(48, 1, epoch=3, shuffle=True, seed=5)
    parts = shares(48, world, epoch=3, shuffle=True, seed=5, drop_last=True)
    assert list(chain.from_iterable(zip(*parts, strict=True))) == whole
    assert sorted(whole) == list(range(48))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    (first,) = shares(40, 1, 0, shuffle=True, seed=1)
    assert shares(40, 1, 0, shuffle=True, seed=1) == [first]
    assert shares(40, 1, 1, shuffle=True, seed=1) != [first]
    assert shares(40, 1, 0, shuffle=True, seed=2) != [first]
    assert shares(40, 1, 7) == [list(range(40))]


@pytest.mark.parametrize("rows", [7, 8, 9])
def test_evaluation_sees_each_row_once_and_training_is_even(rows: int) -> None:
    assert sorted(chain(*shares(rows, 4))) == list(range(rows))
    even = shares(rows, 4, shuffle=True, drop_last=True)
    assert {len(part) for part in even} == {rows // 4}
    assert len(set(chain(*even))) == rows - rows % 4


def test_ranks_run_equally_many_evaluation_batches() -> None:
    for rows in range(2, 200):
        for world in (1, 2, 3, 8):
            for batch_size in (1, 2, 5, 16):
                if rows < world:
                    continue
                size = even_batch_size(rows, world, batch_size)
                counts = {-(-len(range(rank, rows, world)) // size) for rank in range(world)}
                assert len(counts) == 1, (rows, world, batch_size, size)
    assert even_batch_size(500, 8, 16) == 16
    assert even_batch_size(65, 4, 16) == 15
    assert even_batch_size(64, 4, 16) == 16
