"""LPO: what rollouts give, what a step does with it, and whole runs."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import RunProgress
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from latentreward.alignment import (
    Branching,
    FixedThreshold,
    LPOModule,
    Policy,
    Reward,
)
from latentreward.core.contracts import NoisyStates, PromptBatch, StepPairs, take_rows
from latentreward.core.errors import InputError
from tests.alignment.modules.lpo_runs import (
    PROMPTS,
    Brightness,
    BrightnessSource,
    loaders,
    lpo,
    make_trainer,
    saved_run,
    weights,
)
from tests.marks import rotated_after


class Remembering(Brightness):
    """A reward of a user's own, which is given as it was built: training mode, weights, and a count in a buffer."""

    count: Tensor
    last: Tensor | None

    def __init__(self, last: Tensor | None) -> None:
        super().__init__(10.0)
        self.layers = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1), nn.Dropout(0.5))
        nn.init.ones_(self.layers[1].weight)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", last)

    def score(self, states: NoisyStates, encoded: Tensor) -> Tensor:
        scores = self.layers(super().score(states, encoded)[:, None])[:, 0]
        self.count, self.last = self.count + len(scores), scores.mean()
        return scores * (1 + self.count / 100)


@dataclass
class RememberingSource(BrightnessSource):
    last: Tensor | None = field(default_factory=lambda: torch.zeros(()))

    def load(self, policy: Policy) -> Reward:
        return Remembering(self.last)


def test_an_own_reward_is_frozen_and_its_changing_buffers_are_in_checkpoints(tmp_path: Path) -> None:
    module = lpo(reward=RememberingSource())
    assert not any(part.training for part in module.train().reward.modules())
    assert not any(weight.requires_grad for weight in module.reward.parameters())
    runs = {"whole": None, "resumed": tmp_path / "whole" / "step=3.ckpt"}
    options = {"reward": RememberingSource(), "selection": FixedThreshold(0.0)}
    found = [saved_run(tmp_path / name, resume=path, options=options) for name, path in runs.items()]
    whole, resumed = (run["weights"] for run in found)
    stored = torch.load(runs["resumed"], weights_only=True)["state_dict"]  # type: ignore[arg-type]
    assert stored["reward.count"] > 0
    assert "reward.last" in stored
    assert "reward.layers.1.weight" not in stored
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_buffer_that_no_resumed_run_could_find_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^reward: buffer last of Remembering is None before the first score"):
        saved_run(tmp_path, options={"reward": RememberingSource(last=None)})


SHOWN = PromptBatch(PROMPTS[:3], ("0/0", "0/1", "0/2"))


@pytest.fixture(scope="module")
def module() -> LPOModule:
    return moved(lpo())


