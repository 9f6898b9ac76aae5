"""The protocol for models whose prompts have a mask and no pooled vector, and whose latents have a time axis."""

from collections.abc import Iterator

import httpx
import pytest
import torch
from safetensors.torch import save

from latentreward.apps.serving.batching import Row, RowScorer
from latentreward.apps.serving.service import ServedModel
from latentreward.core.contracts import Conditioning
from latentreward.reward import RewardModel, ScoringNoise
from tests.apps.serving.latent_requests import HEADERS
from tests.apps.serving.servers import served_model, serving, tiny_reward
from tests.unequal_prompts import SPACE, clip_reward, letter_states


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    return clip_reward()


@pytest.fixture(scope="module")
def served(reward: RewardModel) -> Iterator[tuple[str, ServedModel]]:
    with serving(reward) as server:
        yield server


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


def row_of(text: str, seed: int, tokens: int | None = None, masked: bool = True) -> Row:
    generator = torch.Generator().manual_seed(seed)
    embeds = letter_states()([text]).prompt_embeds if tokens is None else torch.zeros(1, tokens, 6)
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if masked else None
    latents, encoded = torch.randn(4, 1, 8, 8, generator=generator), Conditioning(embeds, None, mask)
    return Row("", latents=latents, u=0.4, seed=seed, encoded=encoded)


def test_the_description_tells_what_the_model_takes(served: tuple[str, ServedModel]) -> None:
    address, service = served
    told = httpx.get(f"{address}/v1/model").json()
    assert told["pooled_prompt_embeds_width"] is None and told["prompt_mask"] is True and told["frames"] == 1
    assert told["latent_space"]["frame_downscale"] == SPACE.frame_downscale
    accepted = service.accepted
    assert (accepted.masked, accepted.frames, accepted.pooled_width, accepted.tokens) == (True, 1, None, None)
    told = served_model(tiny_reward()).describe()
    assert told["pooled_prompt_embeds_width"] > 0 and "frame_downscale" not in told["latent_space"]
    assert not any(told[name] for name in ("prompt_mask", "pools_tokens", "frames"))
