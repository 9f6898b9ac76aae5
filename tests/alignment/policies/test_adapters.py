"""Switching adapters: outputs, ``requires_grad`` and the private fields of peft that it stands on."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from latentreward.alignment import Policy
from latentreward.diffusion.backbones.loading import load_weights
from tests.alignment.policies.alignment import prediction
from tests.alignment.policies.test_surrogate_gradient import REWARD, two_adapters


@pytest.fixture(params=["sd15", "sd35_no_t5"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return two_adapters(request.param, checkpointing=False)


def test_outputs_differ_by_adapter_and_come_back_exactly(policy: Policy) -> None:
    own = prediction(policy)
    with policy.adapters.use(REWARD):
        reward = prediction(policy)
        with policy.reference():
            bare = prediction(policy)
        assert torch.equal(prediction(policy), reward)
    assert torch.equal(prediction(policy), own)
    assert not torch.equal(own, reward)
    assert not torch.equal(own, bare)
    assert not torch.equal(reward, bare)


def test_switching_changes_nothing_that_trains(policy: Policy) -> None:
    def trains() -> dict[str, bool]:
        return {name: parameter.requires_grad for name, parameter in policy.named_parameters()}

    before = trains()
    assert any(before.values())
    for name in (REWARD, None):
        with policy.adapters.use(name):
            assert trains() == before
    assert trains() == before


def test_bare_network_equals_the_one_that_never_had_adapters(policy: Policy) -> None:
    part = "unet" if hasattr(policy.network, "up_blocks") else "transformer"
    never_had = load_weights(type(policy.network), policy.source, subfolder=part)
    with policy.reference():
        bare = prediction(policy)
    policy.network = never_had
    assert torch.equal(prediction(policy), bare)


def test_an_adapter_that_is_not_there_is_named(policy: Policy) -> None:
    with (
        pytest.raises(ValueError, match=r"no adapter 'rewards', only \['policy', 'reward'\]"),
        policy.adapters.use("rewards"),
    ):
        pass


def test_private_fields_of_peft_decide_what_is_at_work() -> None:
    layer = next(module for module in two_adapters("sd15", False).network.modules() if isinstance(module, LoraLayer))
    message = "peft changed how it keeps active adapters; policies/adapters.py sets these fields and must follow"
    fields = vars(layer).keys() | vars(type(layer)).keys() | vars(BaseTunerLayer).keys()
    assert {"_active_adapter", "_disable_adapters"} <= fields, message
    for active, disabled in ((["reward"], False), ([], True), (["policy"], False)):
        layer._active_adapter, layer._disable_adapters = active, disabled
        assert layer.active_adapters == active, message
        assert layer.disable_adapters == disabled, message
