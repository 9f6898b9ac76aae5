"""Files of `loss/` parse after the configs that they change, and the tiny runs train with them."""

from pathlib import Path

import pytest
from pyarrow import parquet

from latentreward.apps.cli import main
from latentreward.tinyworld.writers import write_pickapic
from tests.marks import rotated_after
from tests.test_recipes import parse

CONFIGS = Path(__file__).parents[1] / "configs"
LOSSES = sorted(path.stem for path in (CONFIGS / "loss").glob("*.yaml"))
OF_TARGETS = [name for name in LOSSES if name != "ties"]
PAIRS = {"train": 32, "validation": 8}
COLUMNS = {"two_axes": "alignment,quality", "labels": "good"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of drawn pairs, with a table of what they are worth: `scores.parquet`."""
    folder = write_pickapic(tmp_path_factory.mktemp("pairs") / "pickapic", PAIRS, seed=0)
    (oracle,) = folder.rglob("oracle.parquet")
    table = parquet.read_table(oracle)
    for side in "ab":
        good = [float(utility > 3) for utility in table[f"utility_{side}"].to_pylist()]
        table = table.append_column(f"good_{side}", [good])
    parquet.write_table(table, folder.parent / "scores.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, LOSSES))
def test_a_loss_is_given_after_a_model_and_its_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TRAIN_SCORES", "VAL_SCORES", "TRAIN_LABELS", "VAL_LABELS", "PICKAPIC_ROOT"):
        monkeypatch.setenv(variable, "somewhere")
    base = ("configs/model/dina_lrm_sd35.yaml", "configs/data/pickapic_v1.yaml", "configs/trainer/eight_gpus.yaml")
    plain, changed = parse(*base).config["fit"], parse(*base, f"configs/loss/{name}.yaml").config["fit"]
    before, after = plain["model"]["init_args"], changed["model"]["init_args"]
    assert before["loss"] != after["loss"]
    assert (changed["data"]["init_args"].targets is not None) == (name in OF_TARGETS)
    assert (after["head"]["init_args"].axes is not None) == (name == "two_axes")
    for setting in ("backbone", "optimizer", "levels"):
        assert before[setting] == after[setting]


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, LOSSES))
@pytest.mark.parametrize(
    "model", rotated_after(1, ["layer_mix_tiny", "dina_lrm_tiny", "pavrm_dit_tiny", "drm_tiny"], release=2)
)
def test_a_tiny_reward_trains_with_every_loss(
    model: str, name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TRAIN_SCORES", "VAL_SCORES", "TRAIN_LABELS", "VAL_LABELS"):
        monkeypatch.setenv(variable, str(world.parent / "scores.parquet"))
    files = [f"model/{model}", "data/tinyworld_pickapic", f"loss/{name}", "trainer/demo"]
    quick = [f"--data.root={world}", "--data.train_pairs=32", "--data.val_pairs=8", "--data.batch_size=8",
             "--trainer.max_steps=2", "--trainer.logger=false"]  # fmt: skip
    columns = [f"--data.targets.columns=[{COLUMNS.get(name, 'utility')}]"] if name in OF_TARGETS else []
    main(["fit", *(f"--config={CONFIGS / file}.yaml" for file in files), *quick, *columns,
          f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    assert (tmp_path / "reward.ckpt").is_file()
