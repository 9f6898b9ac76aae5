"""Settings that one class or function hands on to another are settings like any other."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from latentreward.apps.cli import main
from latentreward.core.registry import backbone_names
from tests.core.settings.test_refusals import FIT
from tests.marks import rotated_after

MONITOR = """
trainer:
  callbacks:
    - class_path: CollapseGuard
      init_args: {prompts: [a cat], least: 0.1, %s}
"""


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_settings_that_are_handed_on_are_printed(capsys) -> None:
    Path("monitor.yaml").write_text(MONITOR % "every_n_steps: 3")
    settings = yaml.safe_load(printed(*FIT, "--config=monitor.yaml", "--print_config", capsys=capsys))
    model = settings["model"]["init_args"]
    assert {"tuning", "gradient_checkpointing"} <= set(model["backbone"]["init_args"])
    assert "eval_timesteps" in model
    assert settings["trainer"]["callbacks"][-1]["init_args"]["every_n_steps"] == 3


@pytest.mark.parametrize(
    ("option", "wrong"),
    rotated_after(
        1,
        [("tuning", "halff"), ("lora", "{rank: many}"), ("quantization", "int3"), ("gradient_checkpointing", "often")],
    ),
)
@pytest.mark.parametrize("name", [name for name, path in backbone_names().items() if path.startswith("latentreward.")])
def test_every_backbone_knows_the_types_of_what_it_hands_on(name: str, option: str, wrong: str) -> None:
    module, function = backbone_names()[name].rsplit(".", 1)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(getattr(import_module(module), function))
    with pytest.raises(ArgumentError, match=option):
        parser.parse_args(["--source=folder", f"--{option}={wrong}"])
