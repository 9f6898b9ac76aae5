"""Pairs decoded under `on_error`, and their collation to chosen and rejected images."""

import dataclasses
import json

import pytest
import torch

from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.data import (
    ImageError,
    JSONLPairReader,
    LoadedPair,
    PairDataset,
    PickAPicReader,
    PixelLoader,
    SkippedPair,
    collate_pairs,
)
from latentreward.data.clips import ClipLoader
from tests.data.skipped_rows import skipped_rows
from tests.processes import FORKS

LOADER = PixelLoader(16, 16)


def corrupt(rows: list[dict], jpeg) -> list[dict]:
    changes = [{"jpg_0": None}, {"jpg_1": b""}, {"jpg_0": b"garbage"}, {"jpg_1": jpeg(size=(300, 300))[:-200]}, {}]
    return [{**row, **change} for row, change in zip(rows, changes, strict=True)]


@pytest.fixture
def source(write_pickapic, pickapic_rows, jpeg) -> str:
    return write_pickapic(corrupt([pickapic_rows(n) for n in range(5)], jpeg))


def test_raise_names_the_row_the_value_and_the_remedy(source) -> None:
    dataset = PairDataset(PickAPicReader(source, "train"), LOADER)
    with pytest.raises(ImageError, match=r"parquet:1: image 'image-1-1': empty image \(0 bytes\); replace .*on_error"):
        dataset[1]
    assert isinstance(dataset[4], LoadedPair)


def test_skip_leaves_out_exactly_the_bad_rows_and_counts_them(source) -> None:
    dataset = PairDataset(PickAPicReader(source, "train", on_error="skip"), LOADER)
    for _ in range(2):  # a row is counted once, however often it is seen
        items = [dataset[n] for n in range(5)]
    assert [type(item) for item in items] == [SkippedPair] * 4 + [LoadedPair]
    assert skipped_rows(dataset) == [0, 1, 2, 3]
    assert dataset.skipped() == {
        "no image": 1,
        "empty image": 1,
        "unknown image format": 1,
        "truncated or damaged image": 1,
    }
    assert collate_pairs(items).pair_ids == (items[4].pair.pair_id,)


def test_placeholder_keeps_the_place_without_a_say(source) -> None:
    dataset = PairDataset(PickAPicReader(source, "train", on_error="placeholder"), LOADER)
    batch = collate_pairs([dataset[n] for n in range(5)])
    assert len(batch) == 5
    assert batch.label.tolist() == [0.5] * 4 + [1.0]
    assert batch.weight.tolist() == [0.0] * 4 + [1.0]
    assert (batch.chosen[:4] == 0).all()
    assert dataset.skipped().total() == 4


def test_a_batch_of_bad_rows_only_is_one_pair_that_counts_nowhere(source) -> None:
    dataset = PairDataset(PickAPicReader(source, "train", on_error="skip"), LOADER)
    batch = collate_pairs([dataset[n] for n in range(4)])
    assert (len(batch), batch.label.item(), batch.weight.item()) == (1, 0.5, 0.0)
    assert dataset.skipped().total() == 4
    with pytest.raises(ImageError, match=r"no pair of this batch can be read: .*parquet:0: .*parquet:2: .*on_error"):
        collate_pairs([dataset[n] for n in range(4)], blanks=False)


def test_files_that_are_lost_end_the_run(source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that can be read begins the count anew."""
    monkeypatch.setattr("latentreward.data.dataset.MOST_IN_A_ROW", 5)
    dataset = PairDataset(PickAPicReader(source, "train", on_error="skip"), LOADER)
    for number in (0, 1, 2, 3, 4, 0, 1, 2, 3):
        dataset[number]
    with pytest.raises(ImageError, match=r"^5 pairs one after the other cannot be read, the last is .*parquet:1: .*"):
        dataset[1]


def test_whole_numbers_of_an_own_reader_are_numbers() -> None:
    pairs = [PreferencePair(f"p{n}", "a", ImageRef("x"), ImageRef("y"), n, weight=2) for n in (1, 0)]
    batch = collate_pairs([LoadedPair(pair, torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)) for pair in pairs])
    assert (batch.label.dtype, batch.weight.tolist()) == (torch.float32, [2.0, 2.0])


@pytest.mark.parametrize("context", ["fork", pytest.param(FORKS, marks=pytest.mark.slow)], ids=["fork", "forkserver"])
def test_workers_count_for_the_main_process(source, context) -> None:
    dataset = PairDataset(PickAPicReader(source, "train", on_error="skip"), LOADER)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=5, num_workers=1, collate_fn=collate_pairs, multiprocessing_context=context
    )
    assert [len(batch) for batch in loader] == [1]
    assert skipped_rows(dataset) == [0, 1, 2, 3]


def test_error_of_a_worker_stays_one_line(source) -> None:
    dataset = PairDataset(PickAPicReader(source, "train"), LOADER)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=1, collate_fn=collate_pairs)
    with pytest.raises(ImageError) as error:
        list(loader)
    assert "\n" not in str(error.value)
    assert "parquet:0: image 'image-0-0': no image" in str(error.value)


@pytest.mark.parametrize(
    ("taken", "span", "good"),
    [((1, 1), "takes 1", [1]), ((1, 2), "takes 1 to 2", [1, 2]), ((2, None), "takes at least 2", [2, 3])],
)
def test_rows_with_too_few_or_too_many_pictures_to_edit_follow_on_error(tmp_path, jpeg, taken, span, good) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    row = {"prompt": "make it red", "chosen": "a.jpg", "rejected": "a.jpg"}
    rows = [{**row, "source_images": ["a.jpg"] * number} for number in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets = {}
    for on_error in ("raise", "skip", "placeholder"):
        reader = JSONLPairReader(str(tmp_path / "pairs.jsonl"), on_error=on_error)
        datasets[on_error] = PairDataset(reader, PixelLoader(8, 8))
        datasets[on_error].taken = taken
    told = rf"pairs\.jsonl:1: number of pictures to edit: 0, and the network {span} in data of edits; "
    for look in (datasets["raise"].check_sources, lambda: datasets["raise"][0]):  # before a step, and at the row
        with pytest.raises(ImageError, match=told):
            look()
    datasets["skip"].check_sources()
    kept = [item for item in (datasets["skip"][n] for n in range(4)) if isinstance(item, LoadedPair)]
    assert [len(item.sources) for item in kept] == good
    assert datasets["skip"].skipped() == {"wrong number of pictures to edit": 4 - len(good)}
    filled = [datasets["placeholder"][n] for n in range(4)]
    assert [item.pair.label_a is not None for item in filled] == [n in good for n in range(4)]
    assert all(taken[0] <= len(item.sources) <= (taken[1] or 3) for item in filled)
    datasets["raise"].taken = (0, 0)
    told = "to edit: 1, and the network takes 0; set the reader's sources to ignore, or set the reader's on_error to"
    with pytest.raises(ImageError, match=told):
        datasets["raise"][1]
    assert not datasets["raise"][0].sources
    clips = PairDataset(datasets["raise"].reader, ClipLoader(8, 8, frames=5))
    clips.taken = (0, 0)
    with pytest.raises(ImageError, match=told):
        clips[1]


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
