"""Linear-DPO in Diffusion-DPO's module: weights, soft labels, and a moving average as the reference."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from latentreward.alignment import LinearDPO, implicit_rewards
from latentreward.alignment.policies.moving_average import AVERAGE, DecayRamp
from tests.alignment.modules.lpo_runs import make_trainer
from tests.alignment.modules.test_diffusion_dpo import adapter, dpo, weighted_batch


def test_its_loss_is_a_weighted_difference_of_errors() -> None:
    module, batch = dpo(linear=LinearDPO(0.2)), weighted_batch(3)
    seen = {}
    linear = module.linear.forward
    module.linear.forward = lambda *args: seen.setdefault("result", linear(*seen.setdefault("args", args)))
    loss = module.training_step(batch, 0)
    prediction, reference, target, beta, labels = seen["args"]
    errors = (prediction - target).square().flatten(1).mean(dim=1)
    chosen, rejected = implicit_rewards(prediction, reference, target, beta).chunk(2)
    margin = chosen - rejected
    weight, other = (0.5 - 0.4 * margin).clamp(0.2, 0.8), (0.5 + 0.4 * margin).clamp(0.2, 0.8)
    want = (labels * weight - (1 - labels) * other) * (errors[:3] - errors[3:])
    torch.testing.assert_close(loss, want.mean(), rtol=1e-5, atol=1e-7)
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in adapter(module))


def run(folder: Path, steps: int, resumed: Path | None = None):
    module = dpo(
        moved=0.0,
        linear=LinearDPO(),
        reference=DecayRamp(1.0, 0.5),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=10.0),
    )
    del module.log
    module.moves = []
    follow = module.average.follow

    def watched(step: int) -> None:
        before = [weight.detach().clone() for weight in copy_of(module)]
        follow(step)
        module.moves.append((before, [weight.detach().clone() for weight in adapter(module)],
                             [weight.detach().clone() for weight in copy_of(module)]))  # fmt: skip

    module.average.follow = watched
    data = DataLoader([weighted_batch(2)] * 2, batch_size=None)  # two epochs; the first one is resumed at its end
    keep = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
    trainer = make_trainer(folder, callbacks=[keep], enable_checkpointing=True, max_epochs=steps // 2)
    trainer.fit(module, data, ckpt_path=resumed)
    return module


def copy_of(module):
    return [weight for name, weight in module.policy.network.named_parameters() if f".{AVERAGE}." in name]


@pytest.mark.slow
def test_the_average_follows_before_each_step_and_is_resumed(tmp_path: Path) -> None:
    whole = run(tmp_path, 4)
    assert len(whole.moves) == 4
    for number, (before, policy, after) in enumerate(whole.moves):
        decay = 0.5 if number else 0.0
        for old, new, found in zip(before, policy, after, strict=True):
            torch.testing.assert_close(found, decay * old + (1 - decay) * new)
    again = run(tmp_path, 4, tmp_path / "step=2.ckpt")
    for one, other in zip([*adapter(whole), *copy_of(whole)], [*adapter(again), *copy_of(again)], strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(one, other) for one, other in zip(adapter(whole), copy_of(whole), strict=True))
