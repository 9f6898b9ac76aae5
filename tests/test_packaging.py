"""What was built runs from another directory: the wheel, built from the sdist, in a virtual environment of its own."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from latentreward import __version__

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
INSIDE = """
import latentreward, latentreward.callbacks, latentreward.configs
from pathlib import Path
for module in (latentreward, latentreward.callbacks, latentreward.configs):
    assert all("site-packages" in path for path in module.__path__), module.__path__
for table in ("estimate/published", "evaluation/benchmark/published_numbers", "evaluation/benchmark/texts"):
    assert (Path(latentreward.__path__[0]) / f"apps/{table}.yaml").is_file()
configs = Path(latentreward.configs.__path__[0])
print(*sorted(path.relative_to(configs).as_posix() for path in configs.rglob("*.yaml")))
"""


def output(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    output(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of a fresh environment that holds the package alone and borrows what it depends on from ours.

    ``build`` makes the wheel from the sdist, so the wheel shows that both are whole.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder)
    scripts = folder / "bin"
    (archive,) = dist.glob("*.whl")
    ours = (sys.executable, "-m", "pip", "--python", scripts / "python")  # a pip of its own would take seconds
    output(*ours, "install", "--no-deps", archive, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_both_names_and_the_module_run(installed: Path, tmp_path: Path) -> None:
    expected = f"latentreward {__version__}\n"
    assert output(installed / "latentreward", "--version", cwd=tmp_path) == expected
    assert output(installed / "lightning", "--version", cwd=tmp_path) == expected
    assert output(installed / "python", "-m", "latentreward", "--version", cwd=tmp_path) == expected


def test_callbacks_and_every_config_are_inside(installed: Path, tmp_path: Path) -> None:
    configs = ROOT / "configs"
    expected = sorted(path.relative_to(configs).as_posix() for path in configs.rglob("*.yaml"))
    assert output(installed / "python", "-c", INSIDE, cwd=tmp_path).split() == expected


def test_fit_from_packaged_configs(installed: Path, tmp_path: Path) -> None:
    files = ("model/lrm_tiny", "data/tinyworld_hpdv3", "trainer/cpu")
    options = [f"--config=configs/{file}.yaml" for file in files]
    small = ["--data.train_pairs=4", "--data.val_pairs=4", "--data.batch_size=2", "--trainer.fast_dev_run=true"]
    output(installed / "latentreward", "fit", *options, *small, cwd=tmp_path)
