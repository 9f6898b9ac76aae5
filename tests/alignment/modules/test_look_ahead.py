"""Training of a reward to look ahead: states, loss, what is written, resumed runs and two processes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from latentreward.alignment import (
    LatentReward,
    LookAheadModule,
    PolicySource,
    RewardSource,
    Sampling,
    TrainedLoRA,
    sample_latents,
    warn_of_another_policy,
    within_prompts,
)
from latentreward.alignment.modules.look_ahead import LookAhead
from latentreward.alignment.rewards.look_ahead import seen_by
from latentreward.apps.generation import load_lora
from latentreward.core.contracts import LookAheadStates, PromptBatch
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from latentreward.reward import BradleyTerryLoss, LRMLoss, ModelSource, RewardModel
from tests.alignment.modules.batches import MODULES
from tests.alignment.modules.lpo_runs import loaders, make_trainer
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.alignment.modules.test_grpo import attached
from tests.distributed.ranks import on_ranks
from tests.marks import slow_after
from tests.tiny_pipelines import source_of

BATCH = PromptBatch(("a red circle", "a blue square"), ("0", "1"))
METHODS = {"sd15": "lrm", "sd35": "dina"}


def start_in(folder: Path, name: str = "sd15") -> ModelSource:
    """A stored reward of random weights on a tiny pipeline."""
    if not (folder / name).exists():
        MODULES[METHODS[name]](name).model.save_pretrained(folder / name, base=source_of(name))
    (folder / "held_out.txt").write_text("a gray circle\na gray square\na gray cross\n")
    return ModelSource(str(folder / name), base=source_of(name))


def make(folder: Path, name: str = "sd15", reward: RewardSource | None = None, **options: Any) -> LookAheadModule:
    settings: dict[str, Any] = {
        "sampling": Sampling(3, eta=0.0, noise_level=0.0),
        "record": (0, 2),
        "num_samples": 3,
        "guidance_scale": 1.0 if name == "sd15" else None,
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        "seed": 1,
        **options,
    }
    start = start_in(folder, name)
    held_out = str(folder / "held_out.txt")
    return LookAheadModule(PolicySource(source_of(name)), start, held_out, reward or FirstChannelReward(), **settings)


@pytest.mark.parametrize("name", slow_after(1, ["sd15", "sd35"]))
def test_states_and_scores_are_those_of_the_policys_samples(name: str, tmp_path: Path) -> None:
    module = attached(make(tmp_path, name, num_samples=2))
    rows = module.roll_out(BATCH)
    assert len(rows) == 4 and rows.latents.shape[:2] == (4, 2)
    ends = sample_latents(module.policy, BATCH.times(2), module.sampling, module.guidance_scale, 1)
    scores = 10 * ends[:, 0].flatten(1).mean(dim=1).view(2, 2)
    torch.testing.assert_close(rows.scores, scores.repeat(2, 1), rtol=1e-3, atol=1e-4)
    assert rows.timesteps.tolist() == module.sampler.timesteps[[0, 0, 2, 2]].tolist()
    within = scores - scores.mean(dim=1, keepdim=True)
    torch.testing.assert_close(rows.spread, within.std(correction=0).expand(4), rtol=1e-3, atol=1e-4)


def batch_of(scores: Tensor) -> LookAheadStates:
    return LookAheadStates(
        ("0", "1"), ("a", "b"), torch.zeros(2, 3, 1), torch.tensor([981.0, 1.0]), scores, torch.full((2,), 2.0)
    )


def test_losses_compare_the_samples_of_a_prompt(tmp_path: Path) -> None:
    """The mean of a prompt's scores has no effect, and pairs are those of a prompt."""
    module = attached(make(tmp_path))
    predicted, scores = (
        torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]),
        torch.tensor([[9.0, 8.0, 7.0], [5.0, 5.0, 5.0]]),
    )
    own, ends = (one - one.mean(dim=1, keepdim=True) for one in (predicted, scores))
    wanted = ((own - ends) / 2).square().mean()
    assert module.ahead.loss(predicted, batch_of(scores)).item() == pytest.approx(wanted.item())
    module.ahead.pair_loss = BradleyTerryLoss()
    margins, labels = torch.tensor([-1.0, -5, -4, 0, -3, -3]), torch.tensor([1.0, 1, 1, 0.5, 0.5, 0.5])
    nll = -(labels * torch.nn.functional.logsigmoid(margins) + (1 - labels) * torch.nn.functional.logsigmoid(-margins))
    assert module.ahead.loss(predicted, batch_of(scores)).item() == pytest.approx(nll.mean().item(), rel=1e-5)


def test_a_rollout_of_equal_scores_has_a_finite_loss() -> None:
    predicted = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], requires_grad=True)
    batch = replace(batch_of(torch.full((2, 3), 0.1)), spread=torch.full((2,), 3e-9))
    LookAhead.loss(cast(LookAhead, SimpleNamespace(pair_loss=None)), predicted, batch).backward()
    assert predicted.grad is not None and predicted.grad.abs().max() < 10


def test_a_policy_is_known_by_its_adapter_whatever_its_name(tmp_path: Path) -> None:
    policy = PolicySource(source_of("sd15"), lora=LoRA(rank=2, alpha=2.0)).load()
    bare = seen_by(policy, Sampling(3), 1.0)
    for name, weight in policy.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_()
    trained = seen_by(policy, Sampling(3), 1.0)
    TrainedLoRA.of_policy(policy).write_diffusers(tmp_path / "lora")
    exported = PolicySource(source_of("sd15")).load()
    load_lora(exported, tmp_path / "lora")
    assert bare["adapter"] is None
    assert trained["adapter"] == seen_by(exported, Sampling(3), 1.0)["adapter"] is not None


