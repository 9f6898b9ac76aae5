"""``performance``: what is chosen where, few graphs in a step of every module, and eager code on request."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import Performance, performance
from lightning.pytorch.profilers import PassThroughProfiler
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from latentreward.apps.cli import main
from latentreward.core.errors import InputError
from latentreward.diffusion.backbones.compilation import CompiledBlock, compile_blocks
from latentreward.diffusion.backbones.fused_lora import FusedLinear
from tests.marks import rotated_after

QUICK = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
PAIRS = ("--data.train_pairs=12", "--data.val_pairs=4", "--data.batch_size=4")
RUNS: dict[str, tuple[str, ...]] = {
    "dina_lrm_tiny": (
        "--config=configs/model/dina_lrm_tiny.yaml", "--config=configs/data/tinyworld_pickapic.yaml", *PAIRS,
    ),
    "nft_tiny": (
        "--config=configs/align/nft_tiny.yaml", "--data.batch_size=3", "--data.prompts_per_rollout=2",
        "--model.sampling.num_inference_steps=3",
        "--model.reward=tests.alignment.modules.simple_reward.FirstChannelReward",
    ),
}  # fmt: skip
"""Run → its settings."""


class Device:
    def __init__(self, kind: str) -> None:
        self.root_device = torch.device(kind)


class Run:
    """What the callback asks of a trainer."""

    fast_dev_run, global_step, precision = False, 0, "bf16-mixed"

    def __init__(self, device: str, max_steps: int) -> None:
        self.strategy, self.max_steps, self.optimizers = Device(device), max_steps, []
        self.profiler = PassThroughProfiler()


@pytest.mark.parametrize(
    ("device", "steps", "given", "on"),
    [
        ("cuda", -1, {}, "compile_blocks"),
        ("cuda", 200, {}, "compile_blocks"),
        ("cuda", 199, {}, "fused_lora"),
        ("cuda", -1, {"auto": False}, ""),
        ("cuda", -1, {"compile_blocks": False}, "fused_lora"),
        ("cuda", -1, {"compile_blocks": False, "fused_lora": False}, ""),
        ("cuda", 3, {"compile_blocks": True}, "compile_blocks"),
        ("cuda", -1, {"fused_lora": True}, "compile_blocks fused_lora"),
        ("cpu", -1, {}, ""),
        ("cpu", 3, {"auto": False, "compile_blocks": True}, "compile_blocks"),
        ("cpu", 3, {"fused_lora": True}, "fused_lora"),
    ],
)
def test_blocks_are_compiled_on_a_gpu_in_a_long_run_and_lora_fused_in_a_short_one(
    device: str, steps: int, given: dict[str, bool], on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, callback, network = nn.Linear(2, 2), Performance(**given), nn.Sequential(nn.Linear(2, 2))
    inject_adapter_in_model(LoraConfig(target_modules=["0"]), network)
    monkeypatch.setattr(performance, "blocks_of", lambda module: iter([block]))
    callback.setup(Run(device, steps), network, "fit")  # type: ignore[arg-type]
    assert [name for name, value in callback.chosen.items() if value] == on.split()
    assert isinstance(block, CompiledBlock) == callback.chosen["compile_blocks"]
    assert isinstance(network[0], FusedLinear) == callback.chosen["fused_lora"]
    callback.teardown(Run(device, steps), network, "fit")  # type: ignore[arg-type]
    assert not isinstance(network[0], FusedLinear)
    assert type(block) is nn.Linear


def test_quantised_layers_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "is_quantized", lambda weight: True)
    with pytest.raises(InputError, match=r"performance\.compile_blocks: true, but quantised .*remove it"):
        Performance(compile_blocks=True).setup(Run("cpu", 3), nn.Linear(2, 2), "fit")  # type: ignore[arg-type]
    callback = Performance()
    callback.setup(Run("cuda", -1), nn.Linear(2, 2), "fit")  # type: ignore[arg-type]
    assert not callback.chosen["compile_blocks"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switch", "name"),
    rotated_after(
        0, [("compile_blocks", "dina_lrm_tiny"), ("fused_lora", "dina_lrm_tiny"), ("fused_lora", "nft_tiny")]
    ),
)
def test_losses_are_those_without_the_switch(
    switch: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, switched, run, forward = {}, set[str](), "", FusedLinear.forward

    def compiled(blocks: Iterable[nn.Module]) -> None:
        switched.add(f"compile_blocks {run}")
        compile_blocks(blocks, backend="aot_eager")  # graphs as of inductor, no code to compile

    def fused(*given: Any) -> Any:
        switched.add(f"fused_lora {run}")
        return forward(*given)

    monkeypatch.setattr(performance, "compile_blocks", compiled)
    monkeypatch.setattr(FusedLinear, "forward", fused)
    data = [f"--data.root={tmp_path / 'pairs'}"] if PAIRS[0] in RUNS[name] else []
    for run in ("false", "true"):
        folder = tmp_path / run
        log = ("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.log_every_n_steps=1")
        settings = (*RUNS[name], *data, *QUICK, "--trainer.max_steps=5", f"--trainer.default_root_dir={folder}")
        main(["fit", *settings, *log, f"--performance.{switch}={run}"])
        rows = [line.split(",") for line in next(folder.rglob("metrics.csv")).read_text().splitlines()]
        place = rows[0].index("train/loss")
        losses[run] = torch.tensor([float(row[place]) for row in rows[1:] if row[place]])
    assert len(losses["true"]) == 5
    assert switched == {f"{switch} true"}
    torch.testing.assert_close(losses["true"], losses["false"], rtol=1e-5, atol=0)
