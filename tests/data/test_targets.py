"""Given values of images: z-scores over the training table, sides in the batch, runs that learn from them."""

import csv
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from latentreward.apps.cli import main
from latentreward.core.contracts import PreferenceBatch, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import (
    HPDv3Reader,
    JSONLPairReader,
    PairReader,
    PickAPicReader,
    PreferenceDataModule,
    ScoreTable,
    ScoreTargets,
)
from latentreward.data.dataset import is_turned
from latentreward.data.score_table import check_targets
from latentreward.diffusion import CachedPreferenceDataModule, CachedSplit
from latentreward.reward import LabelLoss, PreferenceLoss, RankingDistillation, TieLoss
from latentreward.tinyworld.writers import write_hpdv3, write_pickapic

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def write_table(path: Path, names: Sequence[str], **columns: Sequence[tuple[float, float]]) -> str:
    """A CSV file with columns NAME_a and NAME_b."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["pair_id", *(f"{name}_{side}" for name in columns for side in "ab")])
        for row, name in enumerate(names):
            rows.writerow([name, *(value for column in columns.values() for value in column[row])])
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs of the tiny world, and four to validate."""
    return write_pickapic(tmp_path_factory.mktemp("pickapic"), {"train": 8, "validation": 4})


@pytest.fixture(scope="module")
def reader(folder: Path) -> PairReader:
    return PickAPicReader(str(folder), "train", weight="equal")


def numbers(count: int, seed: int = 0) -> list[tuple[float, float]]:
    return [tuple(pair) for pair in np.random.default_rng(seed).normal(5, 3, (count, 2)).tolist()]


