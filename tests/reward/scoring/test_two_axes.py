"""A model with two axes from its folder to tables, replies and reports: both are shown, and the score is their sum."""

import json
from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save

from latentreward.apps.cli import main
from latentreward.reward import Calibration, RewardModel, ScoringNoise
from latentreward.reward.scoring.image_lists import read_scores
from tests.alignment.rewards.stored import write_run
from tests.apps.serving.latent_requests import HEADERS, tensors_of
from tests.apps.serving.servers import serving
from tests.reward.scoring.models import pictures
from tests.tiny_pipelines import LATENTS

PROMPTS = ["a cat", "two dogs", "a cat"]
WEIGHTS = torch.tensor([0.25, 0.75])

pytestmark = pytest.mark.usefixtures("bases_here")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_axes")
    write_run(folder, "two_axes", "sd35", text_taps=[], lora={"rank": 2, "alpha": 3.0})
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> RewardModel:
    return RewardModel.from_pretrained(run)


def test_the_score_is_the_weighted_sum_at_every_level(model: RewardModel) -> None:
    levels = [ScoringNoise(sigmas=(0.2,)), ScoringNoise(sigmas=(0.2, 0.7))]
    axes = model.score_levels(PROMPTS, pictures(3), levels, axes=True)
    assert axes.shape == (3, 2, 2)
    torch.testing.assert_close(model.score_levels(PROMPTS, pictures(3), levels), axes @ WEIGHTS)
    latents = torch.randn(3, 4, LATENTS, LATENTS, requires_grad=True)
    both = model.score_latents(PROMPTS, latents, axes=True)
    total = model.score_latents(PROMPTS, latents)
    torch.testing.assert_close(total, both @ WEIGHTS)
    total.sum().backward()
    assert latents.grad.abs().sum() > 0
    assert model.score([], []).shape == (0,)
    assert model.score([], [], axes=True).shape == (0, 2)


def test_the_weights_are_in_the_config_and_the_card(model: RewardModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [0.25, 0.75] in [part.get("axes") for part in settings_in(config)]
    assert "0.25 × fidelity, 0.75 × aesthetics" in (tmp_path / "saved" / "README.md").read_text()
    again = RewardModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.score(PROMPTS, pictures(3), axes=True), model.score(PROMPTS, pictures(3), axes=True))


@pytest.mark.slow
def test_other_weights_leave_the_calibration_out(
    model: RewardModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights edited in a published folder make other scores than those that were calibrated."""
    fitted = Calibration.fit(torch.arange(30.0), "numbers", model.noise, axes=model.head.axis_weights)
    model.calibration = fitted
    try:
        model.save_pretrained(tmp_path / "saved")
    finally:
        model.calibration = None
    assert RewardModel.from_pretrained(tmp_path / "saved").calibration == fitted
    place = tmp_path / "saved" / "config.json"
    config = json.loads(place.read_text())
    for part in settings_in(config):
        if "weights" not in part and part.get("axes") == [0.25, 0.75] and "quantiles" not in part:
            part["axes"] = [1.0, 0.0]
    place.write_text(json.dumps(config))
    assert RewardModel.from_pretrained(tmp_path / "saved").calibration is None
    assert "with the axes weighed [0.25, 0.75], and these are [1.0, 0.0] now" in caplog.text


def settings_in(value: object) -> Iterator[dict]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from settings_in(inner)


def test_the_table_shows_both(run: Path, model: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for number, picture in enumerate(pictures(3)):
        picture.save(f"pictures/{number}.png")
    main(["score", "pictures", "scores.csv", f"--model={run}", "--device=cpu", "--prompt=a cat", "--each_level=true"])
    table = read_scores(Path("scores.csv"))
    axes = torch.tensor([table["fidelity"].to_pylist(), table["aesthetics"].to_pylist()]).T
    torch.testing.assert_close(axes, model.score("a cat", pictures(3), axes=True), atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(table["score"].to_pylist()), axes @ WEIGHTS, atol=1e-6, rtol=0)


def test_the_server_answers_with_both(model: RewardModel) -> None:
    with serving(model) as (address, service):
        picture = pictures(1)[0]
        stream = BytesIO()
        picture.save(stream, "png")
        sent = {"prompt": "a cat", "image": b64encode(stream.getvalue()).decode()}
        reply = httpx.post(f"{address}/v1/score_images", json=sent, timeout=300).json()
        expected = model.score("a cat", [picture], axes=True)[0]
        assert [*reply["fidelity"], *reply["aesthetics"]] == pytest.approx(expected.tolist(), abs=2e-5)
        assert reply["scores"] == pytest.approx([float(expected @ WEIGHTS)], abs=2e-5)
        body = save(tensors_of(service.accepted, rows=2))
        reply = httpx.post(f"{address}/v1/score", content=body, headers=HEADERS, timeout=300).json()
        both = torch.tensor([reply["fidelity"], reply["aesthetics"]]).T
        assert reply["raw_scores"] == pytest.approx((both @ WEIGHTS).tolist(), abs=1e-6)
        states, times = torch.randn(2, 3, 4, LATENTS, LATENTS), torch.tensor([900.0, 500.0, 20.0])
        body = save({"latents": states, "timesteps": times}, metadata={"prompt": "a cat"})
        reply = httpx.post(f"{address}/v1/score_states", content=body, headers=HEADERS, timeout=300).json()
        expected = model.score_states("a cat", states, times, axes=True)
        both = torch.tensor([reply["fidelity"], reply["aesthetics"]]).permute(1, 2, 0)
        torch.testing.assert_close(both, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(reply["scores"]), expected @ WEIGHTS, atol=2e-5, rtol=0)
        assert httpx.get(f"{address}/health").json()["rewards"] == {"reward": ["score", "fidelity", "aesthetics"]}
