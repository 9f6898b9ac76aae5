"""The data YAMLs of published sets, on the committed samples."""

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from tests.formats.conftest import COMMITTED

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "data"
SMALL = ["--data.size=16", "--data.num_workers=0", "--data.batch_size=2"]


@pytest.mark.parametrize(
    ("name", "variable", "sample", "absent", "loaders"),
    [
        ("hpdv2", "HPDV2_ROOT", "hpdv2", [], ["train", "val", "predict"]),
        ("imagereward", "IMAGEREWARD_ROOT", "imagereward", [], ["test", "predict"]),
        ("imagerewarddb", "IMAGEREWARDDB_ROOT", "imagerewarddb", ["train", "val"], ["test", "predict"]),
        ("genai_bench", "GENAI_BENCH_ROOT", "genai_bench", [], ["test", "predict"]),
        ("genai_bench_cmu", "GENAI_BENCH_CMU_ROOT", "genai_bench_cmu", [], ["test", "predict"]),
    ],
)
def test_config_gives_batches(name, variable, sample, absent, loaders, monkeypatch) -> None:
    monkeypatch.setenv(variable, str(COMMITTED / sample))
    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(LightningDataModule, "data")
    missing = [f"--data.{split}=null" for split in absent]  # splits that the samples lack
    arguments = [f"--config={FOLDER / name}.yaml", *SMALL, *missing]
    data = parser.instantiate(parser.parse_args(arguments)).data
    for loader in loaders:
        batch = next(iter(getattr(data, f"{loader}_dataloader")()))
        assert batch.chosen.shape == (2, 3, 16, 16)
