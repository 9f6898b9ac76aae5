"""What every module has that learns from its own rollouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.alignment import LPOModule
from latentreward.core.contracts import PromptBatch, StepPairs
from latentreward.core.errors import InputError
from tests.alignment.modules.lpo_runs import PROMPTS, lpo, make_trainer


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


STATES, NUMBERS = torch.zeros(2, 4, 2, 2), torch.zeros(2)
ROWS = StepPairs(("a/0", "a/1"), ("a", "a"), STATES, NUMBERS, STATES, STATES, NUMBERS)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (
            {"gap": torch.zeros(3)},
            r"fields of unequal length \(keys 2, prompts 2, latents 2, timesteps 2, chosen 2, rejected 2, gap 3\);",
        ),
        ({"prompts": ("a",)}, r"fields of unequal length \(keys 2, prompts 1, "),
        ({"keys": ("a", "a")}, r"key 'a' for several rows; each must be unique"),
    ],
)
def test_rows_of_a_rollout_that_do_not_fit_together_are_named(
    changed: dict[str, Any], problem: str, module: LPOModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Any = ROWS
    monkeypatch.setattr(LPOModule, "make_experience", lambda self, prompts: rows)
    prompts = PromptBatch(("a",), ("a",))
    assert module.roll_out(prompts) is rows
    rows = replace(ROWS, **changed)
    message = rf"^LPOModule.make_experience returned StepPairs with {problem}.* \(test_rollout_module.py:\d+\)$"
    with pytest.raises(InputError, match=message):
        module.roll_out(prompts)
