"""RefreshLookAhead in runs of alignment: what it learns from, exact resumes, what it leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import RefreshLookAhead
from lightning.pytorch.callbacks import ModelCheckpoint

from latentreward.alignment import PolicySource, Pruning, RAMModule, Sampling, within_prompts
from latentreward.core.contracts import LookAheadStates
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from latentreward.reward import RewardModel
from tests.alignment.modules.lpo_runs import loaders, lpo, make_trainer
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.alignment.modules.test_look_ahead import start_in
from tests.distributed.ranks import on_ranks
from tests.tiny_pipelines import source_of


def ram(**options: Any) -> RAMModule:
    settings: dict[str, Any] = {"sampling": Sampling(4), "num_samples": 3, "draws": 1, "seed": 0, **options}
    policy = PolicySource(source_of("sd15"), lora=LoRA(rank=2, alpha=2.0))
    return RAMModule(
        policy, FirstChannelReward(), optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2), **settings
    )


def run(
    folder: Path, strategy: Any = "auto", resume: Path | None = None, record: tuple[int, ...] = (0, 2), **options: Any
) -> tuple[RefreshLookAhead, RAMModule]:
    """Seven optimiser steps, a rollout for each three; a refresh after the second rollout, and at the end."""
    callback = RefreshLookAhead(start_in(folder.parent), every_n_rollouts=2, record=record, batch_size=2, lr=1e-3)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1, enable_version_counter=False)
    module = ram(**options)
    settings: dict[str, Any] = {"max_epochs": -1, "max_steps": 7, "enable_checkpointing": True}
    trainer = make_trainer(folder, strategy, [callback, saver], **settings)
    trainer.fit(module, datamodule=loaders(trainer.world_size), ckpt_path=resume, weights_only=True)
    return callback, module


def test_a_resumed_run_leaves_the_same_reward(tmp_path: Path) -> None:
    """The policy learns as it would without the callback."""
    callback, module = run(tmp_path / "whole")
    assert callback.rollouts == 3 and callback.refreshes == 2 and callback.correlation.keys() == {0, 2}
    again, _ = run(tmp_path / "rest", resume=tmp_path / "whole" / "step=3.ckpt")
    assert again.refreshes == 2 and again.correlation == callback.correlation
    plain = ram()
    make_trainer(tmp_path / "plain", max_steps=7, max_epochs=-1).fit(plain, datamodule=loaders())
    for (name, one), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name
    stored, resumed = (
        RewardModel.from_pretrained(tmp_path / name / "look_ahead", base=source_of("sd15"))
        for name in ("whole", "rest")
    )
    before = RewardModel.from_pretrained(tmp_path / "sd15", base=source_of("sd15"))
    assert stored.recipe.training["look_ahead"]["num_inference_steps"] == 4
    for (name, one), other in zip(stored.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert any(not torch.equal(one, other) for one, other in zip(stored.parameters(), before.parameters(), strict=True))


def test_pruned_rollouts_serve_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are those of the candidates with the scores: before the last step they foretell these."""
    seen, learn = list[LookAheadStates](), RefreshLookAhead._refresh
    monkeypatch.setattr(
        RefreshLookAhead, "_refresh", lambda self, *given: (seen.extend(self.rows), learn(self, *given))
    )
    callback, _ = run(tmp_path / "pruned", record=(0, 3), pruning=Pruning(5, 1))
    assert callback.refreshes == 2
    late = [row for row in seen if row.keys[0].endswith("/0003")]
    means = torch.cat([row.latents[:, :, 0].flatten(2).mean(dim=2) for row in late])
    assert within_prompts(means, torch.cat([row.scores for row in late])).value > 0.9


def of_two(folder: Path) -> Any:
    callback, _ = run(folder / "two", "ddp")
    correlation = {step: list(one) for step, one in callback.correlation.items()}
    return {"weights": {name: one.detach() for name, one in callback.trained.items()}, "rho": correlation}


@pytest.mark.slow
def test_two_processes_hold_one_reward(tmp_path: Path) -> None:
    """They learn from the rollouts of both, and measure ρ on both."""
    start_in(tmp_path)
    first, second = on_ranks("tests.callbacks.test_look_ahead:of_two", tmp_path, timeout=600)
    assert first["rho"] == second["rho"] and [one[3] for one in first["rho"].values()] == [4, 4]
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name


def test_a_method_without_finished_samples_is_refused(tmp_path: Path) -> None:
    callback = RefreshLookAhead(start_in(tmp_path), record=(0, 1))
    with pytest.raises(InputError, match="LPOModule scores no finished samples"):
        make_trainer(tmp_path, "auto", [callback], max_steps=1).fit(lpo(), datamodule=loaders())
