"""Each callback does, on a real run, what its docstring says."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from latentreward.callbacks import (
    NaNGuard,
    PairScoreWriter,
    ResumedSettings,
    ScoredPairGrid,
    TrainableCheckpoint,
    TrainableEMA,
)
from latentreward.callbacks.checkpoints import rows_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from pyarrow import parquet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentreward.core.contracts import PreferenceBatch, PromptBatch
from latentreward.core.errors import InputError
from latentreward.reward import DiNaLRMModule, GatedQFormerHead
from tests.callbacks.small_run import SmallModule, train_loader
from tests.callbacks.small_run import make_trainer as small_trainer
from tests.marks import slow_after


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_nan_guard_names_step_and_pairs_and_saves_the_weights(module, batches, loader, make_trainer):
    batches[3] = replace(batches[3], chosen=torch.full_like(batches[3].chosen, float("nan")))
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(trained(pl_module))

    with pytest.raises(InputError, match=r"loss is nan at optimiser step 3 .*pair-3-0, pair-3-1, pair-3-2, pair-3-3"):
        make_trainer(callbacks=[NaNGuard(), Watch()]).fit(module, loader(batches))
    after = trained(module)
    assert len(seen) == 3
    assert all(torch.equal(after[name], seen[-1][name]) for name in after)


def test_nan_guard_names_prompts_and_images(batches):
    batch = {"prompts": PromptBatch(("a cat",), ("0",)), "images": batches[3]}
    assert rows_of(batch) == "prompts 'a cat' and pairs pair-3-0, pair-3-1, pair-3-2, pair-3-3"


def test_frozen_weights_are_left_out_after_a_failed_run_of_another_module(make_trainer):
    callback, modules = TrainableCheckpoint(), [SmallModule(), SmallModule()]
    for module in modules:
        module.net[0].requires_grad_(False)
        callback.setup(make_trainer(), module, "fit")
    assert [len(module.state_dict()) for module in modules] == [4, 2]


@pytest.mark.slow
def test_checkpoint_holds_what_trains_and_resumes_exactly(module, batches, loader, make_trainer, tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="small")
    trainer = make_trainer(callbacks=[TrainableCheckpoint(), saver], enable_checkpointing=True)
    trainer.fit(module, loader(batches))
    names = torch.load(tmp_path / "small.ckpt", weights_only=True)["state_dict"].keys()
    assert set(names) == set(trained(module))
    before = trained(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(parameter.requires_grad * 1.0)
    make_trainer(callbacks=[TrainableCheckpoint()]).validate(
        module, loader(batches), ckpt_path=str(tmp_path / "small.ckpt"), weights_only=True, verbose=False
    )
    assert all(torch.equal(before[name], value) for name, value in trained(module).items())


@pytest.mark.parametrize("warm_up", slow_after(1, [True, False]))
def test_ema_is_the_average_by_formula_and_serves_validation_alone(warm_up, module, batches, loader, make_trainer):
    ema, history, validated = TrainableEMA(0.5, warm_up), [trained(module)], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            history.append(trained(pl_module))

        def on_validation_batch_start(self, trainer, pl_module, *args):
            validated.append(trained(pl_module))

    make_trainer(callbacks=[ema, Watch()]).fit(module, loader(batches), loader(batches[:1]))
    expected = history[0]
    for n, weights in enumerate(history[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n)) if warm_up else 0.5
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in weights.items()}
    for name, value in validated[-1].items():
        torch.testing.assert_close(value, expected[name])
    assert all(torch.equal(value, history[-1][name]) for name, value in trained(module).items())
    assert ema.average.keys() == trained(module).keys()


def test_ema_counts_optimiser_steps_not_batches(module, batches, loader, make_trainer):
    ema = TrainableEMA()
    make_trainer(callbacks=[ema], accumulate_grad_batches=3).fit(module, loader(batches))
    assert ema.updates == 2


def test_ema_leaves_no_average_behind_after_an_exception(module, batches, loader, make_trainer):
    class Break(Callback):
        def on_validation_batch_start(self, *args):
            raise RuntimeError("power cut")

    last = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            last[:] = [trained(pl_module)]

    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(callbacks=[TrainableEMA(), Watch(), Break()]).fit(module, loader(batches), loader(batches))
    assert all(torch.equal(value, last[0][name]) for name, value in trained(module).items())


def test_grid_goes_to_tensorboard_and_to_a_png(module, batches, loader, make_trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    trainer = make_trainer(callbacks=[ScoredPairGrid(num_pairs=5, image_size=64, columns=2)], logger=logger)
    trainer.validate(module, loader(batches), verbose=False)
    with Image.open(tmp_path / "run" / "scored_pairs.png") as picture:
        cell = 2 * 64 + 3 * 8 + 8
        assert picture.width == 2 * cell
        assert picture.height == 3 * (64 + 52 + 8 + 8)
    logger.experiment.flush()
    log = EventAccumulator(str(tmp_path / "run"))
    log.Reload()
    assert log.Tags()["images"] == ["val/pairs"]


def test_points_after_the_checkpoint_of_a_resumed_run_are_in_the_log_once(tmp_path):
    class Logged(SmallModule):
        def training_step(self, rows, batch_idx):
            loss = super().training_step(rows, batch_idx)
            self.log("train/loss", loss)
            return loss

    def points(checkpoint=None):
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=4, save_top_k=-1)
        logger = TensorBoardLogger(tmp_path, name="run", version="")
        options = {"logger": logger, "log_every_n_steps": 2}
        small_trainer(tmp_path, [saver, ResumedSettings()], **options).fit(
            Logged(), train_loader(), ckpt_path=checkpoint
        )
        logger.experiment.close()
        events = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("train/loss")
        return [(event.step, event.value) for event in events]

    whole = points()
    assert whole[-1][0] > 5
    time.sleep(1)  # TensorBoard reads files by name: the second, then a process-wide counter as text (10 before 9)
    assert points(tmp_path / "saved" / "step=4.ckpt") == whole


def latents_of(batch: PreferenceBatch, module: DiNaLRMModule) -> PreferenceBatch:
    """The batch as a cache gives it."""
    vae = module.latent_decoder
    encoded = {name: vae.encode(getattr(batch, name)) for name in ("chosen", "rejected")}
    return replace(batch, **encoded, latent_space=vae.space)


def test_grid_decodes_cached_latents(module, batches, loader, make_trainer, tmp_path):
    latents = [latents_of(batch, module) for batch in batches[:1]]
    grids = []
    for folder, data in (("pixels", batches[:1]), ("latents", latents)):
        settings = {"default_root_dir": tmp_path / folder, "callbacks": [ScoredPairGrid(num_pairs=4)]}
        make_trainer(**settings).validate(module, loader(data), verbose=False)
        with Image.open(tmp_path / folder / "scored_pairs.png") as picture:
            grids.append(np.asarray(picture).astype(float))
    assert grids[0].shape == grids[1].shape
    assert 0 < abs(grids[0] - grids[1]).mean() < 60, "noise images, after the VAE"


@pytest.mark.parametrize("cached", [False, True])
def test_grid_shows_what_was_edited_before_both(cached, module, batches, loader, make_trainer, tmp_path):
    if cached:
        batches = [latents_of(batch, module) for batch in batches]
    edits = [replace(batch, sources=(batch.rejected,)) for batch in batches]
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    trainer = make_trainer(callbacks=[ScoredPairGrid(num_pairs=2, image_size=32, columns=2)], logger=logger)
    trainer.validate(module, loader(edits), verbose=False)
    with Image.open(tmp_path / "run" / "scored_pairs.png") as picture:
        assert picture.width == 2 * (3 * 32 + 4 * 8 + 8)
        levels = np.array(picture)
    source, _, rejected = (levels[26:58, 8 + 40 * place : 40 + 40 * place] for place in range(3))
    assert np.array_equal(source, rejected) or np.abs(source.astype(int) - rejected).max() <= 1


def test_predictions_are_complete_and_never_overwritten_by_accident(module, batches, loader, make_trainer, tmp_path):
    make_trainer(callbacks=[PairScoreWriter(tmp_path / "out")]).predict(
        module, loader(batches), return_predictions=False
    )
    table = parquet.read_table(tmp_path / "out" / "scores_rank0.parquet").to_pydict()
    assert sorted(set(table["pair_id"])) == sorted(name for batch in batches for name in batch.pair_ids)
    assert len(table["pair_id"]) == 2 * 24
    assert sorted({round(sigma, 1) for sigma in table["sigma"]}) == [0.2, 0.8]
    for chosen, rejected, margin in zip(table["chosen_score"], table["rejected_score"], table["margin"], strict=True):
        assert margin == pytest.approx(chosen - rejected)
    with pytest.raises(InputError, match=r"predictions\.overwrite"):
        make_trainer(callbacks=[PairScoreWriter(tmp_path / "out")]).predict(module, loader(batches))
    make_trainer(callbacks=[PairScoreWriter(tmp_path / "out", overwrite=True)]).predict(module, loader(batches[:1]))
    assert parquet.read_metadata(tmp_path / "out" / "scores_rank0.parquet").num_rows == 8


def test_a_prediction_after_a_failed_one_is_whole(module, batches, loader, make_trainer, tmp_path):
    class Break(Callback):
        def on_predict_batch_end(self, *args):
            raise RuntimeError("power cut")

    writer = PairScoreWriter(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(callbacks=[writer, Break()]).predict(module, loader(batches[:1]))
    assert not [*tmp_path.glob("*.parquet")]
    make_trainer(callbacks=[writer]).predict(module, loader(batches[:1]))
    assert parquet.read_metadata(tmp_path / "scores_rank0.parquet").num_rows == 8


def test_scores_of_two_axes_are_their_weighted_sum(module, batches, loader, make_trainer, tmp_path):
    """In predictions, in their table, and for metrics and callbacks of training and validation."""
    weights = (0.25, 0.75)
    module.model.head = GatedQFormerHead(module.model.backbone.feature_spec, num_heads=2, axes=weights)
    outputs: list[torch.Tensor] = []
    hook = module.model.head.register_forward_hook(lambda head, given, output: outputs.append(output))
    (found,) = make_trainer(callbacks=[PairScoreWriter(tmp_path / "out")]).predict(module, loader(batches[:1]))
    hook.remove()
    chosen = torch.cat([output.chunk(2)[0] for output in outputs])
    assert chosen.shape == (2 * len(batches[0]), 2)
    torch.testing.assert_close(found.chosen, chosen @ torch.tensor(weights))
    table = parquet.read_table(tmp_path / "out" / "scores_rank0.parquet").to_pydict()
    assert table["rejected_score"] == pytest.approx(found.rejected.tolist())
    seen: list[int] = []

    class Shapes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            scored = outputs["scored"]  # kept over an epoch, which a graph would not fit
            assert not scored.chosen.requires_grad and not scored.rejected.requires_grad
            seen.append(scored.chosen.ndim)

    trainer = make_trainer(callbacks=[Shapes()])
    trainer.fit(module, loader(batches[:1]), loader(batches[:1]))
    assert seen == [1]
    shown = module.predict_step(batches[0], 0)
    right = (shown.chosen > shown.rejected) == (shown.label > 0.5)
    decided = shown.label != 0.5
    assert trainer.callback_metrics["val/accuracy"].item() == pytest.approx(right[decided].float().mean().item())
