import dataclasses

import pytest
import torch

from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.data import LoadedPair, collate_pairs


def item(number: int, label: float | None, keys: tuple[str, str] = ("a", "b")) -> LoadedPair:
    pair = PreferencePair(
        pair_id=f"pair-{number}",
        prompt=f"prompt {number}",
        image_a=ImageRef(keys[0]),
        image_b=ImageRef(keys[1]),
        label_a=label,
        weight=1 / (number + 1),
        votes=(3, 1),
    )
    pixels = {key: torch.full((3, 4, 4), float(sum(map(ord, key)))) for key in keys}
    return LoadedPair(pair, pixels[keys[0]], pixels[keys[1]])


def swap(loaded: LoadedPair) -> LoadedPair:
    return LoadedPair(loaded.pair.swapped(), loaded.pixels_b, loaded.pixels_a)


ITEMS = [
    item(0, 1.0),
    item(1, 0.0),
    item(2, 0.5, ("y", "x")),
    item(3, 0.25),
    item(4, None, ("q", "p")),
    item(5, 0.7, ("z", "c")),
    item(6, 0.5, ("same", "same")),
]


def test_better_image_becomes_chosen() -> None:
    batch = collate_pairs(ITEMS)
    torch.testing.assert_close(batch.label, torch.tensor([1, 1, 0.5, 0.75, 0.5, 0.7, 0.5]))
    assert batch.chosen_keys == ("a", "b", "x", "b", "p", "z", "same")
    assert batch.rejected_keys == ("b", "a", "y", "a", "q", "c", "same")
    assert batch.chosen[:, 0, 0, 0].tolist() == [float(sum(map(ord, key))) for key in batch.chosen_keys]
    assert batch.rejected[:, 0, 0, 0].tolist() == [float(sum(map(ord, key))) for key in batch.rejected_keys]
    torch.testing.assert_close(batch.weight, torch.tensor([1, 1 / 2, 1 / 3, 1 / 4, 0, 1 / 6, 1 / 7]))
    assert batch.label.dtype == batch.weight.dtype == torch.float32
    assert batch.latent_space is None


@pytest.mark.parametrize("which", [range(7), [0], [1], [2], [4], [2, 3, 5]])
def test_swapping_sides_of_the_source_changes_nothing(which) -> None:
    swapped = [swap(loaded) if number in which else loaded for number, loaded in enumerate(ITEMS)]
    before, after = collate_pairs(ITEMS), collate_pairs(swapped)
    for field in dataclasses.fields(before):
        first, second = getattr(before, field.name), getattr(after, field.name)
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second, field.name


def test_batch_moves_by_calling_to() -> None:
    assert collate_pairs(ITEMS).to(torch.float64).chosen.dtype == torch.float64
