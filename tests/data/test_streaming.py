"""Streams of pairs: who reads which rows, in which order, from where a run goes on, and what is refused."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import (
    ImageError,
    JSONLPairReader,
    PairStream,
    PixelLoader,
    PreferenceDataModule,
    StreamedPreferenceDataModule,
)

FEATURES = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "pair_id": Value("string")})
ROWS, SIDES = 24, ("chosen", "rejected")
NAMES = [f"{n:02d}" for n in range(ROWS)]


@pytest.fixture
def write(tmp_path: Path, jpeg):
    """Write pairs 00 to 23 as parquet files; returns the folder."""

    def write_files(files: int = 6, **changes: dict[str, Any]) -> str:
        rows = []
        for n in range(ROWS):
            images = {
                side: {"bytes": jpeg((10 * n, 9, red)), "path": None} for side, red in (("chosen", 9), ("rejected", 99))
            }
            rows.append({"prompt": f"p {n}", "pair_id": NAMES[n], **images, **changes.get(f"row{n}", {})})
        for part in range(files):
            some = Dataset.from_list(rows[part * ROWS // files : (part + 1) * ROWS // files], FEATURES)
            some.to_parquet(tmp_path / f"train-{part:05d}-of-{files:05d}.parquet")
        return str(tmp_path)

    return write_files


def names(stream: PairStream, part: int = 0, parts: int = 1, seed: int = 0) -> list[str]:
    return [pair.pair_id for pair in stream.pairs(part, parts, seed, lambda _: None)]


def module(source: str | IterableDataset, **options: Any) -> StreamedPreferenceDataModule:
    names = ("shuffle_buffer", "columns", "max_prompt_chars", "stream_on_error")
    stream = {name.removeprefix("stream_"): options.pop(name) for name in names if name in options}
    settings = {"size": 8, "batch_size": 3, "num_workers": 0, "batches_per_epoch": 4, "seed": 5, **options}
    return StreamedPreferenceDataModule(**settings, train=PairStream(source, **stream))


def batches(data: StreamedPreferenceDataModule, epochs: int = 1) -> list[tuple[str, ...]]:
    loader, found = data.train_dataloader(), []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        found += [batch.pair_ids for batch in loader]
    return found


@pytest.mark.parametrize("files", [6, 1])
@pytest.mark.parametrize("shuffle_buffer", [1, 7])
def test_parts_hold_every_row_once(write, files, shuffle_buffer) -> None:
    stream = PairStream(write(files), shuffle_buffer=shuffle_buffer)
    parts = [names(stream, part, 4) for part in range(4)]
    assert sorted(name for part in parts for name in part) == NAMES
    assert (names(stream) == NAMES) == (shuffle_buffer == 1)
    assert names(stream, 1, 4, seed=0) == parts[1]
    assert (names(stream, 1, 4, seed=1) != parts[1]) == (shuffle_buffer > 1)


@pytest.mark.parametrize(("files", "lanes"), [(3, 2), (6, 4)])
def test_the_first_pass_of_all_lanes_holds_every_row_though_files_do_not_divide(write, files, lanes) -> None:
    data = module(write(files), shuffle_buffer=4, num_workers=lanes, batch_size=2, batches_per_epoch=12)
    pairs = data.datasets["train"]
    assert sorted(item.pair.pair_id for n in range(12) for item in pairs.__getitems__([n])) == NAMES


def test_pairs_hold_the_bytes_of_the_file(write, jpeg) -> None:
    source = write()
    for place in (source, load_dataset("parquet", data_dir=source, split="train", streaming=True)):
        pair = next(PairStream(place, shuffle_buffer=1, randomise_sides=False).pairs(0, 1, 0, print))
        assert (pair.prompt, pair.label_a, pair.image_a.data) == ("p 0", 1.0, jpeg((0, 9, 9)))
        assert len(pair.image_a.image_key) == 32
    without = Dataset.from_parquet(f"{source}/*.parquet", cache_dir=f"{source}/cache").remove_columns("pair_id")
    named = names(PairStream(without.to_iterable_dataset(num_shards=3)))
    assert len({*named}) == ROWS
    assert sorted(named) == sorted(names(PairStream(without.to_iterable_dataset(), shuffle_buffer=1)))


def test_a_run_goes_on_where_it_stopped(write) -> None:
    whole = batches(module(source := write()), epochs=3)
    assert len(whole) == 12
    assert Counter(name for batch in whole[:8] for name in batch) == Counter(NAMES)
    for stop in (1, 3, 6):
        epoch, loader = stop // 4, module(source).train_dataloader()
        for number in range(epoch):
            loader.sampler.set_epoch(number)
            list(loader)
        loader.sampler.set_epoch(epoch)
        assert len([batch for _, batch in zip(range(stop % 4), loader, strict=False)]) == stop % 4
        state = json.loads(json.dumps(loader.state_dict()))
        again = module(source).train_dataloader()
        again.load_state_dict(state)
        rest = [batch.pair_ids for batch in again]
        again.sampler.set_epoch(epoch + 1)
        assert rest + [batch.pair_ids for batch in again] == whole[stop : 4 * (epoch + 2)]


def test_rows_before_the_place_are_not_decoded(write, monkeypatch) -> None:
    loader = module(source := write()).train_dataloader()
    state = {**loader.state_dict(), "batches": 3, "used": 3}
    again = module(source).train_dataloader()
    again.load_state_dict(state)
    decoded = []
    decode = PixelLoader.__call__
    monkeypatch.setattr(PixelLoader, "__call__", lambda self, image: decoded.append(image) or decode(self, image))
    assert len(list(again)) == 1
    assert len(decoded) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 2}, r"data\.num_workers is 2, but 0 in the checkpoint"),
        ({"shuffle_buffer": 3}, r"data\.train\.shuffle_buffer is 3, but 256 in the checkpoint"),
        ({"seed": 6}, r"seed_everything \(or data\.seed\) is 6, but 5"),
    ],
)
def test_another_order_is_refused(write, change, message) -> None:
    source = write()
    state = module(source).train_dataloader().state_dict()
    with pytest.raises(InputError, match=message):
        module(source, **change).train_dataloader().load_state_dict(state)
    with pytest.raises(InputError, match=r"trainer\.devices is 1, but 8 in the checkpoint"):
        module(source).train_dataloader().load_state_dict({**state, "world_size": 8})


@pytest.mark.slow
def test_worker_processes_read_their_own_lanes(write) -> None:
    source = write()
    with_workers = batches(module(source, num_workers=2, batches_per_epoch=5), epochs=2)
    lanes = module(source, num_workers=2, batches_per_epoch=5).datasets["train"]
    alone = [tuple(item.pair.pair_id for item in lanes.__getitems__([n])) for n in (*range(5), *range(6, 11))]
    assert [sorted(batch) for batch in with_workers] == [sorted(batch) for batch in alone]
    assert len({name for batch in alone[:4] for name in batch}) == 12


def test_prompts_of_other_splits_are_left_out(write, tmp_path) -> None:
    source = write()
    (tmp_path / "val.jsonl").write_text('{"prompt": "P  7", "chosen": "a.jpg", "rejected": "b.jpg"}')
    val = JSONLPairReader(str(tmp_path / "val.jsonl"), on_error="placeholder")
    for setting, there in (("drop", False), ("keep", True)):
        data = module(source, val=val, shared_prompts=setting, batches_per_epoch=9)
        assert ("07" in {name for batch in batches(data) for name in batch}) == there
    assert data.datasets["train"].skipped() == {}


def test_bad_rows_follow_on_error(write) -> None:
    bad = {"row3": {"chosen": {"bytes": b"no image", "path": None}}, "row5": {"prompt": "x" * 99}}
    source = write(**bad)
    options = {"shuffle_buffer": 1, "max_prompt_chars": 50}
    with pytest.raises(InputError, match="prompt has 99 characters, more than max_prompt_chars=50; correct the row"):
        names(PairStream(source, on_error="raise", **options))
    settings: dict[str, Any] = {"batch_size": 4, "batches_per_epoch": 6, **options}
    with pytest.raises(ImageError, match=r"data\.train: 03: image .*; replace the file, or set data\.on_error"):
        module(source, **settings).datasets["train"].__getitems__([0])
    for on_error in ("skip", "placeholder"):
        pairs = module(source, stream_on_error=on_error, **settings).datasets["train"]
        kinds = Counter(type(item).__name__ for n in range(5) for item in pairs.__getitems__([n]))
        assert kinds == {"LoadedPair": 19, "SkippedPair": 1}
        assert (pairs.skipped()["images not read"], pairs.skipped().total()) == (1, 2)


def test_what_a_stream_cannot_do_is_one_line(write, tmp_path) -> None:
    source = write()
    stream = PairStream(source)
    cases = [
        (lambda: PreferenceDataModule(8, train=stream), "PairStream: a stream has no number of rows"),
        (lambda: module(source, batches_per_epoch=0), r"data\.batches_per_epoch is 0"),
        (lambda: module(source, frames=5), r"need rows with numbers"),
        (lambda: PairStream(source, "test"), r"split: no test-\*\.parquet or test\.parquet"),
        (lambda: PairStream(str(tmp_path / "nowhere")), "source: no folder"),
        (lambda: PairStream("no/such-set"), "source: 'no/such-set' cannot be streamed"),
        (lambda: PairStream(source, columns={"chosen": "pair_id"}), "column pair_id holds '00', not an image's bytes"),
        (lambda: PairStream(Dataset.from_dict({"x": [1]}).to_iterable_dataset()), r"no column prompt \(it has x\)"),
        (lambda: PairStream(IterableDataset.from_generator(lambda: iter(()))), "has no rows"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    first = next(Path(source).glob("train-00000*"))
    first.write_bytes(first.read_bytes()[:300])
    with pytest.raises(InputError, match=r"train-00000.*: not a whole parquet file \("):
        PairStream(source)
    with pytest.raises(InputError, match=r"source: .* cannot be read on \("):
        names(stream)


def test_batches_of_a_stream_hold_the_pictures_to_edit(tmp_path, jpeg) -> None:
    features = Features({**FEATURES, "source_images": List(Image())})
    rows = [
        {"prompt": "make it red", "pair_id": NAMES[n], **{side: {"bytes": jpeg(), "path": None} for side in SIDES}}
        | {"source_images": [{"bytes": jpeg((10 * n, 9, 9)), "path": None} for _ in range(2)]}
        for n in range(6)
    ]
    Dataset.from_list(rows, features).to_parquet(tmp_path / "train.parquet")
    batch = next(iter(module(str(tmp_path), shuffle_buffer=1).train_dataloader()))
    assert [tuple(place.shape) for place in batch.sources] == [(3, 3, 8, 8)] * 2
    expected = [PixelLoader(8, 8)(source) for prompt in batch.prompts for source in sources_of(prompt)[:1]]
    assert torch.equal(batch.sources[0], torch.stack(expected))
    assert len(set(batch.prompts)) == 3


def test_pairs_of_a_batch_edit_equally_many_pictures(tmp_path, jpeg) -> None:
    features = Features({**FEATURES, "source_images": List(Image())})
    picture = {"bytes": jpeg(), "path": None}
    rows = [
        {"prompt": f"p {n}", "pair_id": NAMES[n], **dict.fromkeys(SIDES, picture), "source_images": [picture] * (n % 3)}
        for n in range(18)
    ]
    Dataset.from_list(rows, features).to_parquet(tmp_path / "train.parquet")
    data = module(str(tmp_path), shuffle_buffer=4, batches_per_epoch=6, on_error="skip")
    found = [*(loader := data.train_dataloader())]
    assert sorted(name for batch in found for name in batch.pair_ids) == NAMES[:18]
    for batch in found:
        assert {len(sources_of(prompt)) for prompt in batch.prompts} == {len(batch.sources)}
    assert {len(batch.sources) for batch in found} == {0, 1, 2}
    again = module(str(tmp_path), shuffle_buffer=4, batches_per_epoch=6, on_error="skip").train_dataloader()
    for _ in zip(range(2), again, strict=False):
        state = again.state_dict()
    loader.load_state_dict(state)
    assert [batch.pair_ids for batch in loader] == [batch.pair_ids for batch in found[2:]]
    network = SimpleNamespace(backbone=SimpleNamespace(sources=(0, 1)))
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(model=network))
    data.setup("fit")
    data.trainer = None
    assert {(len(batch.sources), len(batch)) for batch in data.train_dataloader()} == {(1, 3)}
    assert data.datasets["train"].skipped()["wrong number of pictures to edit"] >= 12
