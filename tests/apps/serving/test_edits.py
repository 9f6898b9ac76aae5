"""A served reward of edits: images and latents with the pictures that they are edits of, by every route."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from latentreward.apps.serving.batching import RequestError
from latentreward.apps.serving.bodies import images_of_json, parse_latents, pixel_bytes
from latentreward.apps.serving.service import ServedModel
from latentreward.core.contracts import Conditioning
from latentreward.core.registry import create_backbone
from latentreward.data.image_sizes import OneSize
from latentreward.reward import GatedQFormerHead, RewardModel, ScoringNoise, edit_prompt
from latentreward.reward.scoring.scoring_noise import draw_noise, timesteps_of
from tests.apps.serving.framework_clients import FlowFactoryClient, UniRLClient, encoded
from tests.apps.serving.latent_requests import tensors_of
from tests.apps.serving.prompted_requests import body_of
from tests.apps.serving.servers import serving
from tests.diffusion.families.made_qwen_image_edit import qwen_image_edit_folder
from tests.reward.scoring.models import edit_reward, picture, png

EDITED = [picture(seed, 40, 60) for seed in range(3)]
RED, BLUE = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))
TEXT = "make it red"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, ServedModel]]:
    with serving(edit_reward(), batch_size=4, max_wait_ms=1, queue=8, max_latent_pixels=192) as started:
        yield started


def ask(address: str, content: dict[str, Any], path: str = "v1/score_images") -> httpx.Response:
    return httpx.post(f"{address}/{path}", json=content, timeout=300)


def wanted(model: ServedModel, *sources: list[Image.Image]) -> Any:
    """The scores of the first edited images by the model itself, one for each list of sources."""
    with torch.inference_mode():
        prompts = [edit_prompt(TEXT, row) if row else TEXT for row in sources]
        scores = [model.reward.score(prompt, image).item() for prompt, image in zip(prompts, EDITED, strict=False)]
    return pytest.approx(scores, abs=2e-5)


@pytest.mark.slow
def test_images_are_scored_with_their_sources(served: tuple[str, ServedModel]) -> None:
    address, model = served
    images = [encoded(image) for image in EDITED]
    red, blue = encoded(RED), encoded(BLUE)
    for given, rows in (
        ([red], [[RED]] * 3),
        ([red, blue], [[RED, BLUE]] * 3),
        ([[red], [blue], [blue, red]], [[RED], [BLUE], [BLUE, RED]]),
        ([[red], [], [blue]], [[RED], [], [BLUE]]),
        ([], [[]] * 3),
    ):
        reply = ask(address, {"prompt": TEXT, "images": images, "source_images": given})
        assert reply.status_code == 200, reply.text
        assert reply.json()["scores"] == wanted(model, *rows)


def test_equal_sources_are_encoded_once_and_prompts_kept_without_their_bytes(
    served: tuple[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, model = served
    encoder, seen = model.reward.backbone.source_encoder, list[str]()
    assert encoder is not None
    pixels = encoder.pixels
    monkeypatch.setattr(encoder, "pixels", lambda image: seen.append(image.image_key) or pixels(image))
    green = encoded(Image.new("RGB", (60, 40), "green"))
    given = {"prompts": ["one", "two", "one"], "images": [encoded(image) for image in EDITED]}
    for _ in range(2):
        assert ask(address, given | {"source_images": [green]}).status_code == 200
    assert len(seen) == 1


DAMAGED = base64.b64encode(png(BLUE)[:-40]).decode()


@pytest.mark.parametrize(
    ("taken", "given", "key"),
    [
        ((0, 16), [["aaaa"]] * 2, "2 lists of sources"),
        ((0, 16), [encoded(RED)] * 17, "17 sources are given for an image, but this reward takes 0 to 16"),
        ((0, 16), ["aaaa"], "source 0 of image 0"),
        ((0, 16), [[encoded(RED), DAMAGED]], "source 1 of image 0"),
        ((0, 16), ["%"], "a source image is no base64"),
        ((0, 16), "aaaa", "source_images.list"),
        ((0, 16), [encoded(Image.new("1", (8200, 8200)))], "--max_pixels"),
        ((1, 1), [], "0 sources are given for an image, but this reward takes 1"),
        ((0, 0), ["aaaa"], "this reward takes 0"),  # before they are decoded
    ],
)
def test_bad_sources_are_refused_in_one_line(
    served: tuple[str, ServedModel], monkeypatch: pytest.MonkeyPatch, taken: tuple[int, int], given: Any, key: str
) -> None:
    address, model = served
    monkeypatch.setattr(model, "accepted", replace(model.accepted, sources=taken))
    reply = ask(address, {"prompt": TEXT, "image": encoded(RED), "source_images": given})
    assert reply.status_code in (400, 422) and key in reply.json()["error"], reply.text
    assert "\n" not in reply.json()["error"]


def test_sources_count_once_in_the_memory_that_a_request_takes() -> None:
    def needed(*sources: list[Image.Image]) -> int:
        given = {"source_images": [[*map(encoded, row)] for row in sources]}
        content = {"prompt": TEXT, "images": [encoded(RED)] * len(sources), **given}
        return pixel_bytes(images_of_json(json.dumps(content).encode()), 10**6)

    assert needed([BLUE]) == needed([]) + 4 * 2400 + 8 * max(BLUE.size)
    assert needed([BLUE], [BLUE]) - needed([], []) == needed([BLUE]) - needed([])


def test_flow_factorys_client_sends_condition_images(served: tuple[str, ServedModel]) -> None:
    address, model = served
    conditions = [[encoded(RED)], [encoded(BLUE), encoded(RED)]]
    found = FlowFactoryClient(address).compute([TEXT] * 2, EDITED[:2], condition_images=conditions)
    assert found == wanted(model, [RED], [BLUE, RED])
    sent = FlowFactoryClient(address).payload([TEXT] * 2, EDITED[:2]) | {"condition_images": conditions[:1]}
    reply = ask(address, sent, "compute")
    assert reply.status_code == 422 and "1 lists of sources" in reply.json()["error"]


def test_unirls_earlier_turns_are_the_sources(served: tuple[str, ServedModel]) -> None:
    address, model = served
    sent = UniRLClient(address, {"reward": 1.0}).payload([TEXT] * 3, EDITED, "png")
    turns = [{"text": TEXT, "image_b64": encoded(source)} for source in (RED, BLUE)]
    sent["requests"][0]["history"][:0] = turns[:1]
    sent["requests"][1]["history"][:0] = turns
    results = ask(address, sent, "score").json()["results"]
    assert [result["reward"]["score"] for result in results] == wanted(model, [RED], [RED, BLUE], [])
    sent["requests"][0]["history"][0]["image_b64"] = "%"
    reply = ask(address, sent, "score")
    assert reply.status_code == 400 and reply.json()["error"] == "a source image is no base64"


KIND = {"content-type": "application/octet-stream"}


def latents(*leading: int, height: int = 2, width: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(*leading, 16, height, width, generator=torch.Generator().manual_seed(seed))


def send(address: str, path: str, body: bytes) -> httpx.Response:
    headers = KIND | {"x-drm-protocol-version": "1"}
    return httpx.post(f"{address}/v1/{path}", content=body, headers=headers, timeout=300)


def by_model(model: ServedModel, texts: list[str], clean: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """Scores at the model's own noise, with latents of sources in the conditioning."""
    conditioning, _ = model.reward.encode_prompts(texts)
    encoded = replace(conditioning, source_latents=sources)
    return model.reward.score_latents(texts, clean, conditioning=(encoded, None))


