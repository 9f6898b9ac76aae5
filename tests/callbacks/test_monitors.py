"""What watches an alignment sees what is there, and changes nothing."""

import logging
import math
from functools import partial

import pytest
import torch
from latentreward.callbacks import (
    CollapseGuard,
    ExactResume,
    HackingMonitor,
    NaNGuard,
    SampleGrid,
    TimestepBands,
    TrainableEMA,
)
from latentreward.callbacks.prompt_monitor import PairedChange, collapse_figures
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import AdamW

from latentreward.alignment import (
    Branching,
    ClippedPolicyLoss,
    FixedThreshold,
    LPOModule,
    PolicySource,
    RewardMixture,
    RewardSource,
    Sampling,
    StepwiseGRPOModule,
    sample_latents,
)
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.diffusion import LoRA, sd_tiny
from latentreward.reward import CallableScorer, CLIPProjectionHead, ImageScorer, PickScorer, RewardModel
from tests.alignment.modules.simple_reward import FirstChannelReward

PROMPTS = ["a red circle on a black background", "two blue squares on a white background", "a large green cross"]
SETTINGS = {"sampling": Sampling(3), "candidates": Branching(2), "guidance_scale": 1.0, "seed": 1}


def grpo(lr: float = 2e-3, dropout: float = 0.0, name: str = "sd35_tiny") -> StepwiseGRPOModule:
    return StepwiseGRPOModule(
        PolicySource(name, lora=LoRA(rank=4, alpha=4, dropout=dropout)),
        FirstChannelReward(),
        loss=ClippedPolicyLoss(clip_range=1e-2),
        optimizer=partial(AdamW, lr=lr, weight_decay=0.0),
        **SETTINGS,
    )


def prompts() -> PromptLoaders:
    return PromptLoaders(PROMPTS, batch_size=6, prompts_per_rollout=2, batches_per_epoch=100, seed=2)


def brightness(texts, images) -> torch.Tensor:
    return torch.tensor([sum(image.convert("L").tobytes()) / 1e5 for image in images])


def held_out(function=brightness) -> ImageScorer:
    return CallableScorer(function, name="look")


def trained(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters() if parameter.requires_grad]


class FallingScorer(ImageScorer):
    """Full marks for the reference, fewer each time after; a little different for each prompt."""

    def __init__(self) -> None:
        super().__init__("falling", batch_size=100)
        self.calls = 0

    def identity(self) -> str:
        return "falling"

    def score(self, prompts, images):
        self.calls += 1
        return torch.tensor([(1.0 + 0.1 * len(prompt)) / self.calls for prompt in prompts])


@pytest.mark.slow
def test_grid_shows_before_and_after(make_trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    grid = SampleGrid(PROMPTS, every_n_steps=2, image_size=32, columns=2)
    module = grpo(lr=0.0)
    make_trainer(callbacks=[grid], max_epochs=-1, max_steps=3, logger=logger).fit(module, datamodule=prompts())
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_000002.png"]
    picture = Image.open(tmp_path / "samples" / "step_000002.png")
    batch = PromptBatch((PROMPTS[0],), ("0-0",))
    pixels = module.policy.vae.decode(sample_latents(module.policy, batch, Sampling(3).with_noise(), 1.0, seed=0))[0]
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    before, after = (picture.crop((left, 26, left + 32, 58)) for left in (8, 48))
    assert before.tobytes() == after.tobytes()  # a learning rate of 0
    assert abs(torch.tensor(list(before.tobytes())).float() - torch.tensor(expected).flatten().float()).max() <= 1
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["samples"]


def test_paired_change_by_hand():
    change = PairedChange(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.5, 3.0, 2.5]))
    error = math.sqrt(((-0.25) ** 2 + 0.25**2 + 0.75**2 + 0.75**2) / 3) / 2
    assert change.in_standard_errors == pytest.approx(-0.75 / error)
    assert str(change) == "fell from 2.5 to 1.75, by 0.75 (2.3 standard errors over 4 prompts)"
    same, all_alike = PairedChange(torch.ones(3), torch.ones(3)), PairedChange(torch.ones(3), torch.zeros(3))
    assert (same.in_standard_errors, same.difference, all_alike.in_standard_errors) == (0.0, 0.0, -math.inf)