def test_correlation_is_within_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(40, 6, generator=generator), torch.randn(40, 6, generator=generator)
    offsets = 100 * torch.arange(40.0)[:, None]
    found = within_prompts(first + offsets, 0.6 * first + 0.8 * second - offsets)
    own, other = (one - one.mean(dim=1, keepdim=True) for one in (first, 0.6 * first + 0.8 * second))
    assert found.value == pytest.approx(np.corrcoef(own.flatten(), other.flatten())[0, 1], abs=1e-4)
    assert found.low < 0.6 < found.high and found.groups == 40


@pytest.mark.parametrize(("trains", "parts"), [("own", {"unet", "head"}), ("head", {"head"})])
def test_what_trains_is_what_the_reward_holds_itself(tmp_path: Path, trains: str, parts: set[str]) -> None:
    module = make(tmp_path, trains=trains)
    names = [name for name, weight in module.named_parameters() if weight.requires_grad]
    assert {name.removeprefix("ahead.model.").removeprefix("backbone.").partition(".")[0] for name in names} == parts
    loss = attached(module).training_step(module.roll_out(BATCH), 0)
    loss.backward()
    assert all(module.get_parameter(name).grad is not None for name in names)


def run(folder: Path, strategy: Any = "auto", resume: Path | None = None) -> dict[str, Any]:
    """Four optimiser steps with a checkpoint after two, in a rollout's rows."""
    module = make(folder.parent)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, enable_version_counter=False)
    settings: dict[str, Any] = {"max_epochs": -1, "max_steps": 4, "enable_checkpointing": True}
    trainer = make_trainer(folder, strategy, [saver], **settings)
    trainer.fit(module, datamodule=loaders(trainer.world_size), ckpt_path=resume, weights_only=True)
    trained = {name: one.detach().clone() for name, one in module.named_parameters() if one.requires_grad}
    return {"weights": trained, "before": {step: [*one] for step, one in module.before.items()}}


def test_a_resumed_run_equals_the_whole_one_and_leaves_a_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole")
    printed = capsys.readouterr().out
    assert "ρ looking ahead" in printed and str(tmp_path / "whole" / "look_ahead") in printed
    rest = run(tmp_path / "rest", resume=tmp_path / "whole" / "step=2.ckpt")
    assert rest["before"] == whole["before"]
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, rest["weights"][name]), name
    stored = RewardModel.from_pretrained(tmp_path / "whole" / "look_ahead", base=source_of("sd15"))
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, stored.get_parameter(name.removeprefix("ahead.model."))), name
    record = stored.recipe.training["look_ahead"]
    assert record["num_inference_steps"] == 3 and record["correlation"].keys() == {"0", "2"}
    reward = LatentReward(str(tmp_path / "whole" / "look_ahead"), base=source_of("sd15"))
    policy = PolicySource(source_of("sd15")).load()
    warn_of_another_policy(reward, policy, Sampling(3), 1.0)
    assert "trained on other states" not in caplog.text
    warn_of_another_policy(reward, policy, Sampling(4), 3.0)
    assert "num_inference_steps 3, here 4, guidance_scale 1.0, here 3.0" in caplog.text


def of_two(folder: Path) -> dict[str, Any]:
    return run(folder / "two", "ddp")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The whole of both ranks' prompts counts, in the spread, the loss and the correlations."""
    one = run(tmp_path / "one")
    for rank in on_ranks("tests.alignment.modules.test_look_ahead:of_two", tmp_path, timeout=600):
        assert rank["before"].keys() == one["before"].keys()
        for step, ends in one["before"].items():
            assert rank["before"][step] == pytest.approx(ends, abs=0.01)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_foresees_more(tmp_path: Path) -> None:
    module = make(tmp_path, num_samples=8, optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    data = loaders(batch_size=8, prompts_per_rollout=9, batches_per_epoch=100)
    make_trainer(tmp_path, max_steps=60, max_epochs=-1).fit(module, datamodule=data)
    after = module.correlations()
    assert after[0].value > module.before[0].value + 0.2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"record": ()}, r"record=\[\] must name"),
        ({"record": (0, 3)}, r"record=\[0, 3\] must name .* of 0 to 2"),
        ({"record": (2, 0)}, r"record=\[2, 0\]"),
        ({"num_samples": 1}, "num_samples"),
        ({"loss": LRMLoss(mode="batch")}, "compares prompts"),
        ({"trains": "all"}, "trains"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make(tmp_path, **options)


def test_a_reward_of_another_latent_space_and_training_prompts_are_refused(tmp_path: Path) -> None:
    start = start_in(tmp_path)
    with pytest.raises(InputError, match="makes latents of the space"):
        LookAheadModule(PolicySource(source_of("sd35")), start, str(tmp_path / "held_out.txt"))
    module = make(tmp_path)
    (tmp_path / "held_out.txt").write_text("a red circle\n")
    module = LookAheadModule(
        PolicySource(source_of("sd15")), start, str(tmp_path / "held_out.txt"), FirstChannelReward()
    )
    with pytest.raises(InputError, match="held_out: 1 of its prompts"):
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=loaders())