@pytest.mark.slow
@torch.inference_mode()
def test_latents_are_scored_with_latents_of_their_sources(served: tuple[str, ServedModel]) -> None:
    address, model = served
    clean, same, wide = latents(3), latents(3, seed=1), latents(3, width=4, seed=2)
    found = []
    for sources in ([], [same], [same, wide], [wide, same]):
        tensors = {"latents": clean, **{f"source_{place}": one for place, one in enumerate(sources)}}
        reply = send(address, "score_latents", body_of(tensors, [TEXT, "other", TEXT]))
        assert reply.status_code == 200, reply.text
        found.append(reply.json()["scores"])
        scores = by_model(model, [TEXT, "other", TEXT], clean, *sources).tolist()
        assert found[-1] == pytest.approx(scores, abs=2e-5)
    assert len({*map(tuple, found)}) == 4


@torch.inference_mode()
def test_latents_of_pictures_score_as_the_pictures(served: tuple[str, ServedModel]) -> None:
    address, model = served
    prompt = edit_prompt(TEXT, BLUE)
    model.reward.score(prompt, EDITED[0])  # sets the size of sources
    source = model.reward.backbone.encode_prompts([prompt]).source_latents
    clean = latents(1, height=8, width=12)
    reply = send(address, "score_latents", body_of({"latents": clean, "source_0": source[0]}, TEXT))
    assert reply.json()["scores"] == pytest.approx(model.reward.score_latents(prompt, clean).tolist(), abs=2e-5)


@torch.inference_mode()
def test_states_are_scored_with_latents_of_their_sources(served: tuple[str, ServedModel]) -> None:
    address, model = served
    states, sources, times = latents(2, 3), latents(2, seed=1), torch.tensor([900.0, 400.0, 20.0])
    body = body_of({"latents": states, "timesteps": times, "source_0": sources}, [TEXT, "other"])
    reply = send(address, "score_states", body)
    conditioning, _ = model.reward.encode_prompts([TEXT, "other"])
    encoded = replace(conditioning, source_latents=(sources,)), None
    scores = model.reward.score_states([TEXT, "other"], states, times, conditioning=encoded)
    torch.testing.assert_close(torch.tensor(reply.json()["scores"]), scores, atol=2e-5, rtol=0)


