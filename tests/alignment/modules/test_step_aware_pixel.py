"""Training of SPO's step-aware scorer: what it sees, what trains, what is logged, and where its checkpoint goes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from latentreward.callbacks import TrainableCheckpoint
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW
from torch.utils.data import DataLoader

from latentreward.alignment import StepAwarePixelModule
from latentreward.data import collate_pairs
from latentreward.reward import LRMLoss, StepAwareScorer
from latentreward.reward.modules.reward import PairDraws
from tests.alignment.modules.batches import exchanged, latent_batch, loaded_pairs, pixel_batch, rows, scores_of
from tests.alignment.policies.alignment import tiny_source
from tests.marks import rotated_after
from tests.reward.scorers.tiny_clip import write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("clip") / "model")


def spm(clip: str, pipeline: str = "sd15", **options: Any) -> StepAwarePixelModule:
    torch.manual_seed(0)
    options = {"optimizer": lambda groups: AdamW(groups, lr=1e-3), "seed": 1, **options}
    return StepAwarePixelModule(tiny_source(pipeline), clip, **options)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, **quiet, **options})


def loader() -> DataLoader:
    return DataLoader(loaded_pairs(6), batch_size=6, collate_fn=collate_pairs)


@pytest.mark.parametrize("guidance_scale", rotated_after(1, [1.0, 5.0]))
@torch.no_grad()
def test_the_scorer_sees_what_diffusers_own_step_predicts(clip: str, guidance_scale: float) -> None:
    module, batch = spm(clip, guidance_scale=guidance_scale), pixel_batch(3)
    policy, timesteps = module.generator, torch.tensor([0, 500, 999] * 2)
    encoded = module.encode(batch, PairDraws(batch, 1, 0))
    found = module.predict_pixels(encoded, timesteps.float())
    scheduler = DDIMScheduler.from_config({**policy.family.pipeline.config("scheduler"), "steps_offset": 0})
    scheduler.set_timesteps(1000)
    noisy = scheduler.add_noise(encoded.latents, encoded.noise, timesteps)
    for row, timestep in enumerate(timesteps):
        prompts, uncond = encoded.conditioning.select([row]).prompt_embeds, policy.encode_uncond().prompt_embeds
        with policy.reference():
            given, without = (policy.network(noisy[[row]], timestep, e).sample for e in (prompts, uncond))
        output = without + guidance_scale * (given - without)
        clean = scheduler.step(output, int(timestep), noisy[[row]]).pred_original_sample
        pixels = policy.vae.vae.decode(clean / policy.vae.vae.config.scaling_factor).sample
        torch.testing.assert_close(found[row], pixels[0], rtol=1e-3, atol=1e-3)


def test_both_images_share_timestep_and_noise(clip: str) -> None:
    module, batch = spm(clip), pixel_batch(4)
    encoded = module.encode(batch, PairDraws(batch, 1, 0))
    torch.testing.assert_close(*encoded.noise.chunk(2), rtol=0, atol=0)
    scores = scores_of(module, batch)
    torch.testing.assert_close(scores.chosen_sigmas, scores.rejected_sigmas, rtol=0, atol=0)
    assert len(scores.chosen_sigmas.unique()) == 4


@torch.no_grad()
def test_a_pairs_scores_depend_on_nothing_but_the_pair(clip: str) -> None:
    module, batch = spm(clip, decode_batch_size=3), pixel_batch(5)
    together, few = scores_of(module, batch), scores_of(module, rows(batch, [3, 1]))
    torch.testing.assert_close(few.chosen, together.chosen[[3, 1]], rtol=1e-4, atol=1e-4)
    swapped = scores_of(module, exchanged(batch))
    torch.testing.assert_close(swapped.chosen, together.rejected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scores_across_the_batch_hold_the_pairs_own(clip: str) -> None:
    module, batch = spm(clip, loss=LRMLoss("batch")), pixel_batch(5)
    scores = scores_of(module, batch)
    torch.testing.assert_close(scores.cross.chosen.diagonal(), scores.chosen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.cross.rejected.diagonal(), scores.rejected, rtol=1e-4, atol=1e-4)
    assert module.loss(scores).isfinite()


@pytest.mark.parametrize("pipeline", rotated_after(1, ["sd15", "sdxl", "sd3"]))
def test_everything_of_the_scorer_trains_and_nothing_of_the_generator(clip: str, pipeline: str) -> None:
    module = spm(clip, pipeline)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(max_steps=2, max_epochs=-1).fit(module, loader())
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"network.{name}" for name, _ in module.network.named_parameters()}


@pytest.mark.slow
def test_its_checkpoint_is_the_weights_of_a_step_aware_scorer(clip: str, tmp_path: Path) -> None:
    module, saving = spm(clip), ModelCheckpoint(tmp_path, "spm", every_n_train_steps=2)
    options = {"callbacks": [TrainableCheckpoint(), saving], "enable_checkpointing": True}
    trainer(max_steps=2, max_epochs=-1, **options).fit(module, loader())
    assert not [name for name in torch.load(tmp_path / "spm.ckpt")["state_dict"] if name.startswith("generator.")]
    network = StepAwareScorer(clip, weights=str(tmp_path / "spm.ckpt"), device="cpu").load()
    for name, value in module.network.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=0, atol=0)


def test_cached_latents_with_encoded_prompts_are_taken_as_they_are(clip: str) -> None:
    module = spm(clip)
    policy = module.generator
    cached = latent_batch(policy.latent_shape(), policy.latent_space)
    cached = replace(cached, conditioning=policy.encode_prompts(cached.prompts), uncond=policy.encode_uncond())
    scores = scores_of(module, cached)
    torch.testing.assert_close(scores_of(module, replace(cached, conditioning=None, uncond=None)).chosen, scores.chosen)
