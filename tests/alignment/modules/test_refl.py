"""ReFL and PRFL: the gradient against full differentiation and differences, what holds a graph, terms, training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from latentreward.alignment import (
    AlignmentModule,
    LatentReward,
    ReFLModule,
    RewardLoss,
    RewardSource,
    RolloutDraws,
    Sampling,
)
from latentreward.core.contracts import NoisyStates, PromptBatch
from latentreward.core.errors import InputError
from latentreward.data import PairBatchSampler, PromptsAndImages, collate_pairs
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.data.loading import ResumableLoader
from tests.alignment.modules.batches import loaded_pairs
from tests.alignment.modules.lpo_runs import make_trainer
from tests.alignment.modules.test_opsd import make as opsd
from tests.alignment.modules.toy_rewards import BrightnessSource
from tests.alignment.policies.alignment import tiny_source
from tests.alignment.rewards.stored import write_run
from tests.marks import rotated_after

PROMPTS = PromptBatch(("a cat", "two dogs"), ("0/0", "0/1"))
POLICIES = ("sd15", "sd21", "sd35")


def refl(
    name: str = "sd15", policy: dict[str, Any] | None = None, reward: RewardSource | None = None, **options: Any
) -> ReFLModule:
    defaults: dict[str, Any] = {
        "sampling": Sampling(num_inference_steps=4),
        "stop_range": (1, 3),
        "kl_weight": 0.0,
        "guidance_scale": 1.0,
        "seed": 1,
    }
    module = ReFLModule(tiny_source(name, **(policy or {})), reward or BrightnessSource(), **{**defaults, **options})
    torch.manual_seed(0)
    with torch.no_grad():  # B = 0 has no gradient in A, and policy = reference has no drift
        for parameter in adapter(module):
            parameter.add_(0.05 * torch.randn_like(parameter))
    module.log = lambda *args, **kwargs: None
    return module


def adapter(module: ReFLModule) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.policy.network.parameters() if parameter.requires_grad]


def gradient(module: ReFLModule, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, adapter(module), allow_unused=True, materialize_grads=True)
    return torch.cat([value.flatten() for value in gradients])


def in_full(module: ReFLModule, stop: int, from_step: int) -> Tensor:
    """Loss of PROMPTS with everything from ``from_step`` on in one graph, written without the module's loop."""
    policy, sampler, draws = module.policy, module.sampler, RolloutDraws(module.seed, PROMPTS.keys)
    shape = policy.latent_shape()
    conditioning, uncond = policy.encode_prompts(PROMPTS.prompts), policy.encode_uncond()
    latents, drifts = draws.initial(shape), []
    for index in range(stop + 1):
        latents = latents.detach() if index <= from_step else latents
        timesteps = sampler.timesteps[index].repeat(len(PROMPTS))
        output = policy.predict_guided(latents, timesteps, conditioning, uncond, module.guidance_scale)
        with policy.reference():  # differentiated too: it reads latents that depend on the policy
            reference = policy.predict_guided(latents, timesteps, conditioning, uncond, module.guidance_scale)
        if index >= from_step:
            drifts.append((output - reference).square().mean())
        if index == stop and module.scored == "clean":
            break
        transition = sampler.transition(latents, output, timesteps)
        noise = draws.noise(index, 1, shape)[0] if sampler.noise_std[index] else torch.zeros_like(latents)
        latents = transition.mean + transition.std.view(-1, 1, 1, 1) * noise
    encoded, rows = module.reward.encode_prompts(PROMPTS.prompts), torch.arange(2)
    if module.scored == "state":
        rewards = module.reward.score(NoisyStates(latents, sampler.timesteps[stop + 1].repeat(2), rows), encoded)
    else:
        clean = sampler.clean(latents, output, timesteps)
        rewards = module.reward.score_clean(clean, rows, encoded, reward_noise(module), module.reward_sigmas)
    return module.loss(rewards) + module.kl_weight * torch.stack(drifts).mean()


def reward_noise(module: ReFLModule) -> Tensor:
    """The noise that the module draws for the reward."""
    seen: list[Tensor] = []
    original = module.reward.score_clean

    def spy(latents: Tensor, rows: Tensor, encoded: Any, noise: Tensor, sigmas: Any) -> Tensor:
        seen.append(noise)
        return original(latents, rows, encoded, noise, sigmas)

    module.reward.score_clean = spy
    module.reward_term(PROMPTS, torch.zeros(2, *module.policy.latent_shape(), requires_grad=True))
    module.reward.score_clean = original
    return seen[0]


# the gradient


