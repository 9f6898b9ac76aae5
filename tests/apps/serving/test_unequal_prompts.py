"""The protocol for models whose prompts have a mask and no pooled vector, and whose latents have a time axis."""

import base64
import random
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from latentreward.apps.serving.batch_scorer import LatentRow, RowScorer
from latentreward.apps.serving.protocol import parse_request
from latentreward.apps.serving.refusals import RequestError
from latentreward.apps.serving.served import ServedModel
from latentreward.apps.serving.tensors import Accepted, memory_bytes
from latentreward.core.contracts import Conditioning
from latentreward.reward import RewardModel, ScoringNoise
from latentreward.reward.scoring.ensemble import pixel_batches
from tests.apps.serving.latent_requests import HEADERS, mutated, tensors_of
from tests.apps.serving.servers import served_model, serving, tiny_reward
from tests.unequal_prompts import SPACE, clip_reward, letter_states

ACCEPTED = Accepted(
    channels=4,
    text_width=6,
    pooled_width=None,
    patch=2,
    max_side=16,
    max_prompt=6,
    max_pixels=128,
    max_tokens=7,
    max_rows=3,
    masked=True,
    frames=1,
)
IMAGES = Accepted(channels=4, text_width=6, pooled_width=3)


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    return clip_reward()


@pytest.fixture(scope="module")
def served(reward: RewardModel) -> Iterator[tuple[str, ServedModel]]:
    with serving(reward) as server:
        yield server


def changed(**tensors: torch.Tensor | None) -> bytes:
    """A request with other tensors; None leaves one out."""
    given = tensors_of(ACCEPTED, rows=2) | tensors
    return save({name: value for name, value in given.items() if value is not None})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_rows_are_cut_to_their_tokens(dtype: torch.dtype) -> None:
    tensors = tensors_of(ACCEPTED, rows=2)
    tensors["prompt_mask"] = tensors["prompt_mask"].to(dtype)
    rows = parse_request(save(tensors), ACCEPTED)
    for number, row in enumerate(rows):
        assert torch.equal(row.latents, tensors["latents"][number]) and row.latents.shape == (4, 1, 8, 8)
        assert torch.equal(row.encoded.prompt_embeds[0], tensors["prompt_embeds"][number, : 5 - number])
        assert row.encoded.pooled_prompt_embeds is None and row.tokens == 64
    padded = {"prompt_embeds": torch.ones(2, 7, 6), "prompt_mask": torch.arange(7).expand(2, 7) < 6}
    assert len(parse_request(save(tensors | padded), ACCEPTED)) == 2  # padding does not count
    needed = sum(row.latents.nbytes + row.encoded.prompt_embeds.nbytes for row in rows)
    assert memory_bytes(save(tensors)) == len(save(tensors)) >= needed
    assert memory_bytes(save(tensors | {"latents": tensors["latents"].half()})) >= needed


