"""Whole trajectories; diffusers' own pipelines are the oracle for what comes out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    Policy,
    PolicySource,
    PromptedPolicy,
    RolloutDraws,
    Sampling,
    sample_latents,
    sample_trajectories,
    score_finished,
)
from latentreward.core.contracts import PromptBatch
from latentreward.diffusion.backbones.loading import tiny_pipeline
from tests.alignment.rollout.tiny_rollout import PROMPTS, tiny_policy
from tests.marks import rotated_after, slow_after

STEPS = Sampling(num_inference_steps=5).with_noise()
both_families = pytest.mark.parametrize("name", slow_after(1, ["sd35_tiny", "sd_tiny"]))


def diffusers_latents(name: str, initial: Tensor, guidance_scale: float, steps: int) -> Tensor:
    """What the shipped pipeline makes of the initial latents with its own scheduler."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    absent: dict[str, Any] = {} if name == "sd_tiny" else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(tiny_pipeline(name), torch_dtype=torch.float32, **absent)
    options: dict[str, Any] = {"max_sequence_length": 0}
    if name == "sd_tiny":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        options = {"eta": 0.0}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(PROMPTS.prompts),
        latents=initial,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).images


@both_families
@pytest.mark.parametrize("guidance_scale", rotated_after(1, [1.0, 3.0]))
def test_without_noise_samples_are_those_of_diffusers(name: str, guidance_scale: float) -> None:
    policy, still = tiny_policy(name), Sampling(5, eta=0.0, noise_level=0.0)
    found = sample_latents(policy, PROMPTS, still, guidance_scale, seed=0)
    initial = RolloutDraws(0, PROMPTS.keys).initial(policy.latent_shape())
    expected = diffusers_latents(name, initial, guidance_scale, 5)
    # Five float32 steps: from CPU to CPU up to 3e-5 were seen, and above 1e-2 by another guidance or sampler.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@both_families
def test_log_probabilities_are_those_of_the_steps(name: str) -> None:
    policy = tiny_policy(name)
    sampler = STEPS.sampler(policy.family)
    taken = sample_trajectories(policy, sampler, PROMPTS, STEPS, 3.0, seed=0)
    assert taken.latents.shape == (6, 3, *policy.latent_shape())
    assert torch.equal(taken.timesteps, sampler.timesteps)
    assert (taken.log_prob != 0).all()
    conditioning, uncond = policy.encode_prompts(PROMPTS.prompts), policy.encode_uncond()
    for index in range(5):
        timesteps = taken.timesteps[index].expand(3)
        with torch.no_grad():
            output = policy.predict_guided(taken.latents[index], timesteps, conditioning, uncond, 3.0)
        transition = sampler.transition(taken.latents[index], output, timesteps)
        torch.testing.assert_close(taken.log_prob[index], transition.log_prob(taken.latents[index + 1]))
    assert torch.equal(taken.finished, sample_latents(policy, PROMPTS, STEPS, 3.0, seed=0))


def test_text_is_packed_for_guidance_once_in_a_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt's text is copied at the first step alone, and answers are those for text packed anew."""
    policy, packed = tiny_policy("sd35_tiny"), []
    pack = Policy.with_uncond
    monkeypatch.setattr(Policy, "with_uncond", lambda *given: packed.append(given) or pack(*given))
    sample_trajectories(policy, STEPS.sampler(policy.family), PROMPTS, STEPS, 3.0, seed=0)
    assert len(packed) == 1
    network, latents = PromptedPolicy.of(policy, PROMPTS, 3.0), torch.randn(6, *policy.latent_shape())
    with torch.no_grad():
        for number in (6, 3, 6):
            timesteps, every = torch.full((number,), 500.0), network.conditioning.select([0, 1, 2] * (number // 3))
            expected = policy.predict_guided(latents[:number], timesteps, every, network.uncond, 3.0)
            assert torch.equal(network(latents[:number], 500.0), expected)
    assert len(packed) == 6


def test_a_prompt_is_sampled_alike_in_any_batch() -> None:
    policy = tiny_policy("sd35_tiny")
    together = sample_latents(policy, PROMPTS, STEPS, 3.0, seed=0)
    alone = sample_latents(policy, PromptBatch(PROMPTS.prompts[1:2], PROMPTS.keys[1:2]), STEPS, 3.0, seed=0)
    torch.testing.assert_close(alone, together[[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_reference_samples_come_from_the_bare_network() -> None:
    policy: Policy = PolicySource("sd_tiny").load().eval()
    before = sample_latents(policy, PROMPTS, STEPS, 3.0, seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    after = sample_latents(policy, PROMPTS, STEPS, 3.0, seed=0)
    assert not torch.allclose(after, before, atol=0.01)
    assert torch.equal(sample_latents(policy, PROMPTS, STEPS, 3.0, seed=0, reference=True), before)
    assert torch.equal(sample_latents(policy, PROMPTS, STEPS, 3.0, seed=0), after)


class Noise:
    """A reward that is the noise it is given."""

    def encode_prompts(self, prompts: Any) -> None:
        return None

    def score_clean(self, latents: Tensor, rows: Tensor, encoded: None, noise: Tensor, sigmas: Any) -> Tensor:
        return noise.flatten(1).sum(dim=1)


def test_the_samples_of_a_prompt_are_scored_with_one_noise_that_its_key_names() -> None:
    def noises(*keys: str) -> list[list[float]]:
        prompts, reward = PromptBatch(("a cat",) * len(keys), keys), Noise()
        scores = score_finished(reward, torch.zeros(2 * len(keys), 4, 2, 2), prompts, 0, (0.4,))  # type: ignore[arg-type]
        return scores.view(-1, 2).tolist()

    first, second = noises("0/0", "0/1")
    assert first[0] == first[1] != second[0] == second[1]
    assert noises("0/1", "0/0") == [second, first]