PRFL = {"scored": "state", "stop_range": (2, 4), "loss": RewardLoss(0.1, 2.0, sigmoid=True)}


@pytest.mark.parametrize(
    "options", [{}, {"gradient_steps": 3, "kl_weight": 0.7}, PRFL], ids=["refl", "draft_k", "prfl"]
)
@pytest.mark.parametrize("name", rotated_after(1, POLICIES))
def test_gradient_equals_that_of_one_graph(name: str, options: dict[str, Any]) -> None:
    module = refl(name, guidance_scale=2.0, reward_sigmas=(0.2, 0.6), **options)
    stop = module.stop_index(0)
    loss = module.training_step(PROMPTS, 0)
    expected = in_full(module, stop, stop + 1 - module.gradient_steps)
    torch.testing.assert_close(loss.detach(), expected.detach())
    torch.testing.assert_close(gradient(module, loss), gradient(module, expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("gradient_steps", "scored"), rotated_after(1, [(2, "clean"), (1, "state"), (1, "clean"), (3, "clean")])
)
def test_gradient_is_the_slope_of_the_loss(gradient_steps: int, scored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Central differences in float64; the first step with a graph is the very first one, so that nothing is cut off."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # what the module casts to float32 stays float64
    left = 5 - gradient_steps
    options = {"stop_range": (left, left), "gradient_steps": gradient_steps, "guidance_scale": 2.0}
    module = refl(kl_weight=30.0, scored=scored, **options)
    module.policy.network.double()
    slopes = gradient(module, module.training_step(PROMPTS, 0))
    direction, values = torch.randn(slopes.shape, generator=torch.Generator().manual_seed(0)).double(), []
    for step in (1e-5, -2e-5):
        for parameter, part in zip(adapter(module), direction.split([p.numel() for p in adapter(module)]), strict=True):
            parameter.data.add_(part.view_as(parameter), alpha=step)
        values.append(module.training_step(PROMPTS, 0).item())
    assert slopes @ direction == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_only_the_last_steps_hold_a_graph() -> None:
    module = refl(gradient_steps=2, stop_range=(1, 1))
    passes: list[bool] = []
    module.policy.network.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    module.training_step(PROMPTS, 0)
    assert passes == [False] * 2 + [True] * 2


def test_training_mode_comes_back_and_sampling_has_no_dropout() -> None:
    module = refl()
    module.policy.network.train()
    modes: list[bool] = []
    module.policy.network.register_forward_hook(lambda network, *_: modes.append(network.training))
    module.training_step(PROMPTS, 0)
    assert modes == [False] * (len(modes) - 1) + [True]
    assert module.policy.network.training
    assert not module.policy.text_encoder.training


SMALL = {"tuning": "lora", "lora": {"rank": 2, "alpha": 4.0}, "text_encoder_tuning": "frozen"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "options"),
    rotated_after(
        2,
        [
            ("lrm", "sd15", {"reward_sigmas": (0.3,)}),
            ("dina", "sd35", {"reward_sigmas": (0.2, 0.5, 0.7)}),
            ("dina", "sd35", {"reward_sigmas": (0.4,)}),
            ("lrm", "sd15", PRFL),
            ("dina", "sd35", PRFL),
        ],
    ),
)
def test_a_reward_on_the_policys_own_network_under_checkpointing(
    method: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Its gradient is that of a reward with a network of its own, without checkpointing."""
    write_run(tmp_path, method, name, **SMALL)
    grads = []
    for share, checkpointing in (("never", False), ("auto", True)):
        reward = LatentReward(str(tmp_path), share=share)
        policy = {"gradient_checkpointing": checkpointing}
        module = refl(name, policy, reward, kl_weight=0.1, gradient_steps=2, **options)
        module.training_step(PROMPTS, 0).backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in adapter(module)]))
        assert all(p.grad is None for key, p in module.named_parameters() if not p.requires_grad)
    assert grads[0].norm() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6 * grads[0].abs().max().item())


# what is drawn


@pytest.mark.parametrize(("options", "stops"), [({"stop_range": (2, 4)}, {0, 1, 2}), (PRFL, {0, 1, 2})])
def test_stops_cover_their_range(options: dict[str, Any], stops: set[int]) -> None:
    """Of 4 steps, so many left; PRFL's state after the last of them is never the finished one."""
    module = refl(**options)
    assert {module.stop_index(number) for number in range(40)} == stops


def test_stops_of_an_epoch_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module, drawn = refl(), []
    for epoch in (0, 1, 0):
        monkeypatch.setattr(ReFLModule, "current_epoch", epoch)
        drawn.append([module.stop_index(number) for number in range(20)])
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_prompt_is_sampled_alike_in_any_batch() -> None:
    module = refl(guidance_scale=2.0)
    whole = module.sample(PROMPTS, 3)[0]
    alone = module.sample(PromptBatch(PROMPTS.prompts[1:2], PROMPTS.keys[1:2]), 3)[0]
    torch.testing.assert_close(whole[1:], alone, rtol=1e-4, atol=1e-5)


# terms and limits


@pytest.mark.slow
def test_pretraining_steps_alternate_with_steps_of_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = refl(pretraining_weight=2.0, alternate_pretraining=True)
    batch = {"prompts": PROMPTS, "images": collate_pairs(loaded_pairs(3))}
    plain = refl().training_step(PROMPTS, 0)
    for step in range(4):
        monkeypatch.setattr(ReFLModule, "global_step", step)
        wanted = 2 * module.pretraining_term(batch["images"]) if step % 2 else plain
        torch.testing.assert_close(module.training_step(batch, 0), wanted, rtol=0, atol=0)
    with pytest.raises(InputError, match="pretraining_weight needs images beside the prompts"):
        module.training_step(PROMPTS, 0)
    with pytest.raises(InputError, match="alternate_pretraining=true alternates with a term of weight 0"):
        refl(alternate_pretraining=True)


def test_pretraining_term_is_the_denoising_error_of_the_chosen_images() -> None:
    module = refl(pretraining_weight=2.0)
    images = collate_pairs(loaded_pairs(3))
    batch = {"prompts": PROMPTS, "images": images}
    reward = module.reward_term(PROMPTS, module.sample(PROMPTS, module.stop_index(0))[0])[0]
    error = module.pretraining_term(images)
    torch.testing.assert_close(module.training_step(batch, 0), reward + 2 * error)
    assert error.requires_grad
    assert 0.1 < error.item() < 10
    torch.testing.assert_close(module.pretraining_term(replace(images, rejected=images.rejected * 0)), error)
    assert module.pretraining_term(replace(images, chosen=images.chosen * 0)).item() != pytest.approx(error.item())
    with pytest.raises(InputError, match="pretraining_weight needs images beside the prompts"):
        module.training_step(PROMPTS, 0)


# training


class Pairs(LightningDataModule):
    """Eight pairs in batches of two, in another order each epoch."""

    def train_dataloader(self) -> ResumableLoader:
        places = PairBatchSampler(8, batch_size=2, seed=0)
        return ResumableLoader(loaded_pairs(8), places, collate_fn=collate_pairs)


@pytest.mark.slow
def test_a_resumed_run_with_steps_of_its_own_for_images_equals_the_whole_one(tmp_path: Path) -> None:
    """Resumed in the middle of an epoch, after a step of the reward: the next one is one of the images."""
    results: list[dict[str, Tensor]] = []
    steps: list[list[str]] = []
    for resumed in (None, tmp_path / "step=3.ckpt"):
        options = {**PRFL, "pretraining_weight": 0.5, "alternate_pretraining": True}
        module = refl("sd35", optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05), **options)
        del module.log
        taken: list[str] = []
        for name in ("pretraining_term", "reward_term"):
            setattr(module, name, noted(getattr(module, name), name, taken))
        prompts = PromptLoaders(["a cat", "two dogs", "sun"], batch_size=2, batches_per_epoch=9, seed=0)
        keep = [] if resumed else [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)]
        run = make_trainer(tmp_path, callbacks=keep, enable_checkpointing=not resumed, max_steps=6, max_epochs=-1)
        run.fit(module, datamodule=PromptsAndImages(prompts, Pairs()), ckpt_path=resumed)
        results.append({name: weight.detach() for name, weight in module.named_parameters() if weight.requires_grad})
        steps.append(taken)
    assert steps == [["reward_term", "pretraining_term"] * 3, ["pretraining_term", "reward_term", "pretraining_term"]]
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(saved[name], weight) for name, weight in results[0].items())
    assert all(torch.equal(results[1][name], weight) for name, weight in results[0].items())


def noted(function: Callable[..., Any], name: str, taken: list[str]) -> Callable[..., Any]:
    """The function, which writes its name down at each call."""
    return lambda *given: taken.append(name) or function(*given)


@pytest.mark.parametrize("make", [refl, opsd])
def test_float16_is_refused(make: Callable[[], AlignmentModule]) -> None:
    module: Any = make()
    module._trainer = type("Stub", (), {"precision": "16-mixed", "world_size": 1, "strategy": None})()  # needs a GPU
    with pytest.raises(InputError, match="use bf16-mixed"):
        module.setup("fit")
