"""Every shipped configs/cache/*.yaml runs, on small data and with a shipped pipeline."""

import json
from pathlib import Path

import pytest

from latentreward.apps.cli import main
from latentreward.diffusion.cache.store import read_plan
from tests.diffusion.cache.writing import write_data
from tests.diffusion.families.twins import TWINS
from tests.marks import rotated_after

ROOT = Path(__file__).parents[3]
BUCKETS = ("--images.buckets=[[32,32],[48,32],[32,48]]", "--images.min_pixels=0")
SAMPLES = ROOT / "tests" / "formats" / "data"
SMALLER = {
    "sd15_pickapic": ["--encoder.source=sd_tiny", "--images.size=32", "--reader.memory_map=false"],
    "hpdv3_sd35": ["--encoder.source=sd35_tiny", *BUCKETS],
    "sd35_large": [f"--encoder.source={TWINS['sd35_large'].folder}", *BUCKETS],
    "diffusion_rm": [],
    "jsonl": ["--encoder.source=sd35_tiny", "--images.size=32"],
    "tinyworld": ["--reader.root={data}"],
}


@pytest.mark.parametrize(
    "config", rotated_after(4, sorted((ROOT / "configs" / "cache").glob("*.yaml"))), ids=lambda path: path.stem
)
def test_config_runs(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data")
    monkeypatch.setenv("HPDV3_ROOT", str(data))
    pictures = sorted(str(path.relative_to(data)) for path in data.rglob("*.jpg"))
    (data / "train.jsonl").write_text(json.dumps({"prompt": "a", "chosen": pictures[0], "rejected": pictures[1]}))
    monkeypatch.setenv("PAIRS_ROOT", str(data))
    monkeypatch.setenv("PICKAPIC_ROOT", str(SAMPLES / "pickapic_v1"))
    monkeypatch.setenv("DIFFUSION_RM_ROOT", str(SAMPLES / "diffusion_rm"))
    if twin := {twin.family: twin for twin in TWINS.values()}.get(config.stem):
        sizes = ("--images.size=32",) if "{size:" in config.read_text() else BUCKETS
        smaller = [f"--encoder.source={twin.folder}", *sizes]
    else:
        smaller = [setting.format(data=data) for setting in SMALLER[config.stem]]
    settings = [*smaller, "--trainer.accelerator=cpu", "--num_workers=0"]
    main(["cache", str(tmp_path / "cache"), f"--config={config}", *settings])
    assert read_plan(tmp_path / "cache").pairs > 0
