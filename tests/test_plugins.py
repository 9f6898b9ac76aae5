"""A user's own backbone, head, loss, metric and callback, from a file of theirs, named in YAML alone."""

from pathlib import Path

import pytest

from tests.processes import finish

MY_PARTS = '''
import torch
from lightning.pytorch import Callback
from torch import nn
from torchmetrics import Metric

from latentreward.backbones import SD3DiTBackbone, sd35_tiny
from latentreward.heads import RewardHead
from latentreward.losses import PreferenceLoss


def first_block(width: int = 8) -> SD3DiTBackbone:
    """One block of the tiny transformer."""
    return sd35_tiny(num_layers=1, visual_taps=(1,), text_taps=(), tuning="frozen")


class MeanHead(RewardHead):
    def __init__(self, spec, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(spec.visual[0].width, 1, bias=bias)

    def forward(self, features):
        return self.linear(features.visual[0].mean(dim=1)).squeeze(-1)


class HingeLoss(PreferenceLoss):
    def __init__(self, width: float = 1.0):
        super().__init__()
        self.width = width

    def per_pair(self, scores):
        return torch.relu(self.width - scores.margin).double()

    def win_probability(self, scores):
        return torch.sigmoid(scores.margin)


class LargestMargin(Metric):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.add_state("largest", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, chosen_rewards, rejected_rewards, label):
        self.largest = torch.maximum(self.largest, (chosen_rewards - rejected_rewards).abs().max())

    def compute(self):
        return self.scale * self.largest


class WriteMetrics(Callback):
    def __init__(self, path: str):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        with open(self.path, "w") as file:
            file.writelines(f"{name}\\n" for name in sorted(trainer.callback_metrics))
'''

MY_YAML = """
model:
  class_path: latentreward.modules.RewardModule
  init_args:
    backbone:
      class_path: my_parts.first_block
      init_args: {width: 4}
    head:
      class_path: my_parts.MeanHead
      init_args: {bias: false}
    loss:
      class_path: my_parts.HingeLoss
      init_args: {width: 0.5}
    levels:
      class_path: ConstantSigma
      init_args: {sigma: 0.3}
    metrics:
      - class_path: my_parts.LargestMargin
        init_args: {scale: 2.0}
    eval_sigmas: [0.3]
data:
  class_path: latentreward.tinyworld.TinyWorldDataModule
  init_args: {root: data, train_pairs: 16, val_pairs: 8, batch_size: 8, num_workers: 0}
trainer:
  accelerator: cpu
  logger: false
  max_epochs: 1
  num_sanity_val_steps: 0
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: my_parts.WriteMetrics
      init_args: {path: metrics.txt}
"""


@pytest.mark.slow
def test_parts_of_a_file_outside_the_package_run_through_yaml_alone(tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text(MY_PARTS)
    (tmp_path / "mine.yaml").write_text(MY_YAML)
    run = finish(["fit", "--config=mine.yaml"], cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    logged = (tmp_path / "metrics.txt").read_text().split()
    assert {"train/loss", "val/accuracy_sigma0.3", "val/LargestMargin_sigma0.3", "val/LargestMargin"} <= set(logged)
