"""A backbone whose ``read`` and ``feature_spec`` disagree is named with the tap, not by an error deep in the head."""

from dataclasses import replace

import pytest
import torch

from latentreward.backbones import sd_tiny
from latentreward.backbones.base import features_problem
from latentreward.contracts import Features, FeatureSpec, TapSpec
from latentreward.errors import InputError
from latentreward.heads import CLIPProjectionHead
from latentreward.modules import LRMModule

SPEC = FeatureSpec(visual=(TapSpec(8, (2, 3)),), text=(TapSpec(5, (4,)),), temb_dim=6, pooled_text_dim=7)
FEATURES = Features(
    visual=(torch.zeros(2, 6, 8),),
    visual_grids=((2, 3),),
    text=(torch.zeros(2, 4, 5),),
    pooled_text=torch.zeros(2, 7),
    temb=torch.zeros(2, 6),
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"visual": (torch.zeros(2, 6, 9),)}, "visual tap 0 (2, 6, 9); it must be a tensor (2, 6, 8) as feature_spec"),
        ({"visual": ()}, "0 visual taps; it must be the 1 of feature_spec"),
        ({"visual_grids": ((3, 3),)}, "visual tap 0 (2, 6, 8); it must be a tensor (2, 9, 8)"),
        ({"visual_grids": ()}, "0 visual_grids; it must be one for each of 1 taps"),
        ({"text": (torch.zeros(2, 4, 6),)}, "text tap 0 (2, 4, 6); it must be a tensor (2, any, 5)"),
        ({"temb": torch.zeros(2, 1)}, "temb (2, 1); it must be a tensor (2, 6)"),
        ({"pooled_text": torch.zeros(1, 7)}, "pooled_text (1, 7); it must be a tensor (2, 7)"),
        ({"output": torch.zeros(2, 4, 6, 6)}, "an output map of 4 channels; it must be as feature_spec says, None"),
    ],
)
def test_what_differs_is_named(wrong: dict[str, object], message: str) -> None:
    assert features_problem(FEATURES, SPEC, rows=2) is None
    assert str(features_problem(replace(FEATURES, **wrong), SPEC, rows=2)).startswith(message)


def test_a_backbone_is_compared_when_it_first_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = sd_tiny(tuning="frozen")
    spec = backbone.feature_spec
    monkeypatch.setattr(type(backbone), "feature_spec", replace(spec, temb_dim=spec.temb_dim + 1))
    with pytest.raises(InputError, match=r"SDUNetBackbone\.read returned temb"):
        backbone(torch.zeros(1, 4, 8, 8), torch.ones(1), backbone.encode_prompts(["a cat"]))


def test_a_factory_that_returns_nothing() -> None:
    with pytest.raises(InputError, match="backbone is None, not a DiffusionBackbone; let its function return one"):
        LRMModule(None, CLIPProjectionHead)
