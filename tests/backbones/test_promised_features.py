"""A backbone whose ``read`` and ``feature_spec`` disagree is named with the tap, not by an error deep in the head."""

from dataclasses import replace

import pytest
import torch

from latentreward.backbones import sd_tiny
from latentreward.backbones.base import check_features
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
        ({"visual": (torch.zeros(2, 6, 9),)}, "visual tap 0 with 9 features per token, but feature_spec says 8"),
        ({"visual": ()}, "gives 0 visual taps, but feature_spec has 1"),
        ({"visual_grids": ((3, 3),)}, r"visual tap 0 has 6 tokens for the grid \(3, 3\)"),
        ({"text": (torch.zeros(2, 4, 6),)}, "text tap 0 with 6 features per token"),
        ({"temb": torch.zeros(2, 1)}, "temb with 1 features, but feature_spec says 6"),
        ({"pooled_text": torch.zeros(2, 1)}, "pooled_text with 1 features, but feature_spec says 7"),
    ],
)
def test_what_differs_is_named(wrong: dict[str, object], message: str) -> None:
    check_features(FEATURES, SPEC, "Net")
    with pytest.raises(InputError, match=f"^Net: .*{message}"):
        check_features(replace(FEATURES, **wrong), SPEC, "Net")


def test_a_backbone_is_compared_when_it_first_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = sd_tiny(tuning="frozen")
    spec = backbone.feature_spec
    monkeypatch.setattr(type(backbone), "feature_spec", replace(spec, temb_dim=spec.temb_dim + 1))
    with pytest.raises(InputError, match="SDUNetBackbone: read gives temb"):
        backbone(torch.zeros(1, 4, 8, 8), torch.ones(1), backbone.encode_prompts(["a cat"]))


def test_a_factory_that_returns_nothing() -> None:
    with pytest.raises(InputError, match="backbone is None, not a DiffusionBackbone; let its function return one"):
        LRMModule(None, CLIPProjectionHead)
