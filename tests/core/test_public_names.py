"""Public names are found without an import, and paths from before there were rooms are answered with today's."""

import subprocess
import sys
from importlib import import_module

import pytest

from latentreward.apps.cli import main
from latentreward.core.public_names import new_path, public_names, public_path, renewed


def test_each_name_is_handed_out_by_its_room() -> None:
    for name, module in public_names().items():
        room, _, _ = public_path(name).rpartition(".")
        assert getattr(import_module(room), name) is getattr(import_module(module), name), name


@pytest.mark.parametrize(
    "path", ["reward.losses.ThurstoneLoss", "alignment.policies.PolicySource", "data.readers.PairReader"]
)
def test_a_folder_of_a_room_finds_its_public_names(path: str) -> None:
    folder, _, name = f"latentreward.{path}".rpartition(".")
    assert getattr(import_module(folder), name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        import_module(folder).Nothing  # noqa: B018


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("latentreward.modules.LRMModule", "latentreward.reward.LRMModule"),
        ("latentreward.modules.lpo.LPOModule", "latentreward.alignment.LPOModule"),
        ("latentreward.losses.NFTLoss", "latentreward.alignment.NFTLoss"),
        ("latentreward.backbones.sd15", "latentreward.diffusion.families.sd.sd15"),
        ("latentreward.checkpoints.fsdp2.FSDP2Strategy", "latentreward.core.checkpoints.fsdp2.FSDP2Strategy"),
        ("latentreward.data.HPDv3Reader", "latentreward.data.HPDv3Reader"),
        ("latentreward.reward.LRMModule", "latentreward.reward.LRMModule"),
        ("latentreward.reward.losses.thurstone.ThurstoneLoss", "latentreward.reward.ThurstoneLoss"),
        ("latentreward.reward.losses.ThurstoneLoss", "latentreward.reward.losses.ThurstoneLoss"),
        ("latentreward.alignment.losses.RAMLoss", "latentreward.alignment.RAMLoss"),
        ("latentreward.callbacks.older.Throughput", "latentreward.callbacks.Throughput"),
        ("latentreward.losses", "latentreward.reward.losses"),
        ("latentreward.com", "latentreward.com"),
    ],
)
def test_todays_path(old: str, new: str) -> None:
    assert new_path(old) == new


@pytest.mark.parametrize("in_file", [True, False])
def test_an_old_path_is_read_as_todays_which_is_told(in_file: bool, tmp_path, capsys, caplog) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("model: {class_path: latentreward.modules.LRMModule, init_args: {lr: fast}}\n")
    given = [f"--config={path}"] if in_file else ["--model=latentreward.modules.LRMModule", "--model.lr=fast"]
    with pytest.raises(SystemExit):
        main(["fit", *given])
    told = caplog.text + capsys.readouterr().err
    assert "latentreward.modules.LRMModule has moved; say latentreward.reward.LRMModule" in told
    assert "model: Option 'lr' is not accepted" in told


@pytest.mark.parametrize("text", ["runs/latentreward.losses.old", "my.latentreward.losses.X", "latentreward.cache/x"])
def test_paths_of_files_and_of_other_packages_stay(text: str) -> None:
    assert renewed(text) == text


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
