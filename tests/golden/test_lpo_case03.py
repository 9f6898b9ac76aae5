"""LRM's criterion: losses and gradients of one process and of several, against the recorded ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentreward.core.contracts import CrossScores, FeatureSpec, PairScores, TapSpec
from latentreward.reward import CLIPProjectionHead, LRMLoss, gather_pair_scores, gather_with_grad
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close
from tests.reward.losses.two_ranks import on_ranks

SIDES = ("image_0", "image_1", "text")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def loss_of(variant: dict[str, Any]) -> LRMLoss:
    return LRMLoss(variant["loss_type"], variant["batch_coeff"], variant["aux_loss_coeff"])


def columns_of(
    data: Mapping[str, Tensor], variant: dict[str, Any], rows: slice, *, swap: bool = False
) -> dict[str, Tensor]:
    """What a pair carries beside its scores; image_0 stands as chosen, with whatever label it has."""
    sigmas = data[variant["timesteps"]][rows].float() / 1000
    label = data["label_1" if swap else "label_0"][rows]
    return {
        "label": label,
        "weight": 1 / data["num_example_per_prompt"][rows].float(),
        "chosen_sigmas": sigmas[:, int(swap)],
        "rejected_sigmas": sigmas[:, 1 - int(swap)],
    }


def loss_from_features(loss: LRMLoss, features: list[Tensor], log_scale: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """Loss of unit features of all pairs, in the order of :data:`SIDES`."""
    image_0, image_1, text = features
    cross = CrossScores(*(log_scale.exp() * text @ image.T for image in (image_0, image_1)))
    return loss(PairScores(cross.chosen.diagonal(), cross.rejected.diagonal(), cross=cross, **columns))


@pytest.mark.parametrize("case", cases("lpo/03"), ids=lambda case: case.name)
def test_unit_features(case: Case) -> None:
    data = case.tensors()
    for variant in case.options["variants"]:
        key = f"{variant['name']}.full"
        features = [data[f"{side}_features"].clone().requires_grad_() for side in SIDES]
        log_scale = data["logit_scale_log"].clone().requires_grad_()
        loss = loss_from_features(loss_of(variant), features, log_scale, columns_of(data, variant, slice(None)))
        loss.backward()
        assert_close(loss, data[f"{key}.loss"], f"{key}.loss", **TOLERANCE)
        for side, feature in zip(SIDES, features, strict=True):
            assert_close(feature.grad, data[f"{key}.grad_{side}_features"], f"{key} {side}", **TOLERANCE)
        assert_close(log_scale.grad, data[f"{key}.grad_logit_scale_log"], f"{key} logit_scale", **TOLERANCE)


@pytest.mark.parametrize("case", cases("lpo/03"), ids=lambda case: case.name)
def test_raw_features_through_the_head(case: Case) -> None:
    data = case.tensors()
    width = data["text_raw"].shape[1]
    spec = FeatureSpec((TapSpec(width, (1, 1)),), (), temb_dim=1, pooled_text_dim=width)
    head = CLIPProjectionHead(spec, logit_scale=data["logit_scale_log"].item())
    for variant in case.options["variants"]:
        key, loss = f"{variant['name']}.full", loss_of(variant)
        image_0, image_1, text = raw = [data[f"{side}_raw"].clone().requires_grad_() for side in SIDES]
        scores = PairScores(
            head.similarity(image_0, text),
            head.similarity(image_1, text),
            cross=CrossScores(head.similarity_matrix(text, image_0), head.similarity_matrix(text, image_1)),
            **columns_of(data, variant, slice(None)),
        )
        value = loss(scores)
        value.backward()
        assert_close(value, data[f"{key}.loss"], f"{key}.loss", **TOLERANCE)
        for side, feature in zip(SIDES, raw, strict=True):
            assert_close(feature.grad, data[f"{key}.grad_{side}_raw"], f"{key} {side}", **TOLERANCE)


@pytest.mark.parametrize("case", cases("lpo/03"), ids=lambda case: case.name)
def test_exchanged_sides(case: Case) -> None:
    data = case.tensors()
    image_0, image_1, text = (data[f"{side}_features"] for side in SIDES)
    for variant in case.options["variants"]:
        columns = columns_of(data, variant, slice(None), swap=True)
        loss = loss_from_features(loss_of(variant), [image_1, image_0, text], data["logit_scale_log"], columns)
        assert_close(loss, data[f"{variant['name']}.full.loss"], variant["name"], **TOLERANCE)


@pytest.mark.parametrize("case", cases("lpo/03"), ids=lambda case: case.name)
def test_both_sides_go_to_the_model_image_0_first(case: Case) -> None:
    data = case.tensors()
    stacked = [data[name].T.flatten() for name in data if name.startswith("timesteps_")]
    assert any(torch.equal(timesteps, data["time_cond_passed_to_model"]) for timesteps in stacked)
    for side in SIDES:
        raw = data[f"{side}_raw"]
        assert_close(raw / raw.norm(dim=-1, keepdim=True), data[f"{side}_features"], side, **TOLERANCE)


def rank_results(rank: int, argument: str) -> dict[str, dict[str, Tensor]]:
    """Loss and gradients of one rank, for each variant; runs in a process of its own."""
    case = next(case for case in cases("lpo/03") if case.name == argument)
    options, results = case.options, {}
    data = load_file(case.path.with_suffix(".safetensors"))
    rows = slice(rank * options["per_rank"], (rank + 1) * options["per_rank"])
    for variant in options["variants"]:
        local = [data[f"{side}_features"][rows].clone().requires_grad_() for side in SIDES]
        log_scale = data["logit_scale_log"].clone().requires_grad_()
        columns = columns_of(data, variant, rows)
        placeholder = torch.zeros(options["per_rank"])
        gathered = gather_pair_scores(PairScores(placeholder, placeholder, **columns))
        columns = {name: getattr(gathered, name) for name in columns}
        features = [gather_with_grad(feature) for feature in local]
        loss = loss_from_features(loss_of(variant), features, log_scale, columns)
        loss.backward()
        grads = {f"grad_{side}_features": feature.grad for side, feature in zip(SIDES, local, strict=True)}
        results[variant["name"]] = {"loss": loss.detach(), "grad_logit_scale_log": log_scale.grad, **grads}
    return results


@pytest.mark.parametrize("case", cases("lpo/03"), ids=lambda case: case.name)
def test_several_ranks(case: Case, tmp_path: Path) -> None:
    data, options = case.tensors(), case.options
    ranks = on_ranks("tests.golden.test_lpo_case03:rank_results", case.name, tmp_path, options["world_size"])
    for rank, variants in enumerate(ranks):
        for variant, values in variants.items():
            for name in data.below(f"{variant}.rank{rank}."):
                key = f"{variant}.rank{rank}.{name}"
                assert_close(values[name], data[key], key, **TOLERANCE)
