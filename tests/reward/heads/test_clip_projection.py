"""LRM's head: the closed form of its enhancement, its options, its start, its refusals."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentreward.core.contracts import Features
from latentreward.core.errors import InputError
from latentreward.reward import CLIPProjectionHead
from tests.reward.heads.features import DIT_SPEC, SPECS, UNET_SPEC, random_features
from tests.tiny_pipelines import WIDTH, clip_config, clip_tokenizer


def by_hand(head: CLIPProjectionHead, features: Features, enhanced: list[bool], taken: list[bool]) -> torch.Tensor:
    """Score from the formula alone; ``enhanced`` and ``taken`` say which taps are."""
    parts = []
    for index, tokens in enumerate(features.visual):
        part = tokens.mean(dim=1)
        if enhanced[index]:
            empty = features.uncond.visual[index].mean(dim=1)
            part = part + (head.guidance - 1) * (part - empty)  # the paper's form
        parts.append(part)
    visual = torch.cat([part for part, take in zip(parts, taken, strict=True) if take], dim=1)
    visual = visual @ head.visual_projection.weight.T
    text = features.pooled_text @ head.text_projection.weight.T
    return head.logit_scale.exp() * F.cosine_similarity(visual, text)


@pytest.mark.parametrize(
    ("options", "enhanced", "taken"),
    [
        ({"multi_scale": "plain"}, [False, False, False, True], [True] * 4),
        ({"multi_scale": "single"}, [False, False, False, True], [False, False, False, True]),
        ({"multi_scale": "enhanced"}, [True] * 4, [True] * 4),
        ({"multi_scale": "enhanced", "enhance_first": False}, [False, True, True, True], [True] * 4),
        ({"guidance": 1.0}, [False] * 4, [True] * 4),
        ({"guidance": 2.5}, [False, False, False, True], [True] * 4),
    ],
    ids=str,
)
def test_score_is_the_formula(options: dict, enhanced: list[bool], taken: list[bool]) -> None:
    head = CLIPProjectionHead(UNET_SPEC, **options)
    features = random_features(UNET_SPEC, uncond=head.needs_uncond)
    torch.testing.assert_close(head(features), by_hand(head, features, enhanced, taken))


@pytest.mark.parametrize("name", SPECS)
def test_any_backbone(name: str) -> None:
    """Images and video, U-Net and DiT: the last tap is mid, the pooled text is T, text taps are not read."""
    spec = SPECS[name]
    head = CLIPProjectionHead(spec)
    features = random_features(spec, uncond=True)
    scores = head(features)
    assert scores.shape == (3,)
    assert (scores.abs() <= head.logit_scale.exp()).all()
    torch.testing.assert_close(head(replace(features, text=())), scores, rtol=0, atol=0)
    assert not torch.allclose(head(replace(features, pooled_text=-features.pooled_text)), scores)


def test_start() -> None:
    head = CLIPProjectionHead(UNET_SPEC, embed_dim=400)
    for layer in (head.visual_projection, head.text_projection):
        assert layer.bias is None
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head.logit_scale.exp().item() == pytest.approx(math.exp(2.6592))


def test_matrix_agrees_with_the_rows() -> None:
    head = CLIPProjectionHead(DIT_SPEC, guidance=1.0)
    features = random_features(DIT_SPEC)
    image, text = head.embed(features)
    matrix = head.similarity_matrix(text, image)
    torch.testing.assert_close(matrix.diagonal(), head(features))
    torch.testing.assert_close(matrix[1, 2], head.similarity(image[2:], text[1:2])[0])


def test_half_precision_features_are_pooled_in_float32() -> None:
    """Guidance multiplies the difference of two means: rounding them first would show 7.5-fold."""
    head = CLIPProjectionHead(UNET_SPEC)
    features = random_features(UNET_SPEC, uncond=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        pooled = head.visual_input(features)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, head.visual_input(features.to(torch.float32)), rtol=1e-5, atol=1e-5)


def test_text_projection_of_a_clip_model(tmp_path: Path) -> None:
    spec = replace(UNET_SPEC, pooled_text_dim=WIDTH)
    clip = CLIPTextModelWithProjection(clip_config(clip_tokenizer()))
    clip.save_pretrained(tmp_path)
    head = CLIPProjectionHead(spec, text_projection_source=str(tmp_path))
    torch.testing.assert_close(head.text_projection.weight, clip.text_projection.weight, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"has a projection of shape \(16, 16\), but this head needs \(16, 20\)"):
        CLIPProjectionHead(UNET_SPEC, text_projection_source=str(tmp_path))


def test_clip_model_without_a_projection_is_no_source(tmp_path: Path) -> None:
    """transformers would draw a random one."""
    CLIPTextModel(clip_config(clip_tokenizer())).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds no text_projection\.weight"):
        CLIPProjectionHead(UNET_SPEC, text_projection_source=str(tmp_path))