def masks(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("body", "message", "status"),
    [
        (
            changed(prompt_mask=None),
            "lacks 'prompt_mask'; the protocol has latents, prompt_embeds, prompt_mask, u",
            400,
        ),
        (changed(prompt_mask=torch.ones(2, 5)), "prompt_mask: dtype must be BOOL or U8, not 'F32'", 400),
        (
            changed(prompt_mask=torch.ones(2, 5, 1, dtype=torch.bool)),
            r"prompt_mask: shape must be \(B, L\), whole",
            400,
        ),
        (changed(prompt_mask=masks([1] * 4, [1] * 4)), r"prompt_mask: L of \(B, L\) is 4, but 5 in this model", 422),
        (changed(prompt_mask=masks([1] * 5)), r"prompt_mask: B of \(B, L\) is 1, but 2 in", 422),
        (changed(prompt_mask=masks([1] * 5, [0] * 5)), "prompt_mask: row 1 must begin with a 1", 422),
        (changed(prompt_mask=masks([0, 1, 1, 1, 1], [1] * 5)), "prompt_mask: row 0 must begin with a 1", 422),
        (changed(prompt_mask=masks([1] * 5, [1, 0, 1, 0, 0])), "prompt_mask: row 1 .* hold no 1 after a 0", 422),
        (changed(prompt_mask=masks([1] * 5, [2, 0, 0, 0, 0])), "prompt_mask holds 2; give 0 or 1", 422),
        (
            changed(pooled_prompt_embeds=torch.ones(2, 3)),
            "pooled_prompt_embeds is given, but this model takes none",
            422,
        ),
        (changed(latents=torch.zeros(2, 4, 8, 8)), r"latents have 4 axes, .* takes \(B, C, T, h, w\)", 422),
        (
            changed(latents=torch.zeros(2, 4, 8)),
            r"latents: shape must be \(B, C, h, w\) or \(B, C, T, h, w\), whole numbers",
            400,
        ),
        (changed(latents=torch.zeros(2, 3, 1, 8, 8)), r"latents: C of \(B, C, T, h, w\) is 3, but 4 in", 422),
        (changed(latents=torch.zeros(2, 4, 1, 7, 8)), "latents: 7 is no multiple of the 2 ", 422),
        (changed(latents=torch.zeros(2, 4, 3, 8, 8)), r"latents: T of \(B, C, T, h, w\) is 3, but 1 in", 422),
        (
            changed(prompt_embeds=torch.ones(2, 7, 6), prompt_mask=masks([1] * 7, [1] * 7)),
            "prompt_embeds: a prompt of 7 tokens is over 6, the limit of this network",
            422,
        ),
    ],
)
def test_bad_requests_are_refused_in_one_line(body: bytes, message: str, status: int) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_request(body, ACCEPTED)
    assert caught.value.status == status and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_models_without_mask_and_time_axis_refuse_them_and_name_the_tensors_of_before() -> None:
    tensors = tensors_of(IMAGES)
    with pytest.raises(RequestError, match="prompt_mask is given, but this model takes none; leave it out") as caught:
        parse_request(save(tensors | {"prompt_mask": torch.ones(1, 5, dtype=torch.bool)}), IMAGES)
    assert caught.value.status == 422
    with pytest.raises(RequestError, match=r"latents: shape must be \(B, C, h, w\), whole numbers from 1 on") as caught:
        parse_request(save(tensors | {"latents": torch.zeros(1, 4, 1, 8, 8)}), IMAGES)
    assert caught.value.status == 400
    wanted = "the body lacks 'pooled_prompt_embeds'; the protocol has latents, prompt_embeds, pooled_prompt_embeds, u, "
    del tensors["pooled_prompt_embeds"]
    with pytest.raises(RequestError) as caught:
        parse_request(save(tensors), IMAGES)
    assert caught.value.status == 400 and str(caught.value) == f"{wanted}seeds"


