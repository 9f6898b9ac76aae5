"""Rewards and policies of every family learn: losses of a fixed batch halve, rewards of fixed noises rise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from latentreward.alignment import (
    AlignmentModule,
    Branching,
    LPOModule,
    QuantileThreshold,
    ReFLModule,
    StepwiseGRPOModule,
    sample_latents,
)
from latentreward.core.contracts import PromptBatch
from latentreward.data.alignment.prompts import PromptLoaders
from tests.alignment.modules.lpo_runs import make_trainer
from tests.diffusion.families.test_backbones import Scorer, inputs
from tests.diffusion.families.test_methods import DifferentiableChannel, rolled, sampling
from tests.diffusion.families.twins import PROMPTS, Twin, noise_for, one_per_family
from tests.marks import release_after

pytestmark = pytest.mark.slow
every_family = pytest.mark.parametrize("twin", release_after(1, one_per_family()), ids=lambda twin: twin.family)
FIXED = PromptBatch((PROMPTS[0],) * 16, tuple(f"fixed/{number}" for number in range(16)))


@pytest.mark.parametrize("kind", ["q_former", "projection"])
@every_family
def test_thirty_steps_halve_the_loss_of_a_fixed_batch(twin: Twin, kind: str) -> None:
    model, (chosen, sigmas) = Scorer(twin, kind).train(), inputs(twin)
    rejected = noise_for(chosen.shape[1:], seed=5)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    with torch.no_grad():
        encoded = model.encode(PROMPTS)
    losses = []
    for _ in range(31):
        margin = model.score(chosen, sigmas, *encoded) - model.score(rejected, sigmas, *encoded)
        loss = F.softplus(-margin).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0], losses


def adam(groups: Any) -> torch.optim.Adam:
    return torch.optim.Adam(groups, lr=0.02)


LEARNERS: dict[str, Any] = {
    "refl": rolled(ReFLModule, DifferentiableChannel, stop_range=(1, 3), optimizer=adam),
    "lpo": rolled(
        LPOModule, candidates=Branching(4), selection=QuantileThreshold(0.0), beta=5.0, clip_range=0.5, optimizer=adam
    ),
    "grpo_stepwise": rolled(StepwiseGRPOModule, candidates=Branching(4), optimizer=adam),
}


def rewards_of(module: AlignmentModule, twin: Twin, reference: bool = False) -> Tensor:
    """Rewards of what the policy makes of 16 fixed noises; the reference's are those of a run with rate 0."""
    with torch.no_grad():
        plan = sampling(twin, 6)
        latents = sample_latents(module.policy.eval(), FIXED, plan, module.guidance_scale, 0, reference)
    return 10 * latents[:, 0].flatten(1).mean(dim=1)


@pytest.mark.parametrize("method", LEARNERS)
@every_family
def test_rewards_rise_above_those_of_a_run_with_rate_zero(twin: Twin, method: str, tmp_path: Path) -> None:
    module = LEARNERS[method](twin, twin.source())
    data: Any = PromptLoaders(PROMPTS, batch_size=8, prompts_per_rollout=4, batches_per_epoch=15, seed=1)
    keys = {"datamodule": data}
    if method == "refl":
        keys = {"train_dataloaders": DataLoader([PromptBatch(PROMPTS, ("0/0", "0/1"))] * 15, batch_size=None)}
    make_trainer(tmp_path, max_steps=15, max_epochs=-1).fit(module, **keys)
    rises = rewards_of(module, twin) - rewards_of(module, twin, reference=True)
    assert rises.mean() > 3 * rises.std() / len(rises) ** 0.5, rises  # Student's t of 16 noises: p < 0.005
