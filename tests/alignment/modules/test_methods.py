"""What every method that learns from its own rollouts promises, over a list of the methods."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.alignment import GRPOGuard, MovingWindow, Pruning, RandomSteps, RankGate, Teacher
from latentreward.alignment.policies.policy import POLICY
from latentreward.data.alignment.prompts import PromptLoaders
from tests.alignment.modules.lpo_runs import lpo, make_trainer
from tests.alignment.modules.test_forward_process import BATCH, KINDS, PROMPTS, moved
from tests.alignment.modules.test_forward_process import make as forward
from tests.alignment.modules.test_grpo import attached, stepwise, trajectory
from tests.alignment.modules.test_grpo_steps import KL, mixture
from tests.alignment.modules.test_on_policy import make as distillation
from tests.alignment.modules.test_opsd import make as opsd
from tests.marks import rotated_after
from tests.tiny_pipelines import source_of

METHODS: dict[str, Callable[..., Any]] = {
    **{kind: partial(forward, kind) for kind in KINDS},
    "nft pruned": partial(forward, "nft", pruning=Pruning(6, 2)),
    "opsd": opsd,
    "distillation": distillation,
    "distillation of two": partial(
        distillation, Teacher(guidance_scale=3.0), Teacher(pipeline=source_of("sd35_tiny")), steps=RandomSteps(0.5)
    ),
    "lpo": partial(lpo, threshold=0.0),
    "grpo stepwise": partial(stepwise, "sd35_tiny"),
    "grpo": lambda **options: mixture(
        trust_region=[RankGate(), GRPOGuard()], window=MovingWindow(2, every=2), loss=KL, **options
    ),
    "grpo pruned": partial(trajectory, "sd35_tiny", pruning=Pruning(6, 2)),
}
every_method = pytest.mark.parametrize("method", rotated_after(2, METHODS))


def adapters(module: Any) -> dict[str, torch.Tensor]:
    """Weights of the policy's adapter and of its copies."""
    names = (POLICY, *module.policy.moving_adapters)
    named = module.policy.network.named_parameters()
    return {key: weight for key, weight in named if any(f".{name}." in key for name in names)}


@every_method
def test_the_policys_adapter_alone_gets_a_gradient(method: str) -> None:
    module = attached(METHODS[method]())
    if hasattr(module, "copies"):
        moved(module)
    loss: Any = module.training_step(module.roll_out(BATCH), 0)
    (loss["loss"] if isinstance(loss, dict) else loss).backward()
    trained = {name for name, weight in module.named_parameters() if weight.grad is not None}
    assert trained and all(f".{POLICY}." in name for name in trained)
    grads = [weight.grad for weight in module.parameters() if weight.grad is not None]
    assert all(grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)


@pytest.mark.parametrize("method", [*KINDS, "grpo stepwise", "grpo of finished samples"])
def test_equal_rewards_leave_nothing_to_learn(method: str) -> None:
    make = METHODS.get(method, partial(trajectory, "sd35_tiny"))
    assert attached(make(scale=0.0)).roll_out(BATCH) is None


@pytest.mark.slow
@every_method
def test_a_resumed_run_equals_the_whole_one(method: str, tmp_path: Path) -> None:
    """Stopped in the middle of a rollout's rows; the frozen weights stay as they were. A gate that adapts goes on."""
    results, gates = [], []
    for stop, resumed in ((5, None), (3, None), (5, tmp_path / "3.ckpt")):
        module = METHODS[method](optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3))
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)
        named = module.named_parameters()
        frozen = {name.removeprefix("policy.network."): one.clone() for name, one in named if not one.requires_grad}
        data = PromptLoaders(PROMPTS, batch_size=3, prompts_per_rollout=2, batches_per_epoch=6, seed=1)
        trainer = make_trainer(tmp_path, max_steps=stop)
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{stop}.ckpt")
        results.append({name: weight.detach().clone() for name, weight in adapters(module).items()})
        gates.append(module.gate.state() if getattr(module, "gate", None) else None)
        now = {name.removeprefix("policy.network."): weight for name, weight in module.named_parameters()}
        assert all(torch.equal(now[name], frozen[name]) for name in frozen.keys() - results[-1].keys())
    whole, stopped, again = results
    assert gates[0] == gates[2]
    assert any(not torch.equal(stopped[name], weight) for name, weight in whole.items())
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