@torch.inference_mode()
def test_verl_omnis_protocol_takes_latents_of_sources(served: tuple[str, ServedModel]) -> None:
    address, model = served
    sources = {"source_0": latents(2, seed=1), "source_1": latents(2, width=1, seed=2)}
    tensors = tensors_of(model.accepted, 2) | {"latents": latents(2)}
    found = send(address, "score", save(tensors | sources)).json()["raw_scores"]
    noise, process = ScoringNoise(sigmas=(0.4,)), model.reward.backbone.noise_process
    level = process.sigma(timesteps_of(noise, process)).item()
    mask = tensors.get("prompt_mask")
    for row, score in enumerate(found):
        encoded = Conditioning(
            tensors["prompt_embeds"][[row]],
            tensors["pooled_prompt_embeds"][[row]] if "pooled_prompt_embeds" in tensors else None,
            None if mask is None else mask[[row]],
            tuple(one[[row]] for one in sources.values()),
        )
        draws = draw_noise([""], 0, level, latents(1).shape[1:])
        options = {"noise": noise, "draws": draws, "conditioning": (encoded, None)}
        assert score == pytest.approx(model.reward.score_latents("", latents(2)[[row]], **options).item(), abs=2e-5)
    assert found != pytest.approx(send(address, "score", save(tensors)).json()["raw_scores"], abs=1e-4)


@pytest.mark.parametrize(
    ("sources", "key", "changes"),
    [
        ({"source_0": latents(1)[:, :7]}, "source_0: give F32 or F16 or BF16 of shape (B, C, h0, w0), with C = 16", {}),
        ({"source_0": latents(2)}, "source_0: give F32 or F16 or BF16 of shape (B, C, h0, w0), with B = 1", {}),
        ({"source_1": latents(1)}, "source_1 is given without one before it", {}),
        ({"source_0": latents(1, height=24, width=24)}, "latents, source_0: latent pixels 582", {}),
        (
            {f"source_{n}": latents(1, height=8, width=8) for n in range(3)},
            "latents, source_0, source_1, source_2: latent pixels 198",
            {},
        ),
        ({"source_0": latents(1)[0]}, "source_0", {}),
        ({"source_16": latents(1)}, "'source_16'", {}),
        ({"source_0": latents(1) / 0}, "source_0 holds NaN", {}),
        ({"source_0": latents(1)}, "this model takes no 'source_0'", {"sources": (0, 0)}),
        ({"source_0": latents(1)}, "send images and source_images to /v1/score_images", {"sees_sources": True}),
        ({}, "0 sources are given for an image, but this reward takes 1 to 16", {"sources": (1, 16)}),
    ],
)
def test_latents_of_sources_that_do_not_fit_are_refused(
    served: tuple[str, ServedModel], sources: dict[str, torch.Tensor], key: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_latents(body_of({"latents": latents(1), **sources}, TEXT), replace(served[1].accepted, **changes))
    assert caught.value.status_code in (400, 413, 422) and key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_server_scores_with_a_text_encoder_that_sees_the_pictures() -> None:
    """Qwen-Image-Edit; a picture or text that the encoder cannot take is told, and leaves the batch's others alone."""
    backbone = create_backbone("qwen_image_edit", source=qwen_image_edit_folder(), visual_taps=[2], text_taps=[2])
    head = GatedQFormerHead(backbone.feature_spec, num_heads=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    reward = RewardModel(backbone, head).eval()
    reward.image_sizes = OneSize(32, 48)
    rows, sent = [[RED], [BLUE], [BLUE, RED]], {"prompt": TEXT, "images": [encoded(EDITED[0])] * 3}
    with serving(reward) as (address, _), torch.inference_mode():
        assert httpx.get(f"{address}/v1/model").json()["sources"] == [1, 16]
        scores = [reward.score(edit_prompt(TEXT, row), EDITED[0]).item() for row in rows]
        assert len({round(score, 4) for score in scores}) == 3
        reply = ask(address, sent | {"source_images": [[*map(encoded, row)] for row in rows]})
        assert reply.status_code == 200 and reply.json()["scores"] == pytest.approx(scores, abs=2e-5), reply.text
        good = {"prompt": TEXT, "image": encoded(EDITED[0]), "source_images": [encoded(RED)]}
        narrow = {"source_images": [encoded(Image.new("RGB", (2, 500)))]}
        for wrong, told in ((narrow, "crop the picture"), ({"prompt": "a <|image_pad|>"}, "leave it out of the text")):
            with ThreadPoolExecutor() as pool:  # they may be in one batch
                fine, bad = pool.map(ask, [address] * 2, [good, good | wrong])
            assert fine.json()["scores"] == pytest.approx(scores[:1], abs=2e-5)
            assert bad.status_code == 422 and told in bad.json()["error"]
        reply = send(address, "score_latents", body_of({"latents": latents(1), "source_0": latents(1)}, TEXT))
        assert reply.status_code == 422 and "send images and source_images to /v1/score_images" in reply.json()["error"]
