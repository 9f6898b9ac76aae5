"""Steps as Gaussians, against torch's own distributions and against closed forms."""

import pytest
import torch
from torch.distributions import Normal

from latentreward.alignment import PolicySource, Sampling, Transition
from latentreward.core.errors import InputError

SHAPE = (3, 4, 5, 6)


@pytest.fixture
def transition() -> Transition:
    generator = torch.Generator().manual_seed(0)
    std = torch.tensor([0.02, 0.4, 1.7])
    return Transition(torch.randn(SHAPE, generator=generator), std, std)


def test_log_prob_is_the_mean_of_the_normal_density(transition: Transition) -> None:
    candidates = transition.sample(torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)))
    normal = Normal(transition.mean, transition.std.view(-1, 1, 1, 1))
    expected = normal.log_prob(candidates).mean(dim=(2, 3, 4))
    torch.testing.assert_close(transition.log_prob(candidates), expected)
    torch.testing.assert_close(transition.log_prob(candidates[2]), expected[2])


def test_gradient_is_the_error_over_the_variance(transition: Transition) -> None:
    mean = transition.mean.clone().requires_grad_()
    where = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).requires_grad_()
    Transition(mean, transition.std, transition.spread).log_prob(where).sum().backward()
    variance = transition.std.view(-1, 1, 1, 1) ** 2
    torch.testing.assert_close(mean.grad, (where.detach() - mean.detach()) / variance / (4 * 5 * 6))
    assert where.grad is None


@pytest.mark.parametrize("source", ["sd_tiny", "sd35_tiny"])
def test_a_sampler_without_noise_has_no_log_prob(source: str) -> None:
    family = PolicySource(source).resolve_family()
    sampler = Sampling(num_inference_steps=4).sampler(family)
    latents = torch.randn(2, *Sampling().latent_shape(family), generator=torch.Generator().manual_seed(0))
    step = sampler.transition(latents, latents, sampler.timesteps[:1].expand(2))
    with pytest.raises(InputError, match=r"standard deviation of every step .* is 0.*with_noise\(\)"):
        step.log_prob(latents)


def test_half_precision_states_are_scored_in_float32(transition: Transition) -> None:
    where = transition.sample(torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))).half()
    log_prob = transition.log_prob(where)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, transition.log_prob(where.float()))