@pytest.mark.slow
def test_hacking_stops_the_run_with_a_checkpoint_that_has_all(make_trainer, tmp_path, caplog):
    monitor, average = HackingMonitor(PROMPTS, FallingScorer(), every_n_steps=2), TrainableEMA(0.9)
    trainer = make_trainer(callbacks=[monitor, average], max_epochs=-1, max_steps=8)
    module = grpo()
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, datamodule=prompts())
    assert trainer.global_step == 2
    assert "optimiser step 2: the held-out score of falling fell from" in caplog.text
    assert "while the reward trained on rose from" in caplog.text
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert saved["callbacks"]["TrainableEMA"]["updates"] == 2
    assert (
        trainer.callback_metrics["hacking/held_out_change"] < -3 < 0 < trainer.callback_metrics["hacking/reward_change"]
    )


@pytest.mark.slow
def test_a_held_out_score_that_falls_with_the_reward_is_no_hacking(make_trainer, caplog):
    module = grpo(lr=0.0)  # the reward does not rise
    monitor = HackingMonitor(PROMPTS, FallingScorer(), every_n_steps=1)
    make_trainer(callbacks=[monitor], max_epochs=-1, max_steps=2).fit(module, datamodule=prompts())
    assert "hacks" not in caplog.text


@pytest.mark.slow
def test_a_mixture_that_normalises_by_groups_is_watched_by_one_picture_a_prompt(make_trainer):
    module = grpo()
    module.reward = RewardMixture([FirstChannelReward(), FirstChannelReward(1000.0)], [1.0, -0.9]).load(module.policy)
    monitor = HackingMonitor(PROMPTS, held_out(), every_n_steps=1, action="warn")
    trainer = make_trainer(callbacks=[monitor], max_epochs=-1, max_steps=1)
    trainer.fit(module, datamodule=prompts())
    assert trainer.callback_metrics["hacking/reward_change"] > 0  # a sum of the raw scores would fall


class UntrainedLRM(RewardSource):
    def latent_space(self):
        return None

    def load(self, policy):
        backbone = sd_tiny(visual_taps=[1], tuning="frozen", text_encoder_tuning="frozen")
        model = RewardModel(backbone, CLIPProjectionHead(backbone.feature_spec, guidance=1.0))
        return LatentScorer(model.eval().requires_grad_(False), policy.noise_process)


@pytest.mark.slow
def test_a_latent_reward_is_watched_beside_the_shipped_held_out_scorer(make_trainer):
    module = LPOModule(PolicySource("sd_tiny"), UntrainedLRM(), FixedThreshold(0.0), **SETTINGS)
    monitor = HackingMonitor(PROMPTS, PickScorer("held_out_tiny"), every_n_steps=1, reward_sigmas=(0.2,))
    trainer = make_trainer(callbacks=[monitor], max_epochs=-1, max_steps=1)
    trainer.fit(module, datamodule=prompts())
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("hacking/")}
    assert {"hacking/held_out", "hacking/reward"} < set(logged)
    assert all(map(math.isfinite, logged.values()))


def test_figures_of_collapse_by_hand():
    noise = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    lively = collapse_figures(noise)
    assert lively["contrast"] == pytest.approx(1 / math.sqrt(3), abs=0.03)
    assert lively["diversity"] == pytest.approx(1 / math.sqrt(3), abs=0.03)
    assert lively["not_flat"] == 1.0
    alike = collapse_figures(noise[:, :1].expand(2, 4, 3, 8, 8))
    assert alike["diversity"] == pytest.approx(0, abs=1e-6)
    black = collapse_figures(torch.cat([-torch.ones(1, 4, 3, 8, 8), noise[:1]]))
    assert black["not_flat"] == 0.5


@pytest.mark.slow
def test_collapse_ends_the_run_naming_step_and_figures(make_trainer, monkeypatch):
    module, decoded = grpo(), []
    decode = module.policy.vae.decode

    def fade(latents):
        decoded.append(len(latents))
        return decode(latents) * (1.0 if len(decoded) == 1 else 0.01)

    monkeypatch.setattr(module.policy.vae, "decode", fade)
    guard = CollapseGuard(PROMPTS[:2], every_n_steps=3, images_per_prompt=2)
    message = r"optimiser step 3: contrast is 0\.00\d+, against 0\.\d+ at first, diversity is .* not flat is 0, against"
    with pytest.raises(InputError, match=message):
        make_trainer(callbacks=[guard], max_epochs=-1, max_steps=5).fit(module, datamodule=prompts())
    assert decoded == [4, 4]


