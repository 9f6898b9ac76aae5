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
    "diffusion_rm": [],
    "jsonl": ["--encoder.source=sd35_tiny", "--images.size=32"],
    "tinyworld": ["--reader.root={data}"],
}


FILES = sorted(path.stem for path in (ROOT / "configs" / "cache").glob("*.yaml"))
GENERATORS = ("chroma", "ernie_image", "flux1", "flux2_klein", "hidream", "ideogram4", "krea2", "lumina2", "qwen_image",
              "sd35_large", "wan21", "z_image")  # fmt: skip
"""Families that configs/cache/hpdv3_sd35.yaml caches for, by --encoder.source."""


@pytest.mark.parametrize(
    ("config", "generator"),
    rotated_after(4, [*((name, "") for name in FILES), *(("hpdv3_sd35", name) for name in GENERATORS)]),
)
def test_config_runs(config: str, generator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data")
    monkeypatch.setenv("HPDV3_ROOT", str(data))
    pictures = sorted(str(path.relative_to(data)) for path in data.rglob("*.jpg"))
    (data / "train.jsonl").write_text(json.dumps({"prompt": "a", "chosen": pictures[0], "rejected": pictures[1]}))
    monkeypatch.setenv("PAIRS_ROOT", str(data))
    monkeypatch.setenv("PICKAPIC_ROOT", str(SAMPLES / "pickapic_v1"))
    monkeypatch.setenv("DIFFUSION_RM_ROOT", str(SAMPLES / "diffusion_rm"))
    smaller = [setting.format(data=data) for setting in SMALLER[config]]
    if generator:
        twin = {**{twin.family: twin for twin in TWINS.values()}, **TWINS}[generator]
        sizes = ("--images.size=32", "--images.resize=center_crop") if generator == "wan21" else BUCKETS
        smaller = [f"--encoder.source={twin.folder}", *sizes]
    settings = [*smaller, "--device=cpu", "--num_workers=0"]
    main(["cache", str(tmp_path / "cache"), f"--config={ROOT}/configs/cache/{config}.yaml", *settings])
    assert read_plan(tmp_path / "cache").pairs > 0
