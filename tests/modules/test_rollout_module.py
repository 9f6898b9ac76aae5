"""What every module has that learns from its own rollouts."""

from pathlib import Path

import pytest
import torch

from latentreward.modules import LPOModule
from tests.modules.lpo_runs import PROMPTS, lpo, make_trainer


@pytest.fixture(scope="module")
def module() -> LPOModule:
    module = lpo()
    module.trainer = make_trainer(Path())
    return module


def test_prompts_of_a_rollout_are_encoded_once(module: LPOModule, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, empty = module.conditioning(PROMPTS[:3])
    module.prepare_prompts(PROMPTS)
    monkeypatch.setattr(module.policy, "encode_prompts", lambda prompts: pytest.fail(f"encoded {prompts} again"))
    rows = [2, 0, 1, 0]
    stored, uncond = module.conditioning([PROMPTS[row] for row in rows])
    torch.testing.assert_close(stored.prompt_embeds, fresh.select(rows).prompt_embeds, rtol=1e-5, atol=1e-5)
    assert empty is not None
    assert uncond is not None
    torch.testing.assert_close(uncond.prompt_embeds, empty.prompt_embeds)


def test_each_prompt_is_encoded_alone(module: LPOModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rollout that a checkpoint cut, fewer prompts are left; on some CPUs last bits change with their number."""
    asked, encode = [], module.policy.encode_prompts
    monkeypatch.setattr(module.policy, "encode_prompts", lambda prompts: asked.append(prompts) or encode(prompts))
    module.prepare_prompts(PROMPTS)
    assert asked[: len(PROMPTS)] == [[prompt] for prompt in PROMPTS]


def test_prompts_that_nobody_announced_are_encoded_all_the_same(module: LPOModule) -> None:
    module.prepare_prompts(PROMPTS[:2])
    conditioning, _ = module.conditioning(["a yellow cross", PROMPTS[0]])
    expected = module.policy.encode_prompts(["a yellow cross", PROMPTS[0]])
    assert torch.equal(conditioning.prompt_embeds, expected.prompt_embeds)


def test_stored_prompts_are_in_no_checkpoint(module: LPOModule) -> None:
    names = set(module.state_dict())
    module.prepare_prompts(PROMPTS)
    assert set(module.state_dict()) == names
