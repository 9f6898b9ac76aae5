"""DiffusionOPSD: states, targets, gradients, refusals, and a reward that rises."""

from typing import Any

import pytest
import torch

from latentreward.alignment import (
    DiffusionOPSDModule,
    NFTLoss,
    PolicySource,
    Sampling,
    sample_trajectories,
)
from latentreward.alignment.policies.moving_average import OLD
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from tests.alignment.modules.test_forward_process import adapter, moved
from tests.alignment.modules.test_grpo import attached
from tests.alignment.modules.toy_rewards import Brightness, BrightnessSource
from tests.marks import slow_after
from tests.tiny_pipelines import source_of

PROMPTS = ("a red circle", "two blue squares on a white background")
BATCH = PromptBatch(PROMPTS, ("0/0", "0/1"))
both_kinds = pytest.mark.parametrize("name", slow_after(1, ["sd15", "sd35_tiny"]))


def make(name: str = "sd35_tiny", reward: Any = None, **options: Any) -> DiffusionOPSDModule:
    settings: dict[str, Any] = {"sampling": Sampling(5), "seed": 1, **options}
    policy = PolicySource(source_of(name), lora=LoRA(rank=4, alpha=4))
    return DiffusionOPSDModule(policy, reward or BrightnessSource(), **settings)


@both_kinds
def test_states_are_those_of_the_copy_at_the_nearest_level(name: str) -> None:
    module = attached(make(name))
    moved(module)
    found = module.roll_out(BATCH)
    levels = module.policy.noise_process.sigma(module.sampler.timesteps)
    index = module.query
    assert (levels - 0.6).abs().min() == (levels[index] - 0.6).abs()
    assert set(found.timesteps.tolist()) == {module.sampler.timesteps[index].item()}
    with module.policy.adapters.use(OLD):
        settings = (module.policy.eval(), module.sampler, BATCH, module.sampling, module.guidance_scale, 1)
        want = sample_trajectories(*settings).latents[index]
    torch.testing.assert_close(found.latents, want)


@both_kinds
def test_the_policy_regresses_on_the_prediction_moved_along_the_gradient(name: str) -> None:
    """With one step, where the targets are mirror images; the toy reward's gradient is known."""
    module = attached(make(name, ascent_steps=1, radius=0.3, reward_sigmas=(0.0,), loss=NFTLoss(kl_weight=0.0)))
    moved(module)
    batch = module.roll_out(BATCH)
    states = module.renoise(batch)._replace(latents=batch.latents)
    old, output = (module.predict_under(adapter, batch, states) for adapter in (OLD, "policy"))
    before, now = (module.sampler.clean(batch.latents, one, batch.timesteps) for one in (old, output))
    above, below, rewards = module.targets(batch, old)
    away = torch.tensor([len(prompt) / 10 for prompt in PROMPTS]).view(-1, 1, 1, 1) - before  # to the best latents
    torch.testing.assert_close(rewards, -away.square().flatten(1).mean(dim=1))
    radius, length = (rows.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for rows in (0.3 * before, away))
    torch.testing.assert_close(above, before + radius / length * away)
    torch.testing.assert_close(above + below, 2 * before, rtol=1e-4, atol=1e-5)
    error = (now - above).flatten(1)
    want = 5 * (error.square().mean(dim=1) / error.abs().mean(dim=1)).mean()
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert any(weight.grad.any() for weight in adapter(module).values())
    assert all(weight.grad is None for weight in adapter(module, OLD).values())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_gradient_that_is_not_finite_is_the_rewards(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of later steps would else be blamed on the sampler."""
    plain = Brightness.score
    monkeypatch.setattr(Brightness, "score", lambda *given: plain(*given) + (0 * given[1].latents[:, 0, 0, 0]).sqrt())
    module = attached(make(ascent_steps=steps))
    with pytest.raises(InputError, match="reward Brightness has a gradient that is not finite; look at its formula"):
        module.training_step(module.roll_out(BATCH), 0)
