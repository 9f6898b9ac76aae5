"""DiNa-LRM's published layout: noising, features with and without LoRA, single and ensemble scores."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning
from latentreward.reward import PublishedSettings, RewardModel, ScoringNoise
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_close

FLOAT32_EPS = torch.finfo(torch.float32).eps  # the recorded head ran in float32
TOKENS = {"rtol": 1e-5, "atol": 1e-4}
SCORE = {"rtol": 1e-5, "atol": 3e-6}
every_case = pytest.mark.parametrize("case", cases("dina/backbone"), ids=lambda case: case.name)


def model_of(case: Case) -> RewardModel:
    case.file("config.json")
    for part in (case.options["base_dir"], "scheduler", "checkpoint/backbone_lora"):
        case.folder(part)
    case.file("checkpoint/rm_head.pt")
    rms_eps = case.options.get("rms_eps") or FLOAT32_EPS
    base = (case.path.parent / case.options["base_dir"]).parent
    return RewardModel.from_pretrained(case.path.parent, base=str(base), published=PublishedSettings(rms_eps=rms_eps))


def conditioning_of(data: Tensors) -> Conditioning:
    return Conditioning(data["in.encoder_hidden_states"], data["in.pooled_projections"])


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    for layer in layers:
        layer.enable_adapters(False)
    yield
    for layer in layers:
        layer.enable_adapters(True)


def score_at(model: RewardModel, data: Tensors, *sigmas: float) -> Tensor:
    """Scores of the recorded latents, noised by the recorded noise to the levels nearest to ``sigmas``."""
    noise, conditioning = ScoringNoise(sigmas=sigmas), (conditioning_of(data), None)
    latents, draws = data["in.latents"], data["in.noise"]
    return model.score_latents("", latents, noise=noise, draws=draws, conditioning=conditioning)


def column(score: Tensor) -> Tensor:
    return score.reshape(len(score), -1)


@every_case
def test_noising(case: Case) -> None:
    data, process = case.tensors(), model_of(case).backbone.noise_process
    timesteps = process.timesteps_at(data["in.u"])
    assert_close(timesteps, data["out.timestep"], "timestep")
    assert_close(process.sigma(timesteps), data["out.sigma"], "sigma")
    noisy = process.add_noise(data["in.latents"], data["in.noise"], timesteps)
    assert_close(noisy, data["out.noisy_latents"], "noisy_latents")


@every_case
@torch.no_grad()
def test_features_and_score(case: Case) -> None:
    data, model = case.tensors(), model_of(case)
    with without_lora(model):
        base = model.backbone(data["out.noisy_latents"], data["out.timestep"], conditioning_of(data))
        score = model.head(base)
    lora = model.backbone(data["out.noisy_latents"], data["out.timestep"], conditioning_of(data))
    assert_close(column(score), data["default_adapter.score"], "default_adapter.score", **SCORE)
    assert_close(column(model.head(lora)), data["lora.score"], "lora.score", **SCORE)
    taps = {"visual": model.backbone.visual_taps, "text": model.backbone.text_taps}
    for kind, features in (("base", base), ("lora", lora)):
        found = {"temb": features.temb}
        for stream, numbers in taps.items():
            tokens = getattr(features, stream)
            found |= {f"{stream}.layer{number}": value for number, value in zip(numbers, tokens, strict=True)}
        for name in data.below(f"{kind}."):
            if name != "score":
                assert_close(found[name], data[f"{kind}.{name}"], f"{kind}.{name}", **TOKENS)


@every_case
def test_scores_at_target_levels(case: Case) -> None:
    data, model, scores = case.tensors(), model_of(case), {}
    for name in data.below("single.u"):
        scores[f"single.u{name}"] = score_at(model, data, float(name.removesuffix(".score")))
    for name in data.below("inferencer.reward_u"):
        scores[f"inferencer.reward_u{name}"] = score_at(model, data, float(name))
    scores["ens.score"] = score_at(model, data, *case.options["ensemble_u"])
    for name, score in scores.items():
        assert_close(column(score), data[name], name, **SCORE)
    process = model.backbone.noise_process
    timesteps = process.timesteps_at(torch.tensor(case.options["ensemble_u"]))
    assert_close(timesteps[:, None].expand_as(data["ens.timesteps"]), data["ens.timesteps"], "ens.timesteps")


@pytest.mark.parametrize("case", cases("dina/backbone")[:1], ids=lambda case: case.name)
def test_use_text_features_changes_no_score(case: Case, tmp_path: Path) -> None:
    """The authors' code reads ``text_head_idx`` either way; the flag only says which layers got LoRA."""
    shutil.copytree(case.path.parent, tmp_path / "copy", copy_function=shutil.copyfile)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["model"]["use_text_features"] = False
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    base = (case.path.parent / case.options["base_dir"]).parent
    published = PublishedSettings(rms_eps=case.options.get("rms_eps") or FLOAT32_EPS)
    model, data = RewardModel.from_pretrained(tmp_path / "copy", base=str(base), published=published), case.tensors()
    assert_close(column(score_at(model, data, *case.options["ensemble_u"])), data["ens.score"], "ens", **SCORE)
