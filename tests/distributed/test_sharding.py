"""What FSDP2 must bear: mixed dtypes, unused weights, compiled blocks, and every command through the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from latentreward.apps.cli import main
from latentreward.core.checkpoints.fsdp2 import FSDP2Strategy
from latentreward.core.checkpoints.shards import is_sharded, read_sharded
from latentreward.diffusion.backbones.compilation import compile_blocks
from latentreward.tinyworld.writers import write_hpdv3
from tests.alignment.modules.batches import dina
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import fit, loader, make_trainer, outcome, sgd, write_pipelines

pytestmark = pytest.mark.slow

VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"frozen_dtype": "bfloat16", "vae_dtype": "bfloat16", "gradient_checkpointing": True},
    "compiled": {"num_layers": 1, "visual_taps": (1,), "text_taps": (1,)},
    "unused": {},
}


def variant(name: str) -> Any:
    module = dina("sd35_no_t5", optimizer=sgd, backbone=VARIANTS[name])
    if name == "unused":
        module.model.head.spare = nn.Linear(3, 3)
    return module


def train_variant(name: str, folder: Path, strategy: Any = "auto") -> dict[str, Any]:
    module = variant(name)
    if name == "compiled" and strategy != "auto":  # the one process that it is compared with is eager
        compile_blocks(module.model.backbone.blocks(), backend="aot_eager")  # graphs as of inductor, no code to compile
    trainer = make_trainer(folder, strategy, precision="bf16-mixed" if name == "bfloat16" else "32-true")
    fit(module, trainer)
    trainer.validate(module, loader(2), verbose=False)
    scored = trainer.predict(module, loader(2))
    frozen = next(p for p in module.parameters() if not p.requires_grad)
    return {
        **outcome(module, trainer),
        "sharded": all(isinstance(p, DTensor) for p in module.parameters()),
        "groups": sum(isinstance(child, FSDPModule) for child in module.modules()),
        "blocks": len([*module.model.backbone.blocks()]),
        "frozen": str(frozen.dtype),
        "pairs": sum(len(batch.pair_ids) for batch in scored),
    }


def all_variants(folder: Path) -> dict[str, Any]:
    write_pipelines()
    return {name: train_variant(name, folder, FSDP2Strategy()) for name in VARIANTS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks("tests.distributed.test_sharding:all_variants", tmp_path_factory.mktemp("ranks"), timeout=900)


@pytest.mark.parametrize(("name", "tolerance"), [("bfloat16", 1e-4), ("compiled", 1e-5), ("unused", 1e-5)])
def test_variant_equals_one_process(name: str, tolerance: float, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    one = train_variant(name, tmp_path)
    for two in (rank[name] for rank in ranks):
        assert two["sharded"]
        assert two["groups"] >= two["blocks"] + 3  # the text encoder, the VAE, the rest
        assert two["frozen"] == ("torch.bfloat16" if name == "bfloat16" else "torch.float32")
        assert two["pairs"] == one["pairs"] // 2
        for key, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][key], value, rtol=tolerance, atol=tolerance)


def commands(folder: Path) -> dict[str, Any]:
    """On ranks: train to a sharded ``last.ckpt``, and go on from it."""
    settings = command_line(folder)
    sharded = ["--trainer.devices=2", "--trainer.strategy=fsdp2_sharded", "--trainer.callbacks+=TrainableCheckpoint"]
    main(["fit", *settings, *sharded, "--trainer.max_steps=2"])
    main(["fit", *settings, *sharded, "--trainer.max_steps=3", "--ckpt_path=last"])
    return {}


def command_line(folder: Path) -> list[str]:
    return [
        *(f"--config=configs/{name}.yaml" for name in ("model/dina_lrm_tiny", "data/tinyworld_hpdv3", "trainer/cpu")),
        f"--data.root={folder / 'pairs'}",
        "--data.train_pairs=24",
        "--data.val_pairs=8",
        "--data.batch_size=4",
        "--trainer.callbacks+=TrainableEMA",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.limit_val_batches=1",
        f"--trainer.logger.save_dir={folder}",
    ]


def test_commands_run_sharded_and_their_checkpoint_on_one_device(tmp_path: Path) -> None:
    write_hpdv3(tmp_path / "pairs", {"train": 24, "test": 8})
    on_ranks("tests.distributed.test_sharding:commands", tmp_path)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert is_sharded(last)
    assert read_sharded(last)["global_step"] == 3
    one_device = [*command_line(tmp_path), "--trainer.callbacks+=TrainableCheckpoint"]
    main(["validate", *one_device, f"--ckpt_path={last}"])
    main(["consolidate", str(last), str(tmp_path / "one.ckpt")])
    main(
        ["predict", *one_device, f"--ckpt_path={tmp_path / 'one.ckpt'}", f"--predictions.output_dir={tmp_path / 'out'}"]
    )
    main(["fit", *one_device, "--trainer.max_steps=4", f"--ckpt_path={tmp_path / 'one.ckpt'}"])
    assert torch.load(last, weights_only=True)["global_step"] == 4
