"""Rollouts behind Lightning's loop: steps stay steps, nothing is lost, every checkpoint leads to the same end."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from latentreward.core.contracts import StepPairs, sources_of
from latentreward.core.errors import InputError
from latentreward.data.alignment.experience import ExperienceSampler, as_plain, from_plain
from latentreward.data.alignment.prompts import PromptOrder
from tests.data.rolling import EDITS, PROMPTS, STEPS, OwnRolling, RollingModule, SaveAlways, fit, make_trainer
from tests.marks import slow_after

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "long accumulation": {"accumulate_grad_batches": 4},
    "limited epochs": {"limit_train_batches": 3, "accumulate_grad_batches": 2},
    "by steps": {"max_steps": 8, "max_epochs": None},
    "own rows": {},
    "edits": {},
}
PROMPTS_OF: dict[str, Any] = {"edits": {"prompts": EDITS}}
MODULES: dict[str, type[RollingModule]] = {"own rows": OwnRolling}


def keys(module: RollingModule) -> list[str]:
    return [key for _, batch in module.seen for key in batch]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*slow_after(1, [*SETTINGS][:-2]), "own rows", "edits"])
def test_every_checkpoint_leads_to_the_same_end(name: str, tmp_path: Path) -> None:
    saver, make_module = SaveAlways(tmp_path), MODULES.get(name, RollingModule)
    whole = make_trainer(tmp_path, [saver], **SETTINGS[name])
    prompts = PROMPTS_OF.get(name, {})
    module = fit(whole, module=make_module(), **prompts)
    assert len(set(keys(module))) == len(keys(module))
    for path, seen in saver.paths:
        resumed = make_trainer(tmp_path, **SETTINGS[name])
        again = fit(resumed, path, make_module(), **prompts)
        assert resumed.global_step == whole.global_step
        assert torch.equal(again.weight, module.weight), path
        taken = len(module.seen) - len(again.seen)
        assert seen - SETTINGS[name].get("accumulate_grad_batches", 1) < taken <= seen
        assert again.seen == module.seen[taken:], path


def test_steps_are_optimiser_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=6, max_epochs=None, accumulate_grad_batches=2)
    module = fit(trainer, batches_per_epoch=4)
    assert trainer.global_step == 6
    assert [epoch for epoch, _ in module.seen] == [0] * 4 + [1] * 4 + [2] * 4


def test_no_rollout_falls_into_a_step(tmp_path: Path) -> None:
    class Rollouts(Callback):
        def __init__(self) -> None:
            self.at: list[int] = []

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            self.at.append(len(module.rolled_out))

    watch = Rollouts()
    fit(make_trainer(tmp_path, [watch], accumulate_grad_batches=3, max_epochs=2), batches_per_epoch=6)
    windows = [watch.at[start : start + 3] for start in range(0, len(watch.at), 3)]
    assert all(len(set(window)) == 1 for window in windows)
    assert windows[0][0] < windows[-1][0]


def test_each_pass_uses_every_prompt_once_in_another_order(tmp_path: Path) -> None:
    module = fit(make_trainer(tmp_path, max_epochs=8))
    used = [key for rollout in module.rolled_out for key in rollout]
    passes = [[key.split("/") for key in used if key.startswith(f"{number}/")] for number in range(2)]
    rows = [[int(row) for _, row in keys] for keys in passes]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(len(PROMPTS)))
    assert rows[0] != rows[1]


@pytest.mark.slow
def test_another_batch_size_goes_on_with_the_rows_that_are_left(tmp_path: Path) -> None:
    saver = SaveAlways(tmp_path)
    module = fit(make_trainer(tmp_path, [saver]), module=RollingModule(keep=1.0))
    for path, seen in saver.paths:
        again = fit(make_trainer(tmp_path), path, RollingModule(keep=1.0), batch_size=3)
        taken = [key for _, batch in module.seen[:seen] for key in batch] + keys(again)
        assert len(set(taken)) == len(taken)
        state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        left = [] if state["rows"] is None else state["rows"]["keys"]
        assert keys(again)[: len(left)] == left[: len(keys(again))], path


def test_rows_that_are_left_keep_their_settings(tmp_path: Path) -> None:
    saver = SaveAlways(tmp_path)
    fit(make_trainer(tmp_path, [saver]), module=RollingModule(keep=1.0))
    refused = []
    for path, _ in saver.paths:
        state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        refused.append(state["rows"] is not None)
        error = pytest.raises(InputError, match=r"rows left .*: sampling\.eta=0\.5 \(was 1\.0\); resume with")
        with error if refused[-1] else nullcontext():
            fit(make_trainer(tmp_path), path, RollingModule(keep=1.0, eta=0.5))
    assert any(refused)


def test_a_run_that_keeps_nothing_stops_with_what_it_saw(tmp_path: Path) -> None:
    module = RollingModule(keep=0.0)
    with pytest.raises(InputError, match=r"3 rollouts of 2 prompts kept nothing .*: gaps are small"):
        fit(make_trainer(tmp_path), module=module, max_empty_rollouts=3)
    assert len(module.rolled_out) == 3
    assert not module.seen


def test_passes_end_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=-1, accumulate_grad_batches=2)
    module = fit(trainer, passes=3, module=RollingModule(keep=1.0))
    rolled_out = sum(map(len, module.rolled_out))
    assert 3 * len(PROMPTS) <= rolled_out <= 3 * len(PROMPTS) + 3  # the last step may take two rollouts of two
    assert rolled_out * STEPS - 8 < 4 * len(module.seen) <= rolled_out * STEPS
    assert trainer.global_step == len(module.seen) // 5 * 3 + len(module.seen) % 5 // 2


def test_counts_of_rollouts_survive_a_checkpoint() -> None:
    counts = {"prompts_used": 12, "rollouts": 6, "empty_rollouts": 3}
    before, after = (
        ExperienceSampler(
            PromptOrder(PROMPTS, 3), RollingModule(), batch_size=4, batches_per_epoch=1, prompts_per_rollout=2
        )
        for _ in range(2)
    )
    vars(before).update(counts)
    after.load_state_dict(before.state_dict(0))
    assert {name: getattr(after, name) for name in counts} == counts


def test_records_survive_a_checkpoint(tmp_path: Path) -> None:
    module = RollingModule(keep=1.0)
    pairs = module.roll_out(PromptOrder(PROMPTS, 0).__getitems__([0, 1]))
    for record in (pairs, module.rollout_statistics, None):
        torch.save(as_plain(record), tmp_path / "record.pt")
        again = from_plain(torch.load(tmp_path / "record.pt", weights_only=True), type(record))
        assert type(again) is type(record)
        if record is not None:
            assert as_plain(again).keys() == as_plain(record).keys()
            assert all(map(_equal, as_plain(again).values(), as_plain(record).values()))


def test_prompts_of_edits_keep_their_pictures_in_plain_values(tmp_path: Path) -> None:
    module = RollingModule(keep=1.0)
    pairs = module.roll_out(PromptOrder(EDITS, 0).__getitems__([0, 1, 2, 3]))
    torch.save(as_plain(pairs), tmp_path / "record.pt")
    again = from_plain(torch.load(tmp_path / "record.pt", weights_only=True), StepPairs)
    assert again.prompts == pairs.prompts
    assert [sources_of(prompt) for prompt in again.prompts] == [sources_of(prompt) for prompt in pairs.prompts]
    bytes_of = [row["sources"][0]["data"] for row in as_plain(pairs)["prompts"]]
    assert len(bytes_of) == 12 and len({one.data_ptr() for one in bytes_of}) == 1  # saved once, for all rows
    mixed = replace(pairs, prompts=("a cat", *pairs.prompts[1:]))
    assert as_plain(mixed)["prompts"][0] == "a cat"
    assert from_plain(as_plain(mixed), StepPairs).prompts == mixed.prompts
    texts = module.roll_out(PromptOrder(PROMPTS, 0).__getitems__([0]))
    assert as_plain(texts)["prompts"] == list(texts.prompts)


@pytest.mark.parametrize(
    "changed", [{"record": "my_rows.MyRows"}, {"added": 1}, {"gap": None}], ids=["class", "field too much", "lacks one"]
)
def test_rows_of_another_class_or_form_are_refused_and_nothing_is_imported(changed: dict[str, Any]) -> None:
    plain = as_plain(RollingModule(keep=1.0).roll_out(PromptOrder(PROMPTS, 0).__getitems__([0, 1])))
    plain = {name: value for name, value in {**plain, **changed}.items() if value is not None}
    with pytest.raises(InputError, match=r"rows left of its rollouts \((my_rows\.MyRows|StepPairs): .*another method"):
        from_plain(plain, StepPairs)
    assert "my_rows" not in sys.modules


def _equal(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
