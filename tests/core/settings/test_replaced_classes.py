"""A later file replaces the module of an earlier one: its values override the earlier ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentreward.apps.cli import main
from tests.marks import rotated_after

DINA = "configs/model/dina_lrm_tiny.yaml"
RANK_16 = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": None}
LORA = "latentreward.diffusion.LoRA"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(capsys: pytest.CaptureFixture[str]):
    """Print the settings of a model from files and options, as ``--print_config`` does."""

    def printed(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *(f"--config={one}" if one.endswith(".yaml") else one for one in arguments), "--print_config"])
        shown = capsys.readouterr()
        assert not stop.value.code, shown.err
        return yaml.safe_load(shown.out)["model"]

    return printed


def another(name: str, **backbone: Any) -> str:
    """Write a file with a reward module on the tiny generator that has the given settings of its backbone."""
    parts = {"backbone": {"class_path": "sd35_tiny", "init_args": backbone}, "head": {"class_path": "PAVRMHead"}}
    Path(name).write_text(json.dumps({"model": {"class_path": "RewardModule", "init_args": parts}}))
    return name


@pytest.mark.parametrize(
    ("lora", "expected"),
    rotated_after(
        1,
        [
            ({}, RANK_16),
            ({"lora": {"rank": 5}}, {**RANK_16, "rank": 5}),
            ({"lora": {"class_path": LORA, "init_args": {"alpha": 7}}}, {**RANK_16, "alpha": 7.0}),
            ({"lora": None}, None),
        ],
    ),
    ids=["none", "mapping", "class_path", "null"],
)
def test_adapters_of_the_earlier_module_and_of_the_later_one(lora: dict[str, Any], expected: Any, model) -> None:
    found = model(DINA, another("second.yaml", **lora))
    assert found["class_path"] == "latentreward.reward.RewardModule"
    assert found["init_args"]["head"]["class_path"] == "latentreward.reward.PAVRMHead"
    assert found["init_args"]["backbone"]["init_args"]["lora"] == expected


@pytest.mark.parametrize(
    ("lora", "rest"),
    rotated_after(
        1,
        [
            ({"rank": 5, "dropout": 0.5}, {"dropout": 0.5}),
            ({"class_path": LORA, "init_args": {"rank": 5}}, {}),
            (None, {}),
        ],
    ),
    ids=["mapping", "class_path", "null"],
)
def test_adapters_of_the_later_module(lora: Any, rest: dict[str, float], model) -> None:
    found = model(another("first.yaml", lora=lora), DINA)
    assert found["class_path"] == "latentreward.reward.DiNaLRMModule"
    assert found["init_args"]["backbone"]["init_args"]["lora"] == {**RANK_16, **rest}
