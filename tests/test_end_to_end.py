"""The shipped configs train, evaluate and score through the command line, and say in one line what is wrong."""

from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from latentreward.apps.cli import main
from latentreward.tinyworld.writers import write_hpdv3, write_pickapic
from tests.marks import rotated_after

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = sorted(path.stem for path in (CONFIGS / "model").glob("*_tiny.yaml"))
FULL_SIZE = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml") if path.stem not in TINY)
PAIRS = {"train": 24, "held out": 12}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pairs")
    write_pickapic(root / "pickapic", {"train": PAIRS["train"], "validation": PAIRS["held out"]})
    write_hpdv3(root / "hpdv3", {"train": PAIRS["train"], "test": PAIRS["held out"]})
    return {name: root / name for name in ("pickapic", "hpdv3")}


def options(model: str, layout: str, pairs: dict[str, Path], folder: Path) -> list[str]:
    return [
        f"--config={CONFIGS}/model/{model}.yaml",
        f"--config={CONFIGS}/data/tinyworld_{layout}.yaml",
        f"--config={CONFIGS}/trainer/cpu.yaml",
        f"--data.root={pairs[layout]}",
        f"--data.train_pairs={PAIRS['train']}",
        f"--data.val_pairs={PAIRS['held out']}",
        "--data.batch_size=8",
        "--trainer.max_steps=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.num_sanity_val_steps=0",
        f"--trainer.logger.save_dir={folder}",
        "--trainer.logger.name=run",
        "--trainer.logger.version=",
    ]


EACH = [(model, ("pickapic", "hpdv3")[place % 2]) for place, model in enumerate(TINY)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), rotated_after(1, EACH, release=5))
def test_fit_validate_test_and_predict(model: str, layout: str, pairs: dict[str, Path], tmp_path: Path) -> None:
    settings = options(model, layout, pairs, tmp_path)
    main(["fit", *settings, "--trainer.limit_val_batches=1", "--trainer.callbacks=TrainableEMA"])
    run = tmp_path / "run"
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    for command in ("validate", "test"):
        main([command, f"--config={run / 'config.yaml'}", checkpoint])
    scores = f"--predictions.output_dir={tmp_path / 'scores'}"
    main(["predict", f"--config={run / 'config.yaml'}", checkpoint, scores])
    table = parquet.read_table(tmp_path / "scores" / "scores_rank0.parquet").to_pydict()
    assert len(set(table["pair_id"])) == PAIRS["held out"]
    assert len(table["pair_id"]) % PAIRS["held out"] == 0
    assert all(torch.isfinite(torch.tensor(table["margin"])))


@pytest.mark.slow
def test_the_saved_config_trains_the_same_weights(pairs: dict[str, Path], tmp_path: Path) -> None:
    main(["fit", *options("dina_lrm_tiny", "hpdv3", pairs, tmp_path / "first"), "--trainer.limit_val_batches=0"])
    saved = tmp_path / "first" / "run" / "config.yaml"
    main(["fit", f"--config={saved}", f"--trainer.logger.save_dir={tmp_path / 'second'}"])
    first, second = (
        torch.load(tmp_path / name / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("model", rotated_after(1, FULL_SIZE, release=4))
def test_full_size_configs_parse(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PICKAPIC_ROOT", "HPDV3_ROOT"):
        monkeypatch.setenv(name, "/data")
    data = "hpdv3" if model.startswith("dina") else "pickapic_v1"
    files = (f"model/{model}", f"data/{data}", "trainer/eight_gpus")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *(f"--config={CONFIGS}/{name}.yaml" for name in files), "--print_config"])
    assert stop.value.code in (0, None)
    assert "class_path: latentreward.reward." in capsys.readouterr().out
