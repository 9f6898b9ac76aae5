"""Files of `logger/` are given after a trainer's or a run's, and log beside TensorBoard."""

from pathlib import Path

import pytest

from latentreward.apps.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.slow
def test_a_run_logs_to_weights_and_biases_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb  # takes seconds, and this test alone needs it

    for name, value in (("MODE", "offline"), ("RUN_ID", "one"), ("SILENT", "true"), ("CONFIG_DIR", str(tmp_path))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    files = [f"--config={CONFIGS / file}.yaml" for file in ("align/diffusion_dpo_tiny", "logger/wandb")]
    quick = [f"--data.root={tmp_path / 'world'}", "--data.train_pairs=8", "--data.val_pairs=4", "--data.batch_size=4",
             "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0",
             "--trainer.callbacks+=SampleGrid", "--trainer.callbacks.prompts=[a red circle]",
             "--trainer.callbacks.every_n_steps=2"]  # fmt: skip
    try:
        main(["fit", *files, *quick, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    finally:
        wandb.teardown()  # waits for the process that writes; after `finish` alone it may still be writing
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-one.wandb")
    assert b"train/loss" in written.read_bytes()
    assert [*written.parent.glob("files/media/images/samples*.png")]
