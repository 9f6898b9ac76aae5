"""Short trainings on the tiny world, with statistics that tell a working trainer from a broken one.

The pairs are the same for every seed; weights, order, noise, noise levels, prompts and rollouts follow the seed. What a
statistic is computed by is no part of the module that trains, as far as that is possible.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from PIL import Image
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from latentreward.alignment import CallableReward, FixedThreshold, LPOModule, PolicySource, Sampling
from latentreward.core.contracts import PreferenceBatch, StepPairs
from latentreward.diffusion import LoRA, sd35_tiny
from latentreward.reward import DiNaLRMModule
from latentreward.tinyworld import TinyWorldPromptDataModule
from latentreward.tinyworld.oracle import utility_scores
from latentreward.tinyworld.pairs import Picture, draw_pairs

PAIRS = {"train": 512, "validation": 192}


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        statistics: Values by name; they are high if the trainer works.
        before: Weights before the training.
        after: Weights after the training.
    """

    statistics: dict[str, float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def idle_lora(self) -> list[str]:
        """Name the LoRA matrices B that are bit for bit what they were (zero); the As change by weight decay alone."""
        names = [name for name in self.after if "lora_B" in name]
        return [name for name in names if torch.equal(self.before[name], self.after[name])]


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def fit(module: LightningModule, data: Any, steps: int, *callbacks: Callback) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(module, data)
    assert trainer.global_step == steps
    module.eval()


# DiNa-LRM


@cache
def drawn_pairs(split: str) -> tuple[PreferenceBatch, Tensor]:
    """Make pairs as latents; also each pair's difference of utilities, chosen minus rejected."""
    backbone = sd35_tiny()
    pairs = draw_pairs(split, PAIRS[split], np.random.default_rng([31, len(split)]), ties=False)
    sides = [(pair.first, pair.second) if pair.label == 1.0 else (pair.second, pair.first) for pair in pairs]

    def latents(pictures: Sequence[Picture]) -> Tensor:
        pixels = np.stack([np.asarray(Image.open(BytesIO(picture.jpeg))) for picture in pictures])
        return backbone.vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)

    chosen, rejected = zip(*sides, strict=True)
    batch = PreferenceBatch(
        pair_ids=tuple(f"{split}:{row}" for row in range(len(pairs))),
        prompts=tuple(pair.caption for pair in pairs),
        chosen=latents(chosen),
        rejected=latents(rejected),
        chosen_keys=tuple(picture.uid for picture in chosen),
        rejected_keys=tuple(picture.uid for picture in rejected),
        label=torch.ones(len(pairs)),
        weight=torch.ones(len(pairs)),
        latent_space=backbone.latent_space,
    )
    return batch, torch.tensor([one.utility - other.utility for one, other in sides])


def take_pairs(batch: PreferenceBatch, rows: Sequence[int]) -> PreferenceBatch:
    """Pick pairs of a batch."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    picked = {name: value[list(rows)] for name, value in values.items() if isinstance(value, Tensor)}
    named = {name: value for name, value in values.items() if isinstance(value, tuple) and value}
    picked |= {name: tuple(value[row] for row in rows) for name, value in named.items()}
    return PreferenceBatch(**{**values, **picked})


@torch.no_grad()
def correlation(module: DiNaLRMModule) -> float:
    """Correlate predicted win probabilities at σ = 0.3 with the differences of utilities, over held-out pairs."""
    pairs, gaps = drawn_pairs("validation")
    model, process = module.model, module.model.backbone.noise_process
    noise = torch.randn(pairs.chosen.shape, generator=torch.Generator().manual_seed(1))
    timesteps = process.timesteps_at(torch.tensor([0.3])).repeat(len(pairs))
    conditioning, _ = model.encode_prompts(pairs.prompts)
    chosen, rejected = (
        model(process.add_noise(images, noise, timesteps), timesteps, conditioning)
        for images in (pairs.chosen, pairs.rejected)
    )
    return torch.corrcoef(torch.stack([(chosen - rejected).sigmoid(), gaps]))[0, 1].item()


def dina_lrm(
    seed: int, fault: Callable[[Any], AbstractContextManager[Any]] = nullcontext, *, steps: int = 48
) -> Trained:
    """Train the tiny DiNa-LRM with LoRA."""
    seed_everything(seed, verbose=False)
    backbone = sd35_tiny(tuning="lora", lora=LoRA(rank=16, alpha=32))
    decay = partial(LinearLR, start_factor=1.0, end_factor=0.05, total_iters=steps)
    module = DiNaLRMModule(backbone, optimizer=partial(AdamW, lr=1e-3), lr_scheduler=decay, seed=seed)
    before, (pairs, _) = weights(module), drawn_pairs("train")
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(range(len(pairs)), 16, shuffle=True, generator=order, collate_fn=partial(take_pairs, pairs))
    with fault(module):
        fit(module, loader, steps)
    return Trained({"dina_lrm/correlation": correlation(module)}, before, weights(module))


# LPO


def brightness(latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
    """Ten times the mean of the first channel, as a reward."""
    return 10 * latents[:, 0].mean(dim=(1, 2))


class Watch(Callback):
    """Keeps the implicit accuracy of each step, and the pictures that the rollouts end in.

    Before the first step policy and reference are equal, so its accuracy is 0 and left out.
    """

    def __init__(self) -> None:
        self.accuracies: list[float] = []
        self.pictures: dict[str, tuple[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: StepPairs, batch_idx: int) -> None:
        for row in (batch.timesteps == pl_module.sampler.timesteps[-1]).nonzero().flatten().tolist():
            self.pictures[batch.keys[row]] = batch.prompts[row], batch.chosen[row]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            self.accuracies.append(trainer.callback_metrics["train/implicit_accuracy"].item())

    @torch.no_grad()
    def utility(self, module: LPOModule) -> float:
        """Mean utility of the pictures by the judge."""
        prompts, latents = zip(*self.pictures.values(), strict=True)
        pixels = (module.policy.vae.decode(torch.stack(latents)).clamp(-1, 1) + 1) * 127.5
        return utility_scores(prompts, pixels.round().byte().permute(0, 2, 3, 1).numpy()).mean().item()


def lpo(seed: int, fault: Callable[[Any], AbstractContextManager[Any]] = nullcontext, *, steps: int = 8) -> Trained:
    """Align the tiny Stable Diffusion with brightness."""
    seed_everything(seed, verbose=False)
    module = LPOModule(
        PolicySource("sd_tiny", lora=LoRA(rank=4, alpha=4.0)),
        CallableReward(brightness),
        selection=FixedThreshold(0.0),
        sampling=Sampling(num_inference_steps=8),
        guidance_scale=1.0,
        optimizer=partial(AdamW, lr=1e-3),
        seed=seed,
    )
    before, watch = weights(module), Watch()
    with fault(module):
        fit(module, TinyWorldPromptDataModule(128, batch_size=32, prompts_per_rollout=16, seed=seed), steps, watch)
    statistics = {
        "lpo/implicit_accuracy": float(np.mean(watch.accuracies)),
        "lpo/utility_in_rollouts": watch.utility(module),
    }
    return Trained(statistics, before, weights(module))


TRAININGS: dict[str, Callable[..., Trained]] = {"lpo": lpo, "dina_lrm": dina_lrm}