def sides_of(reader: PairReader, values: Sequence[tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Pair → values of the chosen and the rejected image."""
    return {
        pair.pair_id: pair_values[::-1] if is_turned(pair.label_a, *(i.image_key for i in images)) else pair_values
        for pair, pair_values in zip((reader[row] for row in range(len(reader))), values, strict=True)
        for images in [(pair.image_a, pair.image_b)]
    }


def check(batch: PreferenceBatch, expected: dict[str, tuple[float, float]]) -> None:
    for row, name in enumerate(batch.pair_ids):
        found = batch.targets.chosen[row].item(), batch.targets.rejected[row].item()
        assert found == pytest.approx(expected[name], abs=1e-5)


def test_a_table_may_name_winner_and_loser(reader: PairReader, tmp_path: Path) -> None:
    """A reader may exchange images a and b; chosen and rejected are the same for everybody."""
    values = numbers(8)
    table = tmp_path / "own.csv"
    lines = [f"{name},{chosen},{rejected}" for name, (chosen, rejected) in zip(reader.pair_ids(), values, strict=True)]
    table.write_text("\n".join(["pair_id,mine_chosen,mine_rejected", *lines]))
    targets = ScoreTargets({"train": str(table)}, ["mine"], standardise=False)
    labels = reader.labels()
    if ((labels == 0.5) | np.isnan(labels)).any():
        with pytest.raises(InputError, match="have no winner; give mine_a and mine_b for images a and b"):
            targets.values("train", reader)
    decided = DecidedPairs(reader)
    found = targets.values("train", decided)[:, :, 0, 0]
    for row, label in enumerate(decided.labels()):
        assert found[row].tolist() == pytest.approx(values[row] if label > 0.5 else values[row][::-1])
    gaps = ScoreTable(table).gaps(decided).values["mine"]
    np.testing.assert_allclose(gaps, [chosen - rejected for chosen, rejected in values])


class DecidedPairs(PairReader):
    """The pairs of a reader, ties decided for image b."""

    def __init__(self, reader: PairReader) -> None:
        super().__init__()
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> PreferencePair:
        return replace(self.reader[index], label_a=float(self.labels()[index]))

    def labels(self) -> np.ndarray:
        return np.where(self.reader.labels() > 0.5, 1.0, 0.0)


def test_unlabelled_pairs_are_told_what_to_do(tmp_path: Path) -> None:
    """Where a teacher's values are learned, a label of ½ is enough."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "image_a": "1.png", "image_b": "2.png"}\n' * 2)
    reader = JSONLPairReader(str(tmp_path / "pairs.jsonl"))
    table = write_table(tmp_path / "scores.csv", reader.pair_ids(), teacher=numbers(2))
    targets = ScoreTargets({"train": table}, ["teacher"])
    data = PreferenceDataModule(16, train=reader, targets=targets, batch_size=1, num_workers=0)
    with pytest.raises(InputError, match=r"label rows \(0\.5 where only the values of data\.targets are learned\)"):
        data.require_rows(["train"])


def test_values_reach_the_batch_z_scored_and_on_their_sides(reader: PairReader, tmp_path: Path) -> None:
    """The table has its rows in another order, and more than the reader."""
    values, spread = numbers(8), [(2.0, 4.0)] * 8
    names = [*reader.pair_ids(), "another"][::-1]
    others = {"teacher": [*values, (0.0, 1.0)][::-1], "teacher_std": [*spread, (1.0, 1.0)][::-1]}
    table = write_table(tmp_path / "teacher.csv", names, **others)
    targets = ScoreTargets({"train": table}, ["teacher"], ["teacher_std"])
    data = PreferenceDataModule(32, train=reader, batch_size=8, num_workers=0, targets=targets)
    (batch,) = data.train_dataloader()
    every = np.array([*values, (0.0, 1.0)])
    scored = [tuple(row) for row in ((np.array(values) - every.mean()) / every.std()).tolist()]
    check(batch, sides_of(reader, scored))
    for name, pair in sides_of(reader, [(2 / every.std(), 4 / every.std())] * 8).items():
        row = batch.pair_ids.index(name)
        found = batch.targets.chosen_std[row].item(), batch.targets.rejected_std[row].item()
        assert found == pytest.approx(pair)


def test_several_columns_as_given_and_images_without_a_value(reader: PairReader, tmp_path: Path) -> None:
    names = reader.pair_ids()
    table = write_table(tmp_path / "labels.csv", names[1:], good=[(1, 0)] * 7, clear=[(math.nan, 1)] * 7)
    targets = ScoreTargets({"train": table}, ["good", "clear"], standardise=False)
    data = PreferenceDataModule(32, train=reader, batch_size=8, num_workers=0, targets=targets)
    (batch,) = data.train_dataloader()
    assert batch.targets.chosen.shape == (8, 2)
    assert batch.targets.chosen_std is None
    sums = batch.targets.chosen + batch.targets.rejected
    row = batch.pair_ids.index(names[0])
    assert sums[row].isnan().all()
    assert (sums[:, 0][torch.arange(8) != row] == 1).all()
    assert sums[:, 1].isnan().all()


def test_a_table_of_score_pairs_with_several_columns_serves(
    folder: Path, reader: PairReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"reader": {"class_path": "PickAPicReader", "init_args": {"source": str(folder), "split": "train"}}}
    settings["scorers"] = [{"class_path": "latentreward.tinyworld.judge.TinyWorldJudge"}]
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    main(["score-pairs", "judged.parquet", "--config=settings.yaml"])
    values = ScoreTargets({"train": "judged.parquet"}, ["alignment", "quality"]).values("train", reader)
    assert values.shape == (8, 2, 1, 2)
    flat = values.flatten(0, 2)
    torch.testing.assert_close(flat.mean(dim=0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(dim=0, correction=0), torch.ones(2), atol=1e-5, rtol=0)


def test_a_split_without_a_table_has_none(reader: PairReader, tmp_path: Path) -> None:
    table = write_table(tmp_path / "teacher.csv", reader.pair_ids(), teacher=numbers(8))
    targets = ScoreTargets({"train": table}, ["teacher"])
    data = PreferenceDataModule(32, train=reader, val=reader, shared_prompts="keep", num_workers=0, targets=targets)
    (batch,) = data.val_dataloader()
    assert batch.targets is None


def test_a_cache_gives_the_values_that_images_give(tmp_path: Path) -> None:
    folder = write_hpdv3(tmp_path / "hpdv3", {"train": 6})
    cache = str(tmp_path / "cache")
    settings = [f"--config={CONFIGS}/cache/tinyworld.yaml", f"--reader.root={folder}", "--reader.split=train"]
    main(["cache", cache, *settings, "--num_workers=0"])
    reader, values = HPDv3Reader(str(folder), "train"), numbers(6)
    table = write_table(tmp_path / "teacher.csv", reader.pair_ids(), teacher=values)
    targets = ScoreTargets({"train": table}, ["teacher"], standardise=False)
    data = CachedPreferenceDataModule(train=CachedSplit(cache), batch_size=6, num_workers=0, targets=targets)
    batches = [*data.train_dataloader()]
    assert sum(map(len, batches)) == 6
    for batch in batches:
        check(batch, sides_of(reader, values))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([(1.0, 2.0)] * 7 + [(math.inf, 1.0)], r"scores\.csv: score_a of pair .*:7 is inf; give a finite number"),
        ([("", "")] * 8, r"scores\.csv: no image of data\.train has a value of score"),
    ],
)
def test_values_that_cannot_be_learned_are_named(
    column: list[tuple[object, object]], message: str, reader: PairReader, tmp_path: Path
) -> None:
    names = [reader[row].pair_id for row in range(len(reader))]
    table = write_table(tmp_path / "scores.csv", names, score=column)
    with pytest.raises(InputError, match=message):
        ScoreTargets({"train": table}, ["score"], standardise=False).values("train", reader)


@pytest.mark.parametrize(
    ("loss", "values", "message"),
    [
        (LabelLoss(), [[0.0, 1.0], [7.0, math.nan]], "data.targets.tables.train: data.targets holds 7"),
        (TieLoss(label_weight=1.0), [[0.0, -1.0]], "holds -1, which is no label"),
        (TieLoss(), None, ""),
        (LabelLoss(), [[0.0, math.nan]], ""),
        (RankingDistillation(), None, "data.targets.tables.train: RankingDistillation needs given values"),
    ],
)
def test_a_loss_says_before_the_first_batch_what_it_cannot_take(
    loss: PreferenceLoss, values: list[list[float]] | None, message: str
) -> None:
    given = None if values is None else torch.tensor(values)[:, :, None, None]
    module, datasets = SimpleNamespace(loss=loss), {"train": SimpleNamespace(targets=given)}
    check_targets(module, datasets, "test")
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_targets(module, datasets, "fit")
