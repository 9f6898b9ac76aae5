"""The stored LoRA of a policy's run is the one that is exported from its checkpoint today."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from latentreward.apps.cli import main
from tests.artefacts import FOLDERS

FOLDER = FOLDERS["policy"]


def test_its_adapter_is_exported(tmp_path: Path) -> None:
    main(["export", str(FOLDER / "checkpoints" / "last.ckpt"), str(tmp_path / "exported")])
    name = "pytorch_lora_weights.safetensors"
    found, recorded = load_file(tmp_path / "exported" / name), load_file(FOLDER / "lora" / name)
    assert found.keys() == recorded.keys() and len(found) > 2
    assert all(torch.equal(found[key], recorded[key]) for key in recorded)
