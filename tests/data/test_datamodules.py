import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from latentreward.core.contracts import PreferenceBatch
from latentreward.core.errors import InputError
from latentreward.data import JSONLPairReader, PickAPicReader, PreferenceDataModule
from tests.data.skipped_rows import skipped_rows
from tests.marks import rotated_after, slow_after


class Recorder(LightningModule):
    """Remembers which pairs each stage saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.seen: dict[str, list[tuple[str, ...]]] = {"train": [], "val": [], "test": []}

    def score(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels.mean((2, 3))).squeeze(-1)

    def training_step(self, batch: PreferenceBatch, _: int) -> torch.Tensor:
        self.seen["train"].append(batch.pair_ids)
        return -torch.nn.functional.logsigmoid(self.score(batch.chosen) - self.score(batch.rejected)).mean()

    def validation_step(self, batch: PreferenceBatch, _: int) -> None:
        self.seen["val"].append(batch.pair_ids)

    def test_step(self, batch: PreferenceBatch, _: int) -> None:
        self.seen["test"].append(batch.pair_ids)

    def predict_step(self, batch: PreferenceBatch, _: int) -> tuple[str, ...]:
        return batch.pair_ids

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", **quiet, **options)


@pytest.fixture
def readers(write_pickapic, pickapic_rows) -> dict[str, PickAPicReader]:
    write_pickapic([pickapic_rows(n) for n in (3, 20, 21)], split="val")
    write_pickapic([pickapic_rows(n) for n in (30, 31)], split="test")
    train = [pickapic_rows(n, has_label=n != 5) for n in range(9)]
    source = write_pickapic(train)
    return {split: PickAPicReader(source, split, on_error="skip") for split in ("train", "val", "test")}


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", rotated_after(1, [0, 2]))
def test_fit_sees_labelled_rows_in_a_new_order_each_epoch(readers, num_workers) -> None:
    data = PreferenceDataModule(8, **readers, batch_size=3, num_workers=num_workers)
    module = Recorder()
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, data)
    first, second = ([pair for ids in module.seen["train"][i : i + 3] for pair in ids] for i in (0, 3))
    assert sorted(int(pair.split(":")[1]) for pair in first) == [0, 1, 2, 4, 6, 7, 8]  # 3 is in val, 5 has no label
    assert sorted(first) == sorted(second)
    assert first != second
    assert [len(ids) for ids in module.seen["val"]] == [3, 3]
    again = Recorder()
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(again, PreferenceDataModule(8, **readers, batch_size=7))
    assert [pair for ids in again.seen["train"] for pair in ids] == first + second


def test_the_order_follows_the_seed_of_the_run_unless_it_has_its_own(readers, monkeypatch) -> None:
    def order(**options: Any) -> list[list[int]]:
        return list(PreferenceDataModule(8, **readers, batch_size=2, **options).train_dataloader().places)

    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    followed = order()
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert order() != followed
    assert order(seed=4) == followed
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert order() == order(seed=0)


def test_overfitting_takes_the_same_first_pairs_in_each_epoch(readers) -> None:
    module = Recorder()
    data = PreferenceDataModule(8, **readers, batch_size=2, num_workers=0)
    trainer(max_epochs=2, overfit_batches=1, num_sanity_val_steps=0).fit(module, data)
    assert module.seen["train"] == [module.seen["train"][0]] * 2


def test_test_and_predict(readers, write_pickapic, pickapic_rows) -> None:
    rows = [pickapic_rows(n, has_label=False, label_0=None, label_1=None) for n in range(5)]
    unlabelled = PickAPicReader(write_pickapic(rows, split="new"), "new")
    data = PreferenceDataModule(8, **readers, predict=unlabelled, batch_size=2, num_workers=0)
    module = Recorder()
    trainer().test(module, data, verbose=False)
    assert [len(ids) for ids in module.seen["test"]] == [2]
    predicted = [pair for ids in trainer().predict(module, data) for pair in ids]
    assert [int(pair.split(":")[1]) for pair in predicted] == list(range(5))


def test_test_does_not_look_at_emptied_splits(readers) -> None:
    data = PreferenceDataModule(8, train=readers["val"], val=readers["val"], test=readers["test"], num_workers=0)
    module = Recorder()
    trainer().test(module, data, verbose=False)
    assert [len(ids) for ids in module.seen["test"]] == [2]
    with pytest.raises(
        InputError, match=r"data\.train: none of 3 rows left: .* have a prompt that val or test has too"
    ):
        trainer(max_epochs=1).fit(module, data)


def test_bad_images_are_reported_once_at_the_end(readers, write_pickapic, pickapic_rows, caplog) -> None:
    rows = [pickapic_rows(n, **({"jpg_0": b""} if n in (1, 2) else {})) for n in range(6)]
    reader = PickAPicReader(write_pickapic(rows), "train", on_error="skip")
    data = PreferenceDataModule(8, train=reader, batch_size=6, num_workers=1)
    trainer(max_epochs=2).fit(Recorder(), data)
    assert "data.train: images not read on this rank: 2 empty image" in caplog.text
    assert skipped_rows(data.datasets["train"]) == [1, 2]


def test_distributed_shares(readers) -> None:
    class Two:
        distributed_sampler_kwargs = {"num_replicas": 2, "rank": 1}  # noqa: RUF012

    data = PreferenceDataModule(8, **readers, batch_size=2, num_workers=0)
    data.trainer = Two()
    assert [len(batch) for batch in data.train_dataloader()] == [2, 1]  # 7 rows: 3 for each rank
    assert [len(batch) for batch in data.val_dataloader()] == [1]  # 3 rows: 2 and 1
    Two.distributed_sampler_kwargs = {"num_replicas": 8, "rank": 0}
    with pytest.raises(InputError, match=r"data\.train has 7 pairs for 8 ranks"):
        data.train_dataloader()


@pytest.mark.parametrize("name", ["backbone", "policy", "generator"])
def test_the_size_must_fit_the_network_of_the_module(readers, name) -> None:
    module, network = Recorder(), SimpleNamespace(side_multiple=16)
    if name == "backbone":
        module.model = SimpleNamespace(backbone=network)
    else:
        setattr(module, name, network)
    for size in (32, (48, 16)):
        trainer().predict(module, PreferenceDataModule(size, predict=readers["test"], num_workers=0))
    with pytest.raises(InputError, match=r"^data.size: 24 is no multiple of the 16 .* make it 16 or 32$"):
        trainer().predict(module, PreferenceDataModule((32, 24), predict=readers["test"], num_workers=0))


@pytest.mark.parametrize("name", ["backbone", "policy"])
def test_rows_edit_as_many_pictures_as_the_network_takes(readers, name) -> None:
    module, settings = Recorder(), {"predict": readers["test"], "num_workers": 0}
    if name == "backbone":
        module.model = SimpleNamespace(backbone=SimpleNamespace(side_multiple=8, sources=(1, 2)))
    else:
        module.policy = SimpleNamespace(side_multiple=8, family=SimpleNamespace(sources=(1, 2)))
    (data := PreferenceDataModule(8, **settings)).trainer = SimpleNamespace(lightning_module=module)
    data.setup("predict")
    assert data.datasets["predict"].taken == (1, 2)
    trainer().predict(Recorder(), (other := PreferenceDataModule(8, **settings)))
    assert other.datasets["predict"].taken == (0, None)


@pytest.mark.parametrize("workers", slow_after(1, [0, 2]))
def test_a_batch_holds_pairs_that_edit_one_number_of_pictures(tmp_path, jpeg, workers) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    row = {"chosen": "a.jpg", "rejected": "a.jpg"}
    numbers = [1, 2, 0, 1, 1, 3, 2, 1, 1]
    rows = [{**row, "prompt": f"{n}", "source_images": ["a.jpg"] * number} for n, number in enumerate(numbers)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reader = JSONLPairReader(str(tmp_path / "pairs.jsonl"), on_error="skip")
    settings = {"batch_size": 3, "num_workers": workers, "shared_prompts": "keep", "seed": 1}
    data = PreferenceDataModule(8, train=reader, val=reader, predict=reader, **settings)
    for dataset in data.datasets.values():
        dataset.taken = (1, 2)
    kept = [n for n, number in enumerate(numbers) if 1 <= number <= 2]
    orders = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        batches = list(loader)
        orders.append([int(prompt) for batch in batches for prompt in batch.prompts])
        assert sorted(orders[-1]) == kept and len(batches) == len(loader) == 3
        for batch in batches:
            assert {numbers[int(prompt)] for prompt in batch.prompts} == {len(batch.sources)}
    assert orders[0] != orders[1] == orders[2]
    model = Recorder()
    trainer(max_epochs=1).fit(model, data)
    assert [len(pairs) for pairs in model.seen["train"]] == [len(batch) for batch in data.train_dataloader()]
    found = [pair for batch in trainer().predict(model, data) for pair in batch]
    assert sorted(found) == [f"pairs.jsonl:{n + 1}" for n in kept]


def test_one_table_is_enough_and_its_files_are_looked_at_before_a_step(tmp_path, jpeg) -> None:
    file, picture = tmp_path / "train.csv", jpeg()
    (tmp_path / "in").mkdir()
    rows = [(f"p {n % 5}", f"in/{n}a.jpg", f"in\\{n}b.jpg") for n in range(10)]
    file.write_text("prompt,chosen,rejected\n" + "\n".join(map(",".join, rows)))
    for n in range(10):
        for side in "ab":
            (tmp_path / f"in/{n}{side}.jpg").write_bytes(picture)
    data = PreferenceDataModule(8, train=JSONLPairReader(str(file)), val_share=0.2, num_workers=0, batch_size=2)
    prompts = [{prompt for batch in loader for prompt in batch.prompts} for loader in loaders(data)]
    assert [*map(len, prompts)] == [4, 1] and not prompts[0] & prompts[1]
    with pytest.raises(InputError, match=r"data\.val_share: data\.val is set too"):
        PreferenceDataModule(8, train=JSONLPairReader(str(file)), val=JSONLPairReader(str(file)), val_share=0.2)
    for n in (3, 4):
        (tmp_path / f"in/{n}b.jpg").unlink()
    with pytest.raises(
        InputError, match=r"^data\.train: 2 files of pictures are missing, first .*3b\.jpg.* of train\.csv:5"
    ):
        PreferenceDataModule(8, train=JSONLPairReader(str(file)))
    PreferenceDataModule(8, train=JSONLPairReader(str(file)), on_error="skip")


def loaders(data: PreferenceDataModule) -> list[Any]:
    return [data.train_dataloader(), data.val_dataloader()]
