"""The kit passes what is shipped, and names what a part of one's own breaks."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from latentreward.alignment import CallableReward, PolicySource, RandomReward
from latentreward.core.contracts import Features, FeatureSpec, ImageRef, PairScores, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import PairReader
from latentreward.reward import (
    BradleyTerryLoss,
    CallableScorer,
    CLIPProjectionHead,
    ConstantVarianceThurstoneLoss,
    DRMHead,
    GatedQFormerHead,
    LayerMixHead,
    LRMLoss,
    PAVRMHead,
    PreferenceLoss,
    RewardHead,
    ThurstoneLoss,
    TieLoss,
)
from latentreward.testing import (
    check_backbone,
    check_family,
    check_head,
    check_loss,
    check_reader,
    check_reward,
    check_scorer,
)
from latentreward.tinyworld.reader import TinyWorldReader
from tests.diffusion.backbones.networks import tiny_backbone


@pytest.mark.parametrize("kind", [CLIPProjectionHead, DRMHead, GatedQFormerHead, LayerMixHead, PAVRMHead])
def test_shipped_heads(kind: type[RewardHead]) -> None:
    check_head(kind)


@pytest.mark.parametrize("kind", [BradleyTerryLoss, ConstantVarianceThurstoneLoss, LRMLoss, ThurstoneLoss, TieLoss])
def test_shipped_losses(kind: type[PreferenceLoss]) -> None:
    check_loss(kind())


class Rows(PairReader):
    """Two pairs."""

    def __init__(self, names: tuple[str, str] = ("a", "b"), label: float = 1.0, column: float = 1.0) -> None:
        super().__init__()
        self.names, self.label, self.column = names, label, column

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> PreferencePair:
        images = (ImageRef(f"{index}{side}", b"x") for side in "ab")
        return PreferencePair(self.names[index], "a cat", *images, self.label)

    def labels(self) -> np.ndarray:
        return np.array([self.column, self.column])


class Head(RewardHead):
    """A head of one's own; ``kind`` says what is wrong with it."""

    def __init__(self, spec: FeatureSpec, kind: str = "right") -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(spec.visual[0].width, 1), kind

    def forward(self, features: Features) -> Tensor:
        tokens = features.visual[0].mean(dim=1)
        scores = self.linear(tokens - tokens.mean(dim=0) if self.kind == "batch" else tokens)
        return {"column": scores, "detached": scores.detach().squeeze(-1)}.get(self.kind, scores.squeeze(-1))


class Loss(PreferenceLoss):
    """A loss of one's own; ``kind`` says what is wrong with it."""

    def __init__(self, kind: str = "right") -> None:
        super().__init__()
        self.kind = kind

    def per_pair(self, scores: PairScores) -> Tensor:
        losses = torch.relu(1 - scores.margin).double()
        return losses[:, None] if self.kind == "column" else losses

    def win_probability(self, scores: PairScores) -> Tensor:
        return torch.sigmoid(scores.margin + (self.kind == "uneven"))


def brightness(prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
    return torch.tensor([float(np.asarray(image).mean()) for image in images])


def among_others(prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
    return brightness(prompts, images) - brightness(prompts, images).mean()


def darker(latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
    with torch.no_grad():
        return latents.sub_(1.0).flatten(1).mean(dim=1)


def test_parts_of_ones_own(tmp_path) -> None:
    check_head(Head)
    check_loss(Loss())
    check_reader(Rows())
    check_reader(TinyWorldReader(str(tmp_path), pairs=4))
    check_scorer(CallableScorer(brightness, "brightness"))
    check_reward(RandomReward("readout"))


def test_shipped_networks() -> None:
    backbone = tiny_backbone("sd35")
    latents = torch.randn(3, backbone.latent_space.channels, 8, 8)
    check_backbone(backbone, latents, GatedQFormerHead(backbone.feature_spec, num_heads=2))
    check_family(PolicySource("sd_tiny").load(), torch.randn(3, 4, 8, 8))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_head(lambda spec: Head(spec, "column")), r"Head\.forward returned \(4, 1\)"),
        (
            lambda: check_head(lambda spec: Head(spec, "detached")),
            "a tensor without a gradient",
        ),
        (lambda: check_head(lambda spec: Head(spec, "batch")), r"Head\.forward returned values of a row alone"),
        (lambda: check_loss(Loss("column")), r"Loss\.per_pair returned \(4, 1\)"),
        (lambda: check_loss(Loss("uneven")), "not 1 minus that of the pair"),
        (lambda: check_reader(Rows(("a", "a"))), "several rows have one pair_id"),
        (lambda: check_reader(Rows(label=2.0)), r"label_a=2\.0"),
        (lambda: check_reader(Rows(column=0.0)), "labels are not those of the rows"),
        (lambda: check_scorer(CallableScorer(among_others, "among")), "values of a row alone"),
        (lambda: check_reward(CallableReward(darker)), "changes a tensor"),
    ],
)
def test_what_is_broken_is_named(check, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check()
