"""The client files of docs/clients, called as the frameworks call them, against a server."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import ExifTags, Image

from latentreward.apps.serving.batching import RequestError
from latentreward.apps.serving.service import ServedModel
from tests.apps.serving.prompted_requests import TIMES, latents_of
from tests.apps.serving.servers import serving, tiny_reward
from tests.reward.remote.judges import breaks_off, judging, says
from tests.reward.scoring.models import pictures
from tests.tiny_pipelines import pipeline_folder

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "clients"
TOKEN = "s3cret"
PROMPTS = ["a cat", "two dogs", "a cat"]
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, ServedModel]]:
    with serving(tiny_reward(), max_wait_ms=1, token=TOKEN) as started:
        yield started


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a file of the folder, as from the folder of a training script."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        for file in FOLDER.glob("*.py"):
            monkeypatch.delitem(sys.modules, file.stem, raising=False)
        return __import__(name)

    return load


@pytest.fixture
def client(load: Load, running: tuple[str, ServedModel]) -> Any:
    return load("latentreward_client").RewardClient(running[0], token=TOKEN, rows=2)


def test_images_of_every_kind(client: Any, running: tuple[str, ServedModel]) -> None:
    images = pictures(3)
    wanted = running[1].reward.score(PROMPTS, images)
    arrays = np.stack([np.asarray(image) for image in images])
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    for given in (images, arrays, tensor):
        torch.testing.assert_close(client.score_images(PROMPTS, given), wanted, atol=2e-5, rtol=0)
    for one in (images[0], arrays[0], tensor[0]):
        torch.testing.assert_close(client.score_images(PROMPTS[0], one), wanted[:1], atol=2e-5, rtol=0)


def tensor(value: float) -> torch.Tensor:
    return torch.full((1, 3, 8, 8), value)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([np.zeros((8, 8), np.uint8)], r"an array of uint8 of shape \(8, 8\); give uint8 of shape \(H, W, 3\)"),
        (np.zeros((1, 8, 8, 3)), "an image is an array of float64 of shape"),
        (torch.zeros(1, 1, 8, 8), r"a tensor of shape \(1, 1, 8, 8\); give \(N, 3, H, W\)"),
        (tensor(0).to(torch.uint8), r"images are a tensor of torch\.uint8"),
        *((tensor(value), r"images are a tensor from .*; give finite values in") for value in (200.0, -0.5, torch.nan)),
    ],
)
def test_wrong_images_are_told_before_they_are_sent(client: Any, images: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        client.score_images("a", images)


def test_what_a_server_refuses_is_said(client: Any, load: Load, running: tuple[str, ServedModel]) -> None:
    (address, model), kind = running, load("latentreward_client").RewardClient
    one = latents_of(model.accepted, 1)
    for asked, latents, told in (
        (client, one * torch.nan, r"answered 422: .*latents holds NaN"),
        (kind(address), one, r"answered 401: .*token"),
        (kind(address, "other", TOKEN), one, r"answered 404: .*no reward 'other'"),
        (kind("http://127.0.0.1:9", retries=0), one, "cannot be reached"),
    ):
        with pytest.raises(RuntimeError, match=told):
            asked.score_latents("a", latents)
    with pytest.raises(ValueError, match=r"url='127\.0\.0\.1:8123' is no address; give one such as http://"):
        kind("127.0.0.1:8123")
    with pytest.raises(ValueError, match="2 prompts for 3 rows"):
        client.score_latents(["a", "b"], latents_of(model.accepted, 3))


def test_the_orientation_of_a_photograph_arrives(client: Any, running: tuple[str, ServedModel], tmp_path: Path) -> None:
    (image,), exif = pictures(1), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    with Image.open(tmp_path / "turned.jpg") as photograph:
        wanted = running[1].reward.score("a cat", [photograph])
        for given in ([photograph], tmp_path / "turned.jpg", [str(tmp_path / "turned.jpg")]):
            torch.testing.assert_close(client.score_images("a cat", given), wanted, atol=2e-5, rtol=0)
        assert abs(wanted - running[1].reward.score("a cat", [Image.fromarray(np.asarray(photograph))])) > 1e-4


def test_latents_and_states(client: Any, running: tuple[str, ServedModel]) -> None:
    model = running[1]
    latents, states = latents_of(model.accepted, 3), latents_of(model.accepted, 3, 3)
    wanted = model.reward.score_latents(PROMPTS, latents)
    torch.testing.assert_close(client.score_latents(PROMPTS, latents), wanted, atol=2e-5, rtol=0)
    wanted = model.reward.score_states(PROMPTS, states, TIMES)
    torch.testing.assert_close(client.score_states(PROMPTS, states, TIMES), wanted, atol=2e-5, rtol=0)
    one, other = (client.score_latents("a", latents, u=0.5, seeds=[seed] * 3) for seed in (1, 2))
    assert not torch.allclose(one, other)
    assert torch.allclose(client.score_latents("a", latents, u=0.5), client.score_latents("a", latents, u=0.5))


def test_a_full_server_is_asked_again(
    client: Any, running: tuple[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    score, times = running[1].score, []

    async def full_at_first(*given: Any) -> Any:
        times.append(time.monotonic())
        if len(times) == 1:
            raise RequestError("full", 503, 1)
        return await score(*given)

    monkeypatch.setattr(running[1], "score", full_at_first)
    assert client.score_latents("a", latents_of(running[1].accepted, 1)).shape == (1,)
    assert times[1] - times[0] >= 1


def test_the_token_does_not_follow_a_redirect(load: Load) -> None:
    client = load("latentreward_client").RewardClient
    with judging() as other, judging(faults=[says(302, location=f"{other.url}/")]) as judge:
        with pytest.raises(RuntimeError, match="answered 302"):
            client(judge.url, token=TOKEN).score_images("a", pictures(1))
        assert judge.headers[0]["authorization"] == f"Bearer {TOKEN}"
        assert not other.headers


def test_an_answer_that_breaks_off_is_asked_for_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    late = says(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")
    with judging(faults=[breaks_off, late]) as judge:
        assert load("latentreward_client").RewardClient(judge.url).score_images("a", pictures(1)).shape == (1,)
        assert len(judge.headers) == 3


@pytest.mark.parametrize(("file", "factory"), [("flow_grpo_reward", "flow_grpo"), ("ddpo_reward", "ddpo")])
def test_loops_in_the_manner_of_ddpo(
    load: Load, running: tuple[str, ServedModel], monkeypatch: pytest.MonkeyPatch, file: str, factory: str
) -> None:
    monkeypatch.setenv("LATENTREWARD_URL", running[0])
    monkeypatch.setenv("LATENTREWARD_NAME", "reward")
    monkeypatch.setenv("LATENTREWARD_TOKEN", TOKEN)
    module = load(file)
    reward = module.latentreward_score("cuda") if factory == "flow_grpo" else module.latentreward()
    images = pictures(3)
    tensor = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images]) / 255
    with ThreadPoolExecutor(2) as executor:  # as both loops do
        scores, more = executor.submit(reward, tensor, tuple(PROMPTS), ({},) * 3).result()
    assert more == {}
    found = torch.as_tensor(scores, dtype=torch.float32)
    torch.testing.assert_close(found, running[1].reward.score(PROMPTS, images), atol=2e-5, rtol=0)


def test_a_diffusers_loop(client: Any, load: Load, running: tuple[str, ServedModel]) -> None:
    loop, model = load("diffusers_loop"), running[1]
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder("sd35"))
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 16, "width": 16, "max_sequence_length": 16}
    image, scores = loop.best_of(pipeline, client, "a cat", 3, **options)
    assert image.size == (16, 16) and scores.shape == (3,)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    made = pipeline("a cat", num_images_per_prompt=3, generator=generators, output_type="latent", **options).images
    torch.testing.assert_close(scores, model.reward.score_latents("a cat", made), atol=2e-5, rtol=0)
    timesteps, steps = loop.scored_steps(pipeline, client, "a cat", **options)
    assert timesteps.shape == steps.shape == (2,) and (timesteps.diff() < 0).all()
    pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="EulerDiscreteScheduler scales states by sigma; take DDIMScheduler"):
        loop.scored_steps(pipeline, client, "a cat", **options)