def test_nan_guard_names_prompts_and_timesteps_of_rollouts(make_trainer):
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                batch.advantage.fill_(math.nan)

    with pytest.raises(InputError, match=r"optimiser step 1 .* on prompts '.*' \(t = \d+(\.\d+)?\), '"):
        trainer = make_trainer(callbacks=[Break(), NaNGuard()], max_epochs=-1, max_steps=2)
        trainer.fit(grpo(), datamodule=prompts())


@pytest.mark.slow
def test_monitors_leave_the_training_as_it_would_be(make_trainer):
    """With dropout, which draws from the global generator: equal weights, bit for bit."""
    weights = []
    for watched in (False, True):
        torch.manual_seed(5)
        module = grpo(dropout=0.2)
        monitors = [
            SampleGrid(PROMPTS, every_n_steps=1),
            HackingMonitor(PROMPTS, held_out(), every_n_steps=1, action="warn"),
            CollapseGuard(PROMPTS[:1], every_n_steps=1, images_per_prompt=2, least=0.01),
            TimestepBands(),
        ]
        trainer = make_trainer(callbacks=monitors if watched else [], max_epochs=-1, max_steps=3)
        trainer.fit(module, datamodule=prompts())
        weights.append(trained(module))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_an_exception_leaves_modes_and_adapters_as_they_were(make_trainer):
    def fail(texts, images):
        if module.global_step:
            raise RuntimeError("no scores today")
        return brightness(texts, images)

    module = grpo()
    module.train()
    modes = [part.training for part in module.modules()]
    with pytest.raises(RuntimeError, match="no scores today"):
        trainer = make_trainer(
            callbacks=[HackingMonitor(PROMPTS, held_out(fail), 3, every_n_steps=1)], max_epochs=-1, max_steps=2
        )
        trainer.fit(module, datamodule=prompts())
    assert [part.training for part in module.modules()] == modes
    latents, timesteps = torch.randn(1, *module.policy.latent_shape()), torch.tensor([500.0])
    conditioning = module.policy.encode_prompts(PROMPTS[:1])
    with torch.no_grad():
        now = module.policy.predict(latents, timesteps, conditioning)
        with module.policy.reference():
            assert not torch.equal(now, module.policy.predict(latents, timesteps, conditioning))


def test_bands_of_the_timestep_agree_with_the_rollout(make_trainer):
    module = LPOModule(
        PolicySource("sd35_tiny", lora=LoRA(rank=4, alpha=4)),
        FirstChannelReward(),
        FixedThreshold(0.01),
        optimizer=partial(AdamW, lr=1e-3),
        **SETTINGS,
    )
    trainer = make_trainer(callbacks=[TimestepBands((0, 700, 1000))], max_epochs=-1, max_steps=1)
    trainer.fit(module, datamodule=prompts())
    statistics, metrics = module.rollout_statistics, trainer.callback_metrics
    low = statistics.timesteps < 700
    assert low.any() and not low.all()
    assert metrics["rollout/kept_share_t_0_700"].item() == pytest.approx(statistics.kept[low].float().mean().item())
    median = statistics.gap[~low].flatten().quantile(0.5).item()
    assert metrics["rollout/gap_50_t_700_1000"].item() == pytest.approx(median)
    assert metrics["train/implicit_accuracy_t_700_1000"].item() == 0.0  # nothing is learned yet
    assert metrics["train/margin_t_700_1000"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_a_watched_run_resumes_bit_for_bit(make_trainer, tmp_path):
    """In mid-epoch and in mid-rollout, with dropout."""

    def run(folder: str, checkpoint=None):
        torch.manual_seed(4)
        module = grpo(dropout=0.2)
        saver = ModelCheckpoint(dirpath=tmp_path / folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        watching = [TimestepBands(), SampleGrid(PROMPTS, every_n_steps=2)]
        trainer = make_trainer(
            callbacks=[ExactResume(seed=5), *watching, saver], enable_checkpointing=True, max_epochs=-1, max_steps=4
        )
        data = PromptLoaders(PROMPTS, batch_size=4, prompts_per_rollout=2, batches_per_epoch=100, seed=2)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return trained(module)

    whole, resumed = run("whole"), run("rest", tmp_path / "whole" / "step=2.ckpt")
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))
