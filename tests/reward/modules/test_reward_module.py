"""The shared reward module: one score per pair whatever the company and the side, any head with any loss, training."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from latentreward.core.contracts import LatentSpace, PreferenceBatch
from latentreward.core.errors import InputError
from latentreward.data import collate_pairs
from latentreward.diffusion import ConstantSigma, UniformSigma
from latentreward.reward import (
    BradleyTerryLoss,
    CLIPProjectionHead,
    ConstantVarianceThurstoneLoss,
    GatedQFormerHead,
    LRMLoss,
    PreferenceLoss,
    RewardModel,
    RewardModule,
    ScoredPairs,
    ThurstoneLoss,
    WarmupSchedule,
)
from latentreward.reward.modules.pictures import TrainingPictures
from latentreward.reward.modules.reward import PairDraws
from tests.alignment.modules.batches import (
    MODULES,
    dina,
    dina_head,
    exchanged,
    latent_batch,
    loaded_pairs,
    lrm,
    pixel_batch,
    rows,
    scores_of,
)
from tests.alignment.rewards.stored import write_run
from tests.diffusion.backbones.networks import tiny_backbone
from tests.marks import rotated_after

LOSSES: dict[str, PreferenceLoss] = {
    "lrm_pair": LRMLoss("pair"),
    "lrm_batch": LRMLoss("batch"),
    "lrm_both": LRMLoss("both", batch_coeff=0.5, aux_loss_coeff=0.3),
    "bradley_terry": BradleyTerryLoss(),
    "bradley_terry_margin": BradleyTerryLoss(margin=1.0),
    "thurstone_mixture": ThurstoneLoss(),
    "thurstone_bhattacharyya": ThurstoneLoss(form="bhattacharyya"),
    "thurstone_nll": ThurstoneLoss(objective="nll"),
    "thurstone_constant": ConstantVarianceThurstoneLoss(),
}


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, "enable_model_summary": False, **options})


def loader(count: int = 6, batch_size: int = 6, **options: Any) -> DataLoader:
    return DataLoader(loaded_pairs(count, **options), batch_size=batch_size, collate_fn=collate_pairs)


def loss_of(module: RewardModule, batch: PreferenceBatch) -> Tensor:
    """Loss of a training step outside a trainer."""
    module.log = lambda *args, **kwargs: None
    return module.training_step(batch, 0)["loss"]


def test_a_text_encoder_whose_tokens_nothing_reads_does_not_train() -> None:
    """DDP fails on trainable weights without a gradient."""
    backbone = tiny_backbone("sd35", text_encoder_tuning="full", tuning="frozen", visual_taps=(0,), text_taps=())
    module = RewardModule(
        backbone, partial(GatedQFormerHead, num_heads=2), ThurstoneLoss(), UniformSigma(), eval_sigmas=(0.3,)
    )
    loss_of(module, latent_batch((4, 8, 8), backbone.latent_space)).backward()
    assert [name for name, one in module.named_parameters() if one.requires_grad and one.grad is None] == []


def test_a_run_whose_head_leaves_text_unread_is_read_back(tmp_path: Path) -> None:
    unread = {"visual_taps": [0], "text_taps": [], "tuning": "frozen", "text_encoder_tuning": "full"}
    trained = write_run(tmp_path, "dina", "sd35", **unread).model
    model = RewardModel.from_pretrained(tmp_path)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in trained.state_dict().items())


# one score per pair


@pytest.mark.parametrize("options", [{}, {"timestep_per_image": True}], ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_pair_scores_the_same_in_any_batch_and_order(kind: str, options: dict[str, Any]) -> None:
    module, batch = MODULES[kind](**options), pixel_batch()
    torch.rand(3)
    with torch.no_grad():
        whole = scores_of(module, batch)
        for index in ([0, 1, 2], [5, 3], [4]):
            part = scores_of(module, rows(batch, index))
            for name in ("chosen", "rejected", "chosen_sigmas", "rejected_sigmas"):
                # float32 of a cosine times LRM's logit_scale, which is up to 100
                torch.testing.assert_close(getattr(part, name), getattr(whole, name)[index], rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_epoch_redraws_in_training(kind: str) -> None:
    module, batch = MODULES[kind](), pixel_batch()
    with torch.no_grad():
        first, again, later = (scores_of(module, batch, epoch).chosen for epoch in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first != later).all()


@pytest.mark.parametrize("loss", rotated_after(2, LOSSES))
@pytest.mark.parametrize("kind", MODULES)
def test_exchanging_all_sides_changes_no_loss(kind: str, loss: str) -> None:
    module, batch = MODULES[kind](loss=LOSSES[loss], timestep_per_image="lrm" in loss), pixel_batch()
    with torch.no_grad():
        expected = loss_of(module, batch)
        assert expected.isfinite()
        torch.testing.assert_close(loss_of(module, pixel_batch(swap=True)), expected, rtol=0, atol=0)
        torch.testing.assert_close(loss_of(module, exchanged(batch)), expected, rtol=1e-5, atol=1e-6)


def metrics_of(module: RewardModule, batch: PreferenceBatch) -> dict[str, float]:
    module.log = lambda *args, **kwargs: None
    module.evaluation_step(batch, "val")
    return {
        f"{level}/{kind}": value.item()
        for level, metrics in module.metrics.items()
        for kind, value in metrics.values().items()
    }


@pytest.mark.parametrize("kind", MODULES)
def test_exchanging_all_sides_changes_no_metric(kind: str) -> None:
    module, batch = MODULES[kind](), pixel_batch()
    with torch.no_grad():
        expected = metrics_of(module, batch)
        assert metrics_of(module, pixel_batch(swap=True)) == expected
        assert metrics_of(module, exchanged(batch)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_noise_is_shared_or_own_as_the_method_says(kind: str) -> None:
    module, batch = MODULES[kind](), pixel_batch()
    draws = PairDraws(batch, module.seed, 0)
    encoded = replace(module.encode(batch, draws, module.noise_per_image), latents=torch.zeros(12, 4, 8, 8))
    timesteps = module.model.backbone.noise_process.timesteps_at(torch.tensor([0.9])).repeat(12)
    chosen, rejected = module.add_noise(encoded, timesteps).chunk(2)
    assert torch.equal(chosen, rejected) == (kind == "dina")


@pytest.mark.parametrize("posterior", ["sample", "mode"])
def test_each_image_has_a_posterior_sample_of_its_own(posterior: str) -> None:
    batch = pixel_batch()
    batch, module = replace(batch, rejected=batch.chosen), lrm(posterior=posterior)  # equal pixels, two images
    chosen, rejected = module.encode(batch, PairDraws(batch, module.seed, 0)).latents.chunk(2)
    assert torch.equal(chosen, rejected) == (posterior == "mode")


def test_timesteps_are_shared_unless_asked() -> None:
    batch = pixel_batch()
    with torch.no_grad():
        shared, own = (scores_of(lrm(timestep_per_image=own), batch) for own in (False, True))
    assert torch.equal(shared.chosen_sigmas, shared.rejected_sigmas)
    assert (own.chosen_sigmas != own.rejected_sigmas).any()


# any head with any loss


@pytest.mark.parametrize("loss", rotated_after(2, LOSSES))
@pytest.mark.parametrize(
    ("backbone", "head"), [("sd15", dina_head), ("sd35", CLIPProjectionHead)], ids=["dina on unet", "lrm on dit"]
)
def test_any_head_on_any_backbone_with_any_loss(backbone: str, head: Any, loss: str) -> None:
    module = lrm(backbone, head, loss=LOSSES[loss])
    value = loss_of(module, pixel_batch(4))
    value.backward()
    assert value.isfinite()
    missing = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_negatives_of_a_joint_head_are_every_prompt_with_every_image() -> None:
    batch, module = pixel_batch(3), lrm("sd15", dina_head, loss=LRMLoss("both"), levels=ConstantSigma(0.5))
    draws = PairDraws(batch, module.seed, 0)
    with torch.no_grad():
        encoded, scores = module.encode(batch, draws, module.noise_per_image), scores_of(module, batch)
        timesteps = module.model.backbone.noise_process.timesteps_at(torch.tensor([0.5])).repeat(6)
        noisy = module.add_noise(encoded, timesteps)
        conditioning, uncond = module.model.encode_prompts(batch.prompts)
        for prompt in range(3):
            images = module.model(noisy, timesteps, conditioning.select([prompt] * 6), uncond)
            torch.testing.assert_close(scores.cross.chosen[prompt], images[:3], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scores.cross.rejected[prompt], images[3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.cross.chosen.diagonal(), scores.chosen, rtol=1e-4, atol=1e-5)


def test_negatives_of_an_embedding_head_reuse_each_image_as_read_with_its_own_prompt() -> None:
    batch, module = pixel_batch(3), lrm("sd15", loss=LRMLoss("both"))
    calls = []
    module.model.backbone.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        scores = scores_of(module, batch)
    assert len(calls) == 1
    assert scores.cross.chosen.shape == (3, 3)
    torch.testing.assert_close(scores.cross.chosen.diagonal(), scores.chosen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.cross.rejected.diagonal(), scores.rejected, rtol=1e-4, atol=1e-5)


# refusals


def test_latents_of_another_vae_are_refused() -> None:
    module = lrm("sd15")
    ours = module.model.backbone.latent_space
    assert loss_of(module, latent_batch((4, 8, 8), ours)).isfinite()
    other = LatentSpace(4, 2, 0.13025)
    with pytest.raises(InputError, match=r"latents of the space \[.*0.13025.*\], but the backbone takes \[.*0.18215"):
        loss_of(module, latent_batch((4, 8, 8), other))
    with pytest.raises(InputError, match="latents have 16 channels, but this backbone takes"):
        loss_of(module, latent_batch((16, 8, 8), ours))


# evaluation


def names_of(levels: list[str], extra: list[str] = ()) -> set[str]:
    kinds = {f"val/{kind}{level}" for kind in ("accuracy", "margin", "calibration") for level in ["", *levels, *extra]}
    return kinds | {f"val/loss{level}" for level in levels}


@pytest.mark.parametrize(
    ("kind", "expected"),
    rotated_after(
        1,
        [
            ("lrm", names_of(["_t1", "_t251", "_t501", "_t801"])),
            ("dina", names_of(["_sigma0.2", "_sigma0.5", "_sigma0.8"], ["_ensemble"])),
        ],
    ),
)
def test_validation_logs_by_level(kind: str, expected: set[str]) -> None:
    module, run = MODULES[kind](), trainer()
    values = run.validate(module, loader(batch_size=4), verbose=False)[0]
    assert set(values) == expected
    assert run.validate(module, loader(batch_size=4), verbose=False)[0] == values
    whole = run.validate(module, loader(batch_size=6), verbose=False)[0]
    swapped = run.validate(module, loader(batch_size=6, swap=True), verbose=False)[0]
    assert swapped == pytest.approx(whole, abs=1e-5)
    for name in values:
        assert values[name] == pytest.approx(whole[name], abs=1e-4)


def test_cross_scores_are_made_in_training_alone() -> None:
    """Under DDP they are a collective call, and ranks need not have equally many evaluation batches."""
    module = lrm("sd15", dina_head, loss=LRMLoss("both"))
    passes = []
    module.model.head.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        module.evaluation_step(pixel_batch(3))
    assert len(passes) == len(module.eval_levels)


def test_evaluation_scores_every_level() -> None:
    module, batch = dina(), pixel_batch(4)
    with torch.no_grad():
        scored = module.evaluation_step(batch)
    assert isinstance(scored, ScoredPairs)
    assert scored.pair_ids == batch.pair_ids * 3
    assert scored.chosen_keys == batch.chosen_keys * 3
    assert len(scored.chosen) == len(scored.timesteps) == 12
    sigmas = scored.chosen_sigmas.unflatten(0, (3, 4))
    torch.testing.assert_close(sigmas[:, 0], torch.tensor([0.2, 0.5, 0.8]), rtol=0, atol=2e-3)
    assert (sigmas == sigmas[:, :1]).all()


def test_prediction_takes_unlabelled_pairs_and_leaves_metrics_alone() -> None:
    module = dina()
    labelled = loader(4, 4, labels=(1.0, 0.0, 0.8, 0.3))
    unlabelled = loader(4, 4, labels=(None,))
    run = trainer()
    (predicted,) = run.predict(module, unlabelled)
    assert len(predicted.chosen) == 12
    assert predicted.chosen.isfinite().all()
    fresh = run.validate(dina(), labelled, verbose=False)[0]
    assert run.validate(module, labelled, verbose=False)[0] == fresh


@pytest.mark.parametrize("kind", MODULES)
def test_unlabelled_pairs_have_no_part_in_metrics(kind: str) -> None:
    module = MODULES[kind]()
    with torch.no_grad():
        without = metrics_of(module, pixel_batch(4, labels=(1.0, 0.8, 0.9, 0.5)))
        with_more = metrics_of(module, pixel_batch(6, labels=(1.0, 0.8, 0.9, 0.5, None, None)))
    assert with_more == pytest.approx(without, abs=1e-5)


# training


def test_a_batch_of_ties_trains_and_has_no_accuracy() -> None:
    module, run = dina(), trainer()
    run.fit(module, loader(4, 4, labels=(0.5,)))
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert torch.isnan(run.callback_metrics["train/accuracy"])


def test_pairs_of_weight_0_count_in_no_accuracy() -> None:
    """As in validation."""
    module, batch, logged = lrm("sd15"), collate_pairs(loaded_pairs(4, labels=(1.0,))), []
    for one in (rows(batch, [0]), replace(batch, weight=torch.tensor([1.0, 0, 0, 0]))):
        logged.append({})
        module.log = lambda name, value, **options: logged[-1].update({name: value.item()})
        with torch.no_grad():
            module.training_step(one, 0)
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)


def test_schedule_counts_optimiser_steps() -> None:
    seen = []

    class Recording(SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    module = dina(
        optimizer=lambda groups: Recording(groups, lr=1.0), lr_scheduler=lambda opt: WarmupSchedule(opt, warmup_steps=4)
    )
    trainer(accumulate_grad_batches=2, max_epochs=1).fit(module, loader(12, 2))
    assert seen == [0.25, 0.5, 0.75]


def test_vectors_and_scalars_do_not_decay_unless_asked() -> None:
    (everything,) = lrm("sd15", decay_vectors=True).configure_optimizers().param_groups
    assert any(p.ndim < 2 for p in everything["params"])
    module = lrm("sd15", optimizer=lambda groups: AdamW(groups, weight_decay=0.3))
    decayed, plain = module.configure_optimizers().param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert any(p is module.model.head.logit_scale for p in plain["params"])
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)


@pytest.mark.parametrize(("levels", "told"), [(ConstantSigma(0.8), True), (ConstantSigma(0.0), False)])
def test_scores_at_levels_that_training_does_not_draw_are_told(
    levels: ConstantSigma, told: bool, recwarn: pytest.WarningsRecorder
) -> None:
    TrainingPictures().on_fit_start(None, lrm(levels=levels))  # type: ignore[arg-type]
    found = [str(warning.message) for warning in recwarn if "scores are by default at t 1" in str(warning.message)]
    assert len(found) == told and all("score with --noise.sigmas [0.8]" in text for text in found)
