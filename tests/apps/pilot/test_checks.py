"""What a pilot needs is checked before anything is downloaded, and what is missing is named in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from latentreward.apps.pilot.checks import GB, check_access, check_disk, check_sources, downloads
from latentreward.apps.pilot.plans import Pilot, find_pilot
from latentreward.cli import main
from latentreward.errors import InputError
from tests.hub_cache import cached_sd35

REFUSED = """
import sys
from latentreward.cli import main
try:
    main(["pilot", *sys.argv[1:]])
except SystemExit as ended:
    print(ended.code, [name for name in ("lightning", "diffusers", "transformers", "datasets") if name in sys.modules])
"""


@pytest.fixture
def pilot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pilot:
    """The pilot sd35m with folders of data, an empty cache of the hub, and no token."""
    found = find_pilot("sd35m")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, source in found.sources.items():
        monkeypatch.delenv(name, raising=False)
        if source.data:
            monkeypatch.setenv(name, str(tmp_path))
    return found


def test_all_variables_that_are_not_set_are_named_at_once(pilot: Pilot, monkeypatch: pytest.MonkeyPatch) -> None:
    check_sources(pilot)
    monkeypatch.delenv("HPDV3_ROOT")
    monkeypatch.delenv("HPDV2_ROOT")
    with pytest.raises(
        InputError, match=r"HPDV2_ROOT \(HPDv2's test set\), HPDV3_ROOT \(HPDv3\): not set; export each"
    ):
        check_sources(pilot)


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [
        ("HPDV3_ROOT", "owner/name", "HPDv3"),
        ("SD35_PATH", "./nowhere", "the model"),
        ("SD35_PATH", "nowhere", "the model"),
    ],
)
def test_a_folder_that_is_not_there_is_named(
    variable: str, value: str, what: str, pilot: Pilot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=rf"{variable}: {value} does not exist; set it to the folder of {what}"):
        check_sources(pilot)


def test_a_gated_model_needs_a_token_and_a_folder_needs_none(
    pilot: Pilot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = downloads(pilot)
    assert "SD35_PATH" in missing
    with pytest.raises(
        InputError, match=r"SD35_PATH: stabilityai/stable-diffusion-3.5-medium is gated .* no token; accept"
    ):
        check_access(pilot, missing)
    monkeypatch.setenv("SD35_PATH", str(tmp_path))
    assert "SD35_PATH" not in downloads(pilot)


def test_a_hub_that_does_not_answer_is_named(pilot: Pilot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = {name: source for name, source in downloads(pilot).items() if not source.gated}
    with pytest.raises(
        InputError, match=r"DINA_PUBLISHED: HF_HUB_OFFLINE keeps the hub .*; set DINA_PUBLISHED to a folder"
    ):
        check_access(pilot, missing)


def test_a_model_in_the_cache_of_the_hub_is_not_downloaded(pilot: Pilot, tmp_path: Path) -> None:
    snapshot = cached_sd35(tmp_path / "hub")
    assert "SD35_PATH" in downloads(pilot)  # the configs alone
    with (snapshot / "model.safetensors").open("wb") as file:
        file.truncate(16 * GB)  # takes no space on the disk
    assert "SD35_PATH" not in downloads(pilot)


def test_a_full_disk_is_refused_for_the_sum_of_a_file_system(tmp_path: Path) -> None:
    told = check_disk({tmp_path / "new" / "work": 1, tmp_path / "hub": 2})
    assert told.count("free") == 1
    free = int(float(told.split(", ")[1].split()[0]) * GB)
    with pytest.raises(InputError, match=r"disk: .* GB are needed where .*, .* GB are free; free some space"):
        check_disk({tmp_path / "work": free // 2, tmp_path / "hub": free // 2})


@pytest.mark.slow
def test_it_is_refused_before_libraries_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPDV3_ROOT", raising=False)
    command = [sys.executable, "-c", REFUSED, "sd15"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    *licences, last = ended.stdout.splitlines()
    assert last == "2 []", ended.stderr
    assert len(licences) == len(find_pilot("sd15").sources) and all("; licence: " in line for line in licences)
    assert "not set; export each variable" in ended.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.release
def test_a_check_names_all_that_is_missing_and_every_licence(
    pilot: Pilot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HPDV3_ROOT")
    monkeypatch.setattr("latentreward.apps.commands.pilot.check_access", lambda *_: None)
    with pytest.raises(SystemExit):
        main(["pilot", "sd35m", "--check", f"--work={tmp_path}/work"])
    found = capsys.readouterr()
    assert "HPDV3_ROOT (HPDv3): not set" in found.err
    assert "device: PyTorch" in found.err
    assert all(f"licence: {source.licence}" in found.out for source in pilot.sources.values())


@pytest.mark.slow
def test_a_failed_estimate_is_one_of_the_things_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in find_pilot("sd15").sources:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("CLIP_L_PATH", str(tmp_path / "empty"))
    with pytest.raises(SystemExit):
        main(["pilot", "sd15", "--check", f"--work={tmp_path}/work"])
    shown, said = capsys.readouterr()
    assert all(f"licence: {source.licence}" in shown for source in find_pilot("sd15").sources.values())
    assert "HPDV3_ROOT (HPDv3's test set)" in said
    assert "; estimate of train: " in said
    assert "no file named config.json" in said
    assert "device: PyTorch" in said
    assert "or set the environment variable" not in said  # the line about SD15_PATH says so already
