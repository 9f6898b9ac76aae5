"""Public names are found without an import."""

import subprocess
import sys
from importlib import import_module

import pytest

from latentreward.core.public_names import FACES, public_names


def test_each_name_is_handed_out_by_its_room() -> None:
    faces = [f"latentreward.{face.replace('/', '.')}" for face in (*FACES, "callbacks")]
    for name, module in public_names().items():
        room = next(face for face in faces if module.startswith(f"{face}."))
        assert getattr(import_module(room), name) is getattr(import_module(module), name), name


@pytest.mark.slow
@pytest.mark.parametrize("command", ["score", "serve", "publish"])
def test_commands_whose_settings_name_no_class_do_not_import_lightning(command: str) -> None:
    code = (
        "import sys; from latentreward.apps.cli import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
        "print(*sys.modules, sep='\\n')"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lightning" not in loaded
