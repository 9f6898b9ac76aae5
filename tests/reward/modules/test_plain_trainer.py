"""Rewards trained by a script with Lightning's own Trainer, without ``latentreward fit`` and its ``config.yaml``."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import TrainableCheckpoint
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from latentreward.apps.cli import main
from latentreward.core.contracts import Features, FeatureSpec
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA, sd15, sd35_medium
from latentreward.reward import CLIPProjectionHead, DiNaLRMModule, GatedQFormerHead, LRMModule, RewardHead, RewardModel
from tests.alignment.modules.batches import pixel_batch
from tests.marks import rotated_after
from tests.tiny_pipelines import pipeline_folder

TAPS = {"visual_taps": (1, 2), "text_taps": (1, 2), "t5_length": 2, "load_t5": False}


class Mean(RewardHead):
    """A head of the user's own."""

    def __init__(self, spec: FeatureSpec, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(spec.visual[0].width, 1)

    def forward(self, features: Features) -> Tensor:
        return self.scale * self.linear(features.visual[0].mean(dim=1)).squeeze(-1)


def lrm(**options: Any) -> LRMModule:
    backbone = sd15(pipeline_folder("sd15"), tuning="lora", lora=LoRA(rank=2, alpha=3.0), **options)
    return LRMModule(backbone, partial(CLIPProjectionHead, guidance=3.0), eval_timesteps=[1], seed=1)


def lrm_whole() -> LRMModule:
    return LRMModule(sd15(pipeline_folder("sd15")), lambda spec: CLIPProjectionHead(spec, embed_dim=8), seed=1)


def dina() -> DiNaLRMModule:
    backbone = sd35_medium(pipeline_folder("sd35"), tuning="lora", lora=LoRA(2, 4.0), **TAPS)
    return DiNaLRMModule(backbone, partial(GatedQFormerHead, num_heads=2), seed=1)


def own_head() -> DiNaLRMModule:
    backbone = sd35_medium(pipeline_folder("sd35"), tuning="frozen", **TAPS)
    return DiNaLRMModule(backbone, partial(Mean, scale=2.0), seed=1)


def trained(module: LightningModule, folder: Path, small: bool) -> Path:
    """The checkpoint of a short run, ``small`` without frozen weights."""
    saver = ModelCheckpoint(folder / "run", "reward", every_n_train_steps=2)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=2, callbacks=[saver, *([TrainableCheckpoint()] if small else [])], **options)
    trainer.fit(module, DataLoader([pixel_batch(), pixel_batch(2)], batch_size=None))
    return folder / "run" / "reward.ckpt"


def scores(model: RewardModel) -> Tensor:
    space = model.backbone.latent_space
    latents = torch.randn(2, space.channels, 8, 8, generator=torch.Generator().manual_seed(1))
    return model.eval().score_latents(["a cat", "two dogs"], latents).detach()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "small"), rotated_after(1, [(lrm, True), (lrm_whole, False), (dina, False), (own_head, True)])
)
def test_its_reward_is_saved_loaded_and_published(make: Any, small: bool, tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    module = make()
    path = trained(module, tmp_path, small)
    expected = scores(module.model)
    trust = {"trust_remote_code": make is own_head}
    assert torch.equal(scores(RewardModel.from_pretrained(path, **trust)), expected)
    module.model.save_pretrained(tmp_path / "saved")
    base = {"base": str(module.model.backbone.source)}
    assert torch.equal(scores(RewardModel.from_pretrained(tmp_path / "saved", **base, **trust)), expected)
    main(["publish", str(path), str(tmp_path / "published"), f"--trust_remote_code={str(make is own_head).lower()}"])
    assert "equal weights and scores" in capsys.readouterr().out
    assert torch.equal(scores(RewardModel.from_pretrained(tmp_path / "published", **base, **trust)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("small", rotated_after(1, [True, False]))
def test_load_from_checkpoint(small: bool, tmp_path: Path) -> None:
    """Frozen weights that the checkpoint leaves out come from the backbone given, which must be the same base."""
    torch.manual_seed(0)
    module = lrm()
    path = trained(module, tmp_path, small)
    head = partial(CLIPProjectionHead, guidance=3.0)
    again = LRMModule.load_from_checkpoint(path, backbone=lrm().model.backbone, head=head)
    assert torch.equal(scores(again.model), scores(module.model))
    with pytest.raises(InputError, match=r"unknown weight model\.backbone\.unet.* tuning and head must be those"):
        LRMModule.load_from_checkpoint(path, backbone=sd15(pipeline_folder("sd15"), tuning="frozen"), head=head)
    other = lrm(pretrained=False).model.backbone
    if not small:  # the checkpoint has the base's weights itself
        again = LRMModule.load_from_checkpoint(path, backbone=other, head=head)
        assert torch.equal(scores(again.model), scores(module.model))
        return
    with pytest.raises(InputError, match=r"belongs to the base .* set source to the base it was trained on"):
        LRMModule.load_from_checkpoint(path, backbone=other, head=head)


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    """A backbone given modules, by a function that notes nothing."""
    module = lrm_whole()
    module.model.backbone.built_by = module.model.recipe = None
    with pytest.raises(InputError, match=r"how the backbone SDUNetBackbone was made .* @register_backbone"):
        module.model.save_pretrained(tmp_path / "saved")
    module.model.requires_grad_(False)
    with pytest.raises(InputError, match="save it before you freeze it"):
        module.model.save_pretrained(tmp_path / "saved")


def test_parts_that_begin_to_train_later_are_saved(tmp_path: Path) -> None:
    """Lightning's BackboneFinetuning unfreezes in the middle of a run."""
    module = LRMModule(sd15(pipeline_folder("sd15"), tuning="frozen", text_encoder_tuning="frozen"), seed=1)
    module.model.backbone.unet.requires_grad_(True)
    with torch.no_grad():
        module.model.backbone.unet.conv_in.weight.mul_(1.5)
    module.model.save_pretrained(tmp_path / "saved")
    again = RewardModel.from_pretrained(tmp_path / "saved", base=pipeline_folder("sd15"))
    assert torch.equal(scores(again), scores(module.model))


def test_load_from_checkpoint_runs_nothing(tmp_path: Path) -> None:
    """Lightning's own default would."""
    trap = tmp_path / "ran"
    torch.save({"state_dict": {}, "hyper_parameters": Trap(trap)}, tmp_path / "trap.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        LRMModule.load_from_checkpoint(tmp_path / "trap.ckpt", backbone=None)
    assert not trap.exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
