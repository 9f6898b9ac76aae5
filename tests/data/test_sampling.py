"""Which pairs meet in a step: equal shares, one size, none lost, and exact from any place on."""

from collections import Counter
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest

from latentreward.core.errors import InputError
from latentreward.data import PairBatchSampler
from latentreward.data.loading import ResumableLoader
from latentreward.data.sampling import BucketBatchSampler, EvaluationBatches, Sizing


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


MIX = [(8, 8)] * 41 + [(8, 16)] * 17 + [(16, 8)] * 3 + [(16, 16)] * 1


def ranks(sizes: Any, world: int, epoch: int = 0, **options: Any) -> list[list[list[int]]]:
    """Batches of every rank."""
    sizing = Sizing(**{"batch_size": 4, "world_size": world, **options})
    samplers = [BucketBatchSampler(np.array(sizes), sizing, rank) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
        assert len(sampler) == sampler.remaining()
    batches = [list(sampler) for sampler in samplers]
    assert {len(share) for share in batches} == {len(samplers[0])}
    return batches


@pytest.mark.parametrize("small", ["short", "fill", "drop"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_get_equal_shapes_and_counts_in_every_step(world: int, small: str) -> None:
    for step in zip(*ranks(MIX, world, small_buckets=small), strict=True):
        assert len({len(batch) for batch in step}) == 1
        assert len({MIX[pair] for batch in step for pair in batch}) == 1
        if small != "short":
            assert len(step[0]) == 4


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_short_and_fill_use_every_pair_and_repeat_only_what_they_must(world: int) -> None:
    short = Counter(pair for share in ranks(MIX, world) for batch in share for pair in batch)
    assert set(short) == set(range(len(MIX)))
    assert sum(short.values()) - len(MIX) == sum(-count % world for count in (41, 17, 3, 1))
    if world == 1:
        assert set(short.values()) == {1}
    fill = Counter(pair for share in ranks(MIX, world, small_buckets="fill") for batch in share for pair in batch)
    assert set(fill) == set(range(len(MIX)))
    assert sum(fill.values()) - len(MIX) == sum(-count % (4 * world) for count in (41, 17, 3, 1))


def test_drop_leaves_out_the_rest_of_each_size_and_other_pairs_every_epoch() -> None:
    seen = [{p for share in ranks(MIX, 2, epoch, small_buckets="drop") for b in share for p in b} for epoch in range(9)]
    assert all(len(epoch) == 40 + 16 for epoch in seen)
    assert set().union(*seen) == set(range(41 + 17))
    with pytest.raises(InputError, match=r"3 pairs in 1 sizes.*small_buckets=drop"):
        ranks([(8, 8)] * 3, 1, small_buckets="drop")


def test_sizes_are_interleaved_in_the_order_of_the_pairs() -> None:
    alternating = [(8, 8), (16, 16)] * 6
    in_order = ranks(alternating, 1, batch_size=2, shuffle=False)
    assert in_order == [[[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11]]]
    shuffled = [batch[0] % 2 for batch in ranks(alternating * 20, 1, batch_size=2)[0]]
    changes = sum(one != other for one, other in pairwise(shuffled))
    assert changes > 40  # of 119; sizes one after the other would change once


def test_fewer_pairs_than_one_batch() -> None:
    assert sorted(ranks([(8, 8)] * 3, 1)[0][0]) == [0, 1, 2]
    assert [len(share[0]) for share in ranks([(8, 8)] * 3, 2)] == [2, 2]
    assert ranks([(8, 8)], 3) == [[[0]], [[0]], [[0]]]
    assert ranks([(8, 8)], 1, small_buckets="fill") == [[[0, 0, 0, 0]]]


def test_a_new_order_every_epoch_the_same_for_every_split_into_ranks() -> None:
    first, second = ranks(MIX, 1), ranks(MIX, 1, epoch=1)
    assert first != second
    assert first == ranks(MIX, 1)
    assert first != ranks(MIX, 1, seed=1)
    one = [set(batch) for batch in ranks([(8, 8)] * 40, 1, batch_size=8)[0]]
    two = [set(a) | set(b) for a, b in zip(*ranks([(8, 8)] * 40, 2, batch_size=4), strict=True)]
    assert one == two


def test_one_size_gives_the_batches_of_the_loader_of_images() -> None:
    sampler = PairBatchSampler(37, 4, seed=5)
    sampler.set_epoch(3)
    assert ranks([(8, 8)] * 37, 1, epoch=3, seed=5) == [list(sampler)]


def test_unshuffled_pairs_stand_as_the_rows_do() -> None:
    assert ranks([(8, 8)] * 3 + [(8, 16)] * 2, 1, batch_size=2, shuffle=False) == [[[0, 1], [2], [3, 4]]]


def test_batches_follow_a_token_budget() -> None:
    batches = ranks([(8, 8)] * 40 + [(16, 16)] * 8 + [(64, 64)] * 2, 1, tokens_per_batch=1024)[0]
    sizes = Counter(len(batch) for batch in batches)
    assert sizes == {16: 2, 8: 1, 4: 2, 1: 2}


@pytest.mark.parametrize("small", ["short", "fill", "drop"])
def test_a_resumed_epoch_goes_on_where_it_was(small: str) -> None:
    sizing = Sizing(4, small_buckets=small, world_size=2)
    whole = list(sampler_at(sizing, epoch=2))
    for taken in range(len(whole) + 1):
        resumed = BucketBatchSampler(np.array(MIX), sizing)
        resumed.load_state_dict(sampler_at(sizing, epoch=2).state_dict(taken))
        resumed.set_epoch(2)
        assert list(resumed) == whole[taken:]
        assert (len(resumed), resumed.remaining()) == (len(whole), len(whole) - taken)
        assert resumed.state_dict(0) == sampler_at(sizing, epoch=2).state_dict(taken)
        resumed.set_epoch(3)
        assert list(resumed) == list(sampler_at(sizing, epoch=3))


def sampler_at(sizing: Sizing, epoch: int) -> BucketBatchSampler:
    sampler = BucketBatchSampler(np.array(MIX), sizing)
    sampler.set_epoch(epoch)
    return sampler


def test_resume_under_other_sizings_uses_what_is_left_and_nothing_else() -> None:
    sizings = [Sizing(4, world_size=2), Sizing(3, world_size=1), Sizing(2, world_size=3), Sizing(4, world_size=2)]
    used: list[int] = []
    state: dict[str, Any] = {"epoch": 1, "pairs": len(MIX), "spans": []}
    for number, sizing in enumerate(sizings):
        samplers = [BucketBatchSampler(np.array(MIX), sizing, rank) for rank in range(sizing.world_size)]
        for sampler in samplers:
            sampler.load_state_dict(state)
        assert samplers[0].remaining() <= len(samplers[0])
        shares = [list(sampler) for sampler in samplers]
        taken = len(shares[0]) if number == len(sizings) - 1 else 3
        fresh = {pair for share in shares for batch in share[:taken] for pair in batch}
        assert not fresh & set(used)
        assert {pair for share in shares for batch in share for pair in batch} | set(used) == set(range(len(MIX)))
        used += fresh
        state = samplers[0].state_dict(taken)
        assert all(sampler.state_dict(taken) == state for sampler in samplers)
    assert set(used) == set(range(len(MIX)))


def test_a_place_in_an_epoch_of_other_data_is_refused() -> None:
    state = sampler_at(Sizing(4), epoch=0).state_dict(1)
    with pytest.raises(InputError, match="go on with the data it was trained on"):
        BucketBatchSampler(np.array(MIX[:-1]), Sizing(4)).load_state_dict(state)
    BucketBatchSampler(np.array(MIX[:-1]), Sizing(4)).load_state_dict(sampler_at(Sizing(4), 0).state_dict(0))


@pytest.mark.parametrize("turn", [1, -1])
def test_a_place_among_batches_of_another_kind_is_refused(turn: int) -> None:
    """As where ``sources: ignore`` is set for the rest of a run over unlike numbers of pictures, or left out."""
    samplers = BucketBatchSampler(np.array(MIX), Sizing(4)), PairBatchSampler(len(MIX), 4)
    saved, resumed = (ResumableLoader(MIX, sampler, collate_fn=list) for sampler in samplers[::turn])
    told = r"^data\.train: .* in another way .* sources as in its training, or start anew$"
    with pytest.raises(InputError, match=told):
        resumed.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_evaluation_takes_every_pair_once_in_equally_many_batches(world: int, batch_size: int) -> None:
    shares = [list(EvaluationBatches(np.array(MIX), Sizing(batch_size, world_size=world), r)) for r in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(pair for share in shares for batch in share for pair in batch) == list(range(len(MIX)))
    for share in shares:
        for batch in share:
            assert len({MIX[pair] for pair in batch}) == 1
            assert len(batch) <= max(batch_size, 2)


def test_evaluation_says_when_pairs_cannot_be_shared_out() -> None:
    with pytest.raises(InputError, match="3 pairs of 3 sizes cannot be dealt out to 2 ranks"):
        EvaluationBatches(np.array([(8, 8), (8, 16), (16, 16)]), Sizing(4, world_size=2))
