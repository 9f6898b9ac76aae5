"""EncodeOnce: the same run without text encoders in memory."""

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import EncodeOnce, SampleGrid
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from latentreward.alignment import FixedThreshold, LatentReward, LPOModule, Policy, Sampling
from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError
from latentreward.data import PromptsAndImages
from latentreward.data.datamodules import PairLoaders
from latentreward.diffusion.encoders.stored_prompts import StoredPrompts
from tests.alignment.modules.lpo_runs import PROMPTS, loaders, lpo, make_trainer, weights
from tests.alignment.rewards.stored import write_run
from tests.limits import largest_file


def run(folder: Path, module: LPOModule, callbacks: list[Any], strategy: str = "auto", **options: Any) -> Trainer:
    trainer = make_trainer(folder, strategy, callbacks, max_epochs=1, enable_checkpointing=True, **options)
    trainer.fit(module, datamodule=loaders(trainer.world_size), ckpt_path=options.get("resume"), weights_only=True)
    return trainer


def rewarded(folder: Path) -> LPOModule:
    """A run with a reward that has a text encoder of its own."""
    if not (folder / "reward").exists():
        write_run(folder / "reward", "lrm", "sd15")
    module = lpo(selection=FixedThreshold(0.0))
    module.reward = LatentReward(str(folder / "reward"), share="never").load(module.policy)
    return module


@pytest.mark.slow
def test_the_run_is_the_same_and_the_encoders_are_gone(tmp_path: Path) -> None:
    expected, module = rewarded(tmp_path), rewarded(tmp_path)
    run(tmp_path / "a", expected, [])
    encoders = [weakref.ref(module.policy.text_encoder), weakref.ref(module.reward.model.backbone.text_encoder)]
    assert encoders[0]() is not encoders[1]()
    grid = SampleGrid(["a prompt of the grid alone"], every_n_steps=2, sampling=Sampling(num_inference_steps=2))
    run(tmp_path / "b", module, [EncodeOnce(), grid])
    gc.collect()
    assert [encoder() for encoder in encoders] == [None, None]
    assert isinstance(module.policy.text_encoder, StoredPrompts)
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=1e-4, atol=1e-6)
    assert not [*(tmp_path / "b").glob(".prompts*")]
    with pytest.raises(InputError, match="'a purple cow' was not encoded before the first step"):
        module.policy.encode_prompts(["a purple cow"])


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, rest = lpo(), lpo()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, enable_version_counter=False)
    run(tmp_path, whole, [EncodeOnce(), saver])
    trainer = make_trainer(tmp_path / "again", "auto", [EncodeOnce()], max_epochs=1)
    trainer.fit(rest, datamodule=loaders(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    for name, value in weights(whole).items():
        assert torch.equal(weights(rest)[name], value)


def test_runs_in_one_folder_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run begins and ends while the first one encodes; no file of either has a name while it is written."""
    module, other, calls = lpo(), lpo(), []
    encode = Policy.encode_prompts

    def interrupted(policy: Policy, prompts: Sequence[str]) -> Conditioning:
        calls.append(policy)
        if len(calls) == 4:
            assert not [*tmp_path.glob(".prompts*")]
            EncodeOnce().on_fit_start(trainer(other), other)
        return encode(policy, prompts)

    def trainer(module: LPOModule) -> Trainer:
        made = make_trainer(tmp_path, callbacks=[EncodeOnce()])
        made.datamodule = loaders()
        return made

    expected = [encode(module.policy, [prompt]).prompt_embeds for prompt in PROMPTS]
    monkeypatch.setattr(Policy, "encode_prompts", interrupted)
    EncodeOnce().on_fit_start(trainer(module), module)
    monkeypatch.undo()
    for one in (module, other):
        for prompt, embeds in zip(PROMPTS, expected, strict=True):
            torch.testing.assert_close(one.policy.encode_prompts([prompt]).prompt_embeds, embeds)


def test_a_run_that_cannot_do_without_its_encoders_is_refused(tmp_path: Path) -> None:
    """No frozen weights left out of checkpoints, unknown prompts, or the training of a reward without a cache."""
    whole = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[EncodeOnce()])
    unknown, plain = (make_trainer(tmp_path, callbacks=[EncodeOnce()]) for _ in range(2))
    unknown.datamodule = PromptsAndImages(loaders(), PairLoaders())
    reward = write_run(tmp_path, "lrm", "sd15")
    for trainer, module, key in (
        (whole, lpo(), "TrainableCheckpoint"),
        (unknown, lpo(), "PromptsAndImages"),
        (plain, reward, "latentreward cache"),
    ):
        with pytest.raises(InputError, match=key):
            EncodeOnce().setup(trainer, module, "fit")


def test_a_disk_that_fills_meanwhile_is_named(tmp_path: Path) -> None:
    full = pytest.raises(InputError, match=r"no space left for .*free some space, or set EncodeOnce's folder")
    with full, largest_file(1 << 16):
        run(tmp_path, lpo(), [EncodeOnce(), PromptsOf([f"prompt {number}" for number in range(99)])])
    assert not [*tmp_path.glob(".prompts*")]


class PromptsOf(Callback):
    """Callback that samples nothing but has prompts."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts
