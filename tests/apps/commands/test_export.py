"""``latentreward export`` from checkpoint to what other programs load."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentreward.alignment import load_policy
from latentreward.alignment.policies.checkpoint import SOURCE
from latentreward.apps.cli import main
from tests.alignment.policies.alignment import perturbed, prediction, tiny_source


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_source("sd15")
    policy = perturbed(source.load())
    trained = {f"policy.{name}": p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save({"state_dict": trained, SOURCE: asdict(source)}, path)
    return path


@pytest.mark.slow
def test_each_format_lands_in_its_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(checkpoint), str(tmp_path / "lora")])
    main(["export", str(checkpoint), "--format=kohya", f"--output={tmp_path / 'kohya'}", "--dtype=bfloat16"])
    main(["export", str(checkpoint), "--format=merged", f"--output={tmp_path / 'merged'}"])
    main(["export", str(checkpoint), "--format=peft", f"--output={tmp_path / 'peft'}"])
    diffusers = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    kohya = load_file(tmp_path / "kohya" / "kohya_lora.safetensors")
    assert len(kohya) == len(diffusers) / 2 * 3
    assert {value.dtype for value in kohya.values()} == {torch.bfloat16}
    printed = capsys.readouterr().out.splitlines()
    assert all("MB" in line for line in [*printed[:-2], printed[-1]])
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == len(diffusers)
    assert printed[-2] == f"load it by DiffusionPipeline.from_pretrained('{tmp_path / 'merged'}')"
    policy, merged = load_policy(checkpoint), tiny_source("sd15", source=str(tmp_path / "merged")).load()
    torch.testing.assert_close(prediction(merged), prediction(policy))


def test_what_is_no_alignment_run_or_in_the_way_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"model.head.weight": torch.ones(1)}}, tmp_path / "reward.ckpt")
    for arguments, problem in (
        ((tmp_path / "reward.ckpt", tmp_path / "new"), "holds no policy"),
        ((checkpoint, tmp_path), "exists; set overwrite"),
        ((tmp_path / "none.ckpt", tmp_path / "new"), "does not exist"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["export", *map(str, arguments)])
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