def moved(module: LPOModule) -> LPOModule:
    """As if it had trained: the adapter does something."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture(scope="module")
def pairs(module: LPOModule) -> StepPairs:
    with torch.no_grad():
        found = module.make_experience(SHOWN)
    assert found is not None
    return found


def test_a_rollout_gives_the_kept_pairs_and_their_statistics(module: LPOModule, pairs: StepPairs) -> None:
    statistics = module.rollout_statistics
    assert statistics is not None
    assert statistics.scores.shape == (3, 3, 3)
    assert torch.equal(statistics.timesteps, module.sampler.timesteps)
    assert len(pairs) == int(statistics.kept.sum())
    assert 0 < len(pairs) < 9
    assert torch.equal(statistics.kept, statistics.gap > 0.3)
    assert len(set(pairs.keys)) == len(pairs)
    assert {key.rpartition("/")[0] for key in pairs.keys} <= set(SHOWN.keys)
    for row, key in enumerate(pairs.keys):
        prompt, _, step = key.rpartition("/")
        assert pairs.prompts[row] == SHOWN.prompts[SHOWN.keys.index(prompt)]
        assert pairs.timesteps[row] == module.sampler.timesteps[int(step)]
        scored = NoisyStates(
            torch.stack([pairs.chosen[row], pairs.rejected[row]]), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        )
        better, worse = module.reward(scored, module.reward.encode_prompts([pairs.prompts[row]]))
        assert pairs.gap[row] == pytest.approx(torch.tanh((better - worse) / 2).item(), abs=1e-5)


def test_candidates_are_drawn_inside_the_window_only() -> None:
    module = lpo(candidates=Branching(num_candidates=2, low=300, high=700), threshold=0.0)
    with torch.no_grad():
        pairs = module.make_experience(SHOWN)
    assert pairs is not None
    assert set(pairs.timesteps.tolist()) == {334.0, 667.0}


def four_passes(module: LPOModule, pairs: StepPairs) -> torch.Tensor:
    """The released loop: chosen and rejected each pass policy and reference, conditional and unconditional apart."""
    uncond = module.policy.encode_uncond().select([0] * len(pairs))
    conditioning = module.policy.encode_prompts(pairs.prompts)

    def log_prob(following: torch.Tensor) -> torch.Tensor:
        given, empty = (module.policy.predict(pairs.latents, pairs.timesteps, side) for side in (conditioning, uncond))
        output = empty + module.guidance_scale * (given - empty)
        return module.sampler.transition(pairs.latents, output, pairs.timesteps).log_prob(following)

    with torch.no_grad(), module.policy.reference():
        reference = [log_prob(following) for following in (pairs.chosen, pairs.rejected)]
    return module.loss(log_prob(pairs.chosen), log_prob(pairs.rejected), *reference).loss


def gradients(module: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad]))


@pytest.mark.parametrize("scale", rotated_after(1, [1.0, 2.0, 5.0]))
def test_one_pass_each_equals_two_passes_each(scale: float, module: LPOModule, pairs: StepPairs) -> None:
    module.guidance_scale = scale
    module.loss.beta = 20.0  # at 500 these pairs are lost or won, without a gradient to compare
    ours, theirs = module.compare(pairs)[0].loss, four_passes(module, pairs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    mine = gradients(module, ours)
    largest = max(gradient.abs().max().item() for gradient in mine)
    assert largest > 1e-5
    for ours_of, theirs_of in zip(mine, gradients(module, theirs), strict=True):
        torch.testing.assert_close(ours_of, theirs_of, rtol=1e-3, atol=1e-6 * largest)
    module.guidance_scale, module.loss.beta = 2.0, 500.0


def test_the_networks_run_once_for_the_policy_and_once_for_the_reference(module: LPOModule, pairs: StepPairs) -> None:
    rows: list[int] = []
    handle = module.policy.network.register_forward_pre_hook(lambda network, args: rows.append(len(args[0])))
    module.compare(pairs)
    handle.remove()
    assert rows == [2 * len(pairs)] * 2


def test_a_fresh_adapter_has_ratio_one_and_a_step_moves_towards_the_chosen() -> None:
    module = lpo()
    with torch.no_grad():
        found = module.make_experience(SHOWN)
    assert found is not None
    pairs = take_rows(found, range(2))
    result, ratios = module.compare(pairs)
    assert result.loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert torch.equal(ratios.chosen, torch.zeros(2))
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter, gradient in zip(trained, gradients(module, result.loss), strict=True):
        parameter.data -= 1e-5 * gradient
    result, ratios = module.compare(pairs)
    assert result.implicit_accuracy == 1
    assert (ratios.chosen > ratios.rejected).all()
    assert result.loss < 0.6931


def test_rollouts_leave_modes_gradients_and_adapter_as_they_were() -> None:
    module = lpo(scale=float("nan"))
    module.trainer = make_trainer(Path())
    module.policy.network.mid_block.train()
    before = {name: part.training for name, part in module.named_modules()}
    with pytest.raises(InputError, match="returned nan"):
        module.roll_out(SHOWN)
    assert {name: part.training for name, part in module.named_modules()} == before
    assert torch.is_grad_enabled()
    assert len(weights(module)) > 0


def run(folder: Path, checkpoint: Path | None = None, **options: Any) -> LPOModule:
    module = lpo()
    trainer = make_trainer(folder, **options)
    trainer.fit(module, datamodule=loaders(), ckpt_path=checkpoint, weights_only=True)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_checkpoint_in_mid_rollout_leads_to_the_same_weights(accumulated: int, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    options = {"accumulate_grad_batches": accumulated, "enable_checkpointing": True}
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = weights(run(tmp_path, callbacks=[saver], **options))
    paths = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(paths) == 8 // accumulated
    for path in paths[: -1 : 2 // accumulated]:
        again = weights(run(tmp_path / "again", path, **options))
        assert all(torch.equal(again[name], value) for name, value in whole.items()), path


class Slopes(Callback):
    """Norm of all gradients at each optimiser step, and what was logged last."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        squares = [p.grad.square().sum() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.stack(squares).sum().sqrt().item())


def test_the_progress_line_begins_with_the_score_and_rollouts_show_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slopes, shown = Slopes(), RunProgress(every_s=1e-6)
    options = {"max_steps": 1, "log_every_n_steps": 1, "enable_progress_bar": True, "gradient_clip_val": 1e-4}
    trainer = make_trainer(tmp_path, callbacks=[slopes, shown], **options)
    module = lpo(threshold=0.0)
    trainer.fit(module, datamodule=loaders(prompts_per_rollout=2))
    lines, logged = capsys.readouterr().err.splitlines(), trainer.callback_metrics
    told = [line.split()[:2] for line in lines if line.startswith("rollout") and " left" in line]
    assert told[:3] == [["rollout", f"{step}/3"] for step in (1, 2, 3)]
    statistics = module.rollout_statistics
    assert statistics is not None
    assert f", rollout/score={statistics.scores.mean().item():.3g}, train/loss=" in lines[-1]
    assert logged["train/grad_norm"].item() == pytest.approx(slopes.norms[0], rel=1e-5)  # before clipping
    assert logged["train/lr"] == pytest.approx(1e-3)
    assert logged["rollout/score_std"].item() == pytest.approx(statistics.scores.std(1, correction=0).mean().item())
    speed = statistics.scores.numel() / logged["rollout/seconds"].item()  # 3 candidates of 2 prompts at 3 steps
    assert logged["rollout/samples_per_second"].item() == pytest.approx(speed)


def test_a_run_that_keeps_no_pair_says_which_gaps_there_were(tmp_path: Path) -> None:
    message = r"2 rollouts of 4 prompts kept nothing .* score gaps .* t=667: .*QuantileThreshold"
    with pytest.raises(InputError, match=message) as caught:
        make_trainer(tmp_path).fit(lpo(threshold=1.0), datamodule=loaders(max_empty_rollouts=2))
    assert len(re.findall(r"\n", str(caught.value))) == 0
