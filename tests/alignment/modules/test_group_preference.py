"""DGPO and CRD: whole groups in every row, their noise, the reference's guidance, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import CRDLoss, DGPOLoss, ForwardProcessModule, NoisiestSteps
from latentreward.alignment.policies.moving_average import AVERAGE, OLD
from latentreward.core.contracts import RenoisedGroups, RenoisedSamples
from tests.alignment.modules.test_forward_process import BATCH, make, moved
from tests.alignment.modules.test_grpo import attached


def rolled(kind: str, **options: Any) -> tuple[ForwardProcessModule, RenoisedGroups]:
    """A module whose policy has moved on from its copies, and those from the reference; the rows of a rollout."""
    module = attached(make(kind, **options))
    moved(module)
    for copy in module.copies:
        copy.follow(0)
        moved(module)
    return module, module.roll_out(BATCH)


def noise_of(module: ForwardProcessModule, samples: RenoisedSamples) -> Tensor:
    return module.renoise(samples).target + samples.latents


def test_dgpo_draws_one_noise_for_a_group_anew_at_each_level() -> None:
    module, rows = rolled("dgpo")
    noise = noise_of(module, rows.samples(shared_noise=True)).view(4, 3, -1)
    torch.testing.assert_close(noise, noise[:, :1].expand_as(noise), rtol=1e-5, atol=1e-5)
    assert all((noise[row, 0] - noise[0, 0]).abs().max() > 0.1 for row in (1, 2, 3))


def test_crd_draws_a_noise_for_each_sample() -> None:
    module, rows = rolled("crd")
    noise = noise_of(module, rows.samples(shared_noise=False)).flatten(1)
    assert torch.pdist(noise).min() > 1.0


def test_dgpos_loss_is_that_of_the_formula() -> None:
    module, rows = rolled("dgpo", loss=DGPOLoss(20.0, 0.1, 1e-3))
    samples = rows.samples(shared_noise=True)
    states = module.renoise(samples)
    new, old, reference = (module.predict_under(name, samples, states) for name in ("policy", OLD, None))
    want = module.loss(new, old, states.target, rows.advantage, reference)
    assert 0 < want.clipped.sum() < want.clipped.numel() and not torch.allclose(old, reference)
    torch.testing.assert_close(module.training_step(rows, 0).detach(), want.loss)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_crd_compares_with_its_own_copy_and_with_a_guided_reference(scale: float | None) -> None:
    module, rows = rolled("crd", loss=CRDLoss(kl_weight=1.0), reference_guidance_scale=scale)
    samples = rows.samples(shared_noise=False)
    states = module.renoise(samples)
    new, old, average, plain = (module.predict_under(name, samples, states) for name in ("policy", OLD, AVERAGE, None))
    encoded, empty = (module.policy.encode_prompts(texts) for texts in (samples.prompts, [""] * len(samples)))
    with torch.no_grad(), module.policy.reference():
        without = module.policy.predict(states.latents, samples.timesteps, empty)
        with_prompt = module.policy.predict(states.latents, samples.timesteps, encoded)
    reference = plain if scale is None else without + scale * (with_prompt - without)
    want = module.loss(new, average, states.target, rows.advantage, reference)
    torch.testing.assert_close(module.training_step(rows, 0).detach(), want.loss, rtol=1e-4, atol=1e-5)
    assert module.loss(new, old, states.target, rows.advantage, reference).loss.item() != pytest.approx(
        want.loss.item()
    )


def test_a_group_counts_the_same_in_any_batch() -> None:
    """The mean of the losses of single rows is the loss of all rows."""
    for kind in ("dgpo", "crd"):
        module, rows = rolled(kind)
        singly = []
        for row in range(len(rows)):
            one = {name: getattr(rows, name)[row : row + 1] for name in vars(rows)}
            singly.append(module.training_step(replace(rows, **one), 0).detach())
        torch.testing.assert_close(torch.stack(singly).mean(), module.training_step(rows, 0).detach())


def test_the_noisiest_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [NoisiestSteps().choose(10, generator).tolist() for _ in range(100)]
    assert all(len(set(steps)) == 4 for steps in drawn)
    assert {step for steps in drawn for step in steps} == set(range(7))
    assert sorted(NoisiestSteps(3).choose(4, generator).tolist()) == [0, 1, 2]  # 0.7 · 4, rounded
