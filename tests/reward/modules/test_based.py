"""Weights that a run trains: those without a gradient are told in the first step."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from latentreward.core.contracts import Features, FeatureSpec
from latentreward.reward import LRMModule, RewardHead
from tests.alignment.modules.batches import pixel_batch
from tests.diffusion.backbones.networks import tiny_backbone


class CutHead(RewardHead):
    """Two layers; a detached tensor between them leaves the first one without a gradient."""

    def __init__(self, spec: FeatureSpec, cut: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(spec.visual[0].width, 4), nn.Linear(4, 1)
        nn.init.zeros_(self.second.weight)  # as an adapter's B: the first layer's gradient is zero, but there
        self.cut = cut

    def forward(self, features: Features) -> Tensor:
        hidden = self.first(features.visual[0].mean(dim=1))
        return self.second(hidden.detach() if self.cut else hidden).squeeze(-1)


def told(**options: Any) -> list[str]:
    """Warnings about gradients in a run of three batches, of which two make a step."""
    torch.manual_seed(0)
    backbone = tiny_backbone("sd15").requires_grad_(False)
    module = LRMModule(backbone, lambda spec: CutHead(spec, **options), eval_timesteps=[1], seed=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=2, accumulate_grad_batches=2, enable_checkpointing=False, **quiet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader([pixel_batch()] * 4, batch_size=None))
    return [str(one.message) for one in caught if "gradient" in str(one.message)]


def test_weights_without_a_gradient_are_told_once_with_their_module() -> None:
    (line,) = told()
    assert line.startswith(
        "LRMModule: 2 of 4 trained weights got no gradient in the first step, such as those of "
        "model.head.first (Linear)"
    )
    assert "\n" not in line


def test_weights_whose_gradient_is_zero_are_not_told() -> None:
    assert told(cut=False) == []
