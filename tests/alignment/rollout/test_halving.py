"""Halving: which candidates are sampled on, what it costs, and that merged adapters change nothing."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import Halving, Policy, PolicySource, Sampling, sample_latents
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from tests.alignment.rollout.tiny_rollout import NetworkRows, tiny_policy
from tests.apps.generation.toy_rewards import MeanLatent
from tests.marks import slow_after

PROMPTS = PromptBatch(("a large red circle on a white background", "two blue crosss on a gray background"), ("0", "1"))


@pytest.mark.parametrize(("name", "guidance"), slow_after(2, [("sd_tiny", 1.0), ("sd_tiny", 3.0), ("sd35_tiny", 3.0)]))
def test_the_best_states_are_sampled_to_the_end(name: str, guidance: float) -> None:
    policy, sampling, reward = tiny_policy(name), Sampling(4, eta=0.0, noise_level=0.0), MeanLatent()
    with NetworkRows(policy) as calls:
        latents, rows = Halving(5, {0: 3, 2: 1}).sample(policy, reward, PROMPTS, sampling, guidance, 0)
    assert [rows for rows, _ in calls] == [each * (1 + (guidance > 1)) for each in (6, 6, 2, 2)]
    noises, later = (states.latents for states in reward.asked)
    best = noises.flatten(1).mean(dim=1).view(2, 5).topk(3, dim=1).indices.sort(dim=1).values
    left = later.flatten(1).mean(dim=1).view(2, 3).argmax(dim=1)
    assert rows.tolist() == (best.gather(1, left[:, None])[:, 0] + torch.tensor([0, 5])).tolist()
    names = PROMPTS.times(5).select(rows.tolist())
    torch.testing.assert_close(latents, sample_latents(policy, names, sampling, guidance, 0), rtol=1e-4, atol=1e-4)


def test_forward_passes_have_a_batch_of_rows_at_most() -> None:
    policy, sampling = tiny_policy("sd_tiny"), Sampling(2, eta=0.0)
    given = (policy, MeanLatent(), PROMPTS, sampling, 1.0, 0)
    with NetworkRows(policy) as calls:
        cut, rows = Halving(5, {1: 2}).sample(*given, batch_size=4)
    assert [rows for rows, _ in calls] == [4, 4, 2, 4]
    whole, same = Halving(5, {1: 2}).sample(*given)
    assert torch.equal(rows, same)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("best_of", "keep", "told"),
    [
        (4, {0: 5}, "after 0 steps there are 4 candidates"),
        (4, {1: 2, 2: 3}, "after 2 steps there are 2 candidates"),
        (4, {0: 0}, "1 to 4 can be kept"),
        (4, {8: 1}, "the sampler has 8 steps"),
        (4, {-1: 1}, "the sampler has 8 steps"),
        (1, {0: 1}, "best_of=1 leaves keep nothing"),
        (0, {}, "best_of"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(best_of: int, keep: dict[int, int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Halving(best_of, keep).check(8)


@pytest.fixture
def trained() -> Policy:
    """A policy whose adapter is not zero."""
    policy = PolicySource("sd_tiny").load().eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in policy.network.named_parameters():
        if ".lora_B." in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return policy


def test_merged_adapters_predict_the_same_and_leave_the_weights_as_they_were(trained: Policy) -> None:
    policy = trained
    before = {name: weight.detach().clone() for name, weight in policy.network.named_parameters()}
    latents, times = torch.randn(3, *policy.latent_shape()), torch.tensor([981.0, 501.0, 21.0])
    prompts = policy.encode_prompts(["a"] * 3)

    def predicted() -> Tensor:
        with torch.no_grad():
            return policy.predict(latents, times, prompts)

    with policy.reference():
        base = predicted()
    apart = predicted()
    with policy.adapters.merged():
        merged = predicted()
        layers = [layer for layer in policy.network.modules() if getattr(layer, "merged_adapters", None)]
        with policy.reference():
            assert torch.equal(predicted(), base)
        with policy.adapters.merged():  # a second one changes nothing
            assert torch.equal(predicted(), merged)
        assert torch.equal(predicted(), merged)
    assert layers
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)
    assert not torch.equal(merged, base)
    assert torch.equal(predicted(), apart)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.network.named_parameters())


def test_adapters_are_merged_neither_in_autocast_nor_in_bfloat16(trained: Policy) -> None:
    """Nor where layers share a weight, and not after an error."""
    policy = trained

    def merged() -> bool:
        with policy.adapters.merged():
            return any(getattr(layer, "merged_adapters", None) for layer in policy.network.modules())

    assert merged()
    with torch.autocast("cpu", torch.bfloat16):
        assert not merged()
    assert not any(getattr(layer, "merged_adapters", None) for layer in policy.network.modules())
    with pytest.raises(ZeroDivisionError), policy.adapters.merged():
        raise ZeroDivisionError
    assert not any(getattr(layer, "merged_adapters", None) for layer in policy.network.modules())
    first, second = [layer for layer in policy.network.modules() if hasattr(layer, "merged_adapters")][:2]
    second.get_base_layer().weight = first.get_base_layer().weight
    assert not merged()
    policy = PolicySource("sd_tiny", frozen_dtype="bfloat16").load().eval()
    assert not merged()