def test_models_that_pool_tokens_take_a_mask_in_place_of_the_pooled_vector() -> None:
    """FLUX.2-klein: its clients have padded tokens, on either side, and a mask, but no pooled vector."""
    accepted = Accepted(channels=4, text_width=6, pooled_width=6, pools_tokens=True)
    given = tensors_of(accepted, rows=2)
    without = {name: value for name, value in given.items() if name != "pooled_prompt_embeds"}
    mask = masks([0, 0, 1, 1, 1], [1, 1, 0, 0, 0])
    rows, plain = (parse_request(save(body), accepted) for body in (without | {"prompt_mask": mask}, given))
    for row, other in zip(rows, plain, strict=True):
        assert torch.equal(row.encoded.prompt_embeds, other.encoded.prompt_embeds) and row.encoded.prompt_mask is None
    mean = given["prompt_embeds"][0, 2:].float().mean(dim=0)
    torch.testing.assert_close(rows[0].encoded.pooled_prompt_embeds[0], mean)
    assert torch.equal(plain[1].encoded.pooled_prompt_embeds[0], given["pooled_prompt_embeds"][1].float())
    for tensors, message, status in (
        (without, "pooled_prompt_embeds and prompt_mask are missing; give one of them", 400),
        (without | {"prompt_mask": masks([1] * 5, [0] * 5)}, "prompt_mask: row 1 holds no 1", 422),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            parse_request(save(tensors), accepted)
        assert caught.value.status == status


def test_1_000_mutated_requests_are_judged_as_safetensors_and_the_protocol_judge_them() -> None:
    rng, verdicts = random.Random(0), {True: 0, False: 0}
    good_body = save(tensors_of(ACCEPTED, rows=2))
    for number in range(1_000):
        kind, body, good = mutated(rng, good_body, ACCEPTED)
        try:
            parse_request(body, ACCEPTED)
            found = True
        except RequestError:
            found = False
        assert found == good, f"number {number}, {kind}: {body[:500]!r}"
        verdicts[good] += 1
    assert min(verdicts.values()) > 30


def padded(encoded: Conditioning, length: int) -> dict[str, torch.Tensor]:
    """Embeddings and mask of a request, with numbers in the padding that must not be read."""
    encoded = encoded.padded(length)
    junk = torch.where(encoded.prompt_mask[..., None], encoded.prompt_embeds, torch.tensor(1e3))
    return {"prompt_embeds": junk, "prompt_mask": encoded.prompt_mask.contiguous()}


def test_padding_changes_neither_score_nor_noise(reward: RewardModel, served: tuple[str, ServedModel]) -> None:
    address, _ = served
    texts = ["a cat", "", "two dogs in the rain"]
    latents = torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = ScoringNoise(sigmas=(0.4,), seeds=(3,))
    encoded = letter_states()(texts)
    given = {"latents": latents, "u": torch.full((3,), 0.4), "seeds": torch.full((3,), 3)}
    for length in (encoded.prompt_embeds.shape[1], 40, 100):
        body = save({**given, **padded(encoded, length)})
        reply = httpx.post(f"{address}/v1/score", content=body, headers=HEADERS)
        assert reply.status_code == 200, reply.text
        own = [(latents[[n]], letter_states()([text]), letter_states()([""])) for n, text in enumerate(texts)]
        wanted = [reward.score_latents("", one, noise=noise, conditioning=text).item() for one, *text in own]
        assert reply.json()["raw_scores"] == pytest.approx(wanted, abs=2e-5)
    assert max(wanted) - min(wanted) > 1e-2


def test_rows_of_unequal_length_share_a_batch_and_leave_each_other_alone(reward: RewardModel) -> None:
    calls = []

    def counted(*given: object, **settings: object) -> torch.Tensor:
        calls.append(settings["conditioning"][0].prompt_mask)
        return RewardModel.score_latents(reward, *given, **settings)

    scorer = RowScorer(reward, 4)
    rows = [row_of(letters, number) for number, letters in enumerate(("a cat", "dog", "two dogs in the rain"))]
    alone = [scorer([row])[0] for row in rows]
    reward.score_latents = counted
    try:
        together = scorer(rows)
    finally:
        del reward.score_latents
    assert together == alone
    assert len({row.group for row in rows}) == 1 and calls[0].shape == (3, 64)
    assert calls[0].sum(dim=1).tolist() == [6, 4, 12]
    assert row_of("a cat", 0, tokens=65).group != rows[0].group
    assert row_of("a cat", 0, masked=False).group != row_of("dog", 0, masked=False).group


def row_of(text: str, seed: int, tokens: int | None = None, masked: bool = True) -> LatentRow:
    generator = torch.Generator().manual_seed(seed)
    embeds = letter_states()([text]).prompt_embeds if tokens is None else torch.zeros(1, tokens, 6)
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if masked else None
    return LatentRow("", torch.randn(4, 1, 8, 8, generator=generator), 0.4, seed, Conditioning(embeds, None, mask))


def test_a_prompt_in_a_header_gets_the_score_of_its_image(reward: RewardModel, served: tuple[str, ServedModel]) -> None:
    address, _ = served
    stream = BytesIO()
    Image.new("RGB", (16, 16), "red").save(stream, "png")
    image = Image.open(BytesIO(stream.getvalue()))
    encoded = reward.backbone.encode_prompts(["a cat"])
    tensors = {
        "latents": reward.encode_images(next(iter(pixel_batches([image], reward.image_sizes, 1, 1))).pixels),
        **padded(encoded, 9),
        "u": torch.tensor([0.4]),
        "seeds": torch.tensor([0]),
    }
    header = {"x-prompt": base64.b64encode(b"a cat").decode()}
    reply = httpx.post(f"{address}/v1/score", content=save(tensors), headers={**HEADERS, **header})
    wanted = reward.score("a cat", [image]).item()
    assert reply.json()["raw_scores"] == pytest.approx([wanted], abs=1e-5)
    form = {"prompt": "a cat"}, [("image", ("a.png", stream.getvalue()))]
    reply = httpx.post(f"{address}/v1/score_images", data=form[0], files=form[1])
    assert reply.json()["scores"] == pytest.approx([wanted], abs=1e-5)


def test_the_description_tells_what_the_model_takes(served: tuple[str, ServedModel]) -> None:
    address, service = served
    told = httpx.get(f"{address}/v1/model").json()
    assert told["pooled_prompt_embeds_width"] is None and told["prompt_mask"] is True and told["frames"] == 1
    assert told["latent_space"]["frame_downscale"] == SPACE.frame_downscale
    accepted = service.accepted
    assert (accepted.masked, accepted.frames, accepted.pooled_width, accepted.tokens) == (True, 1, None, None)
    assert "pools_tokens" not in told
    images = served_model(tiny_reward())
    assert images.describe()["pooled_prompt_embeds_width"] > 0
    assert not {"prompt_mask", "pools_tokens", "frames"} & images.describe().keys()
    assert "frame_downscale" not in images.describe()["latent_space"]
    images.accepted = replace(images.accepted, pools_tokens=True)
    assert images.describe()["pools_tokens"] is True
