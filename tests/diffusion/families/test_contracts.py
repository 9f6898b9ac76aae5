"""Encoded prompts with masks and without pooled vectors, and latent spaces of all three codecs."""

import pytest
import torch

from latentreward.core.contracts import Conditioning, LatentSpace
from latentreward.core.errors import InputError


def masked(*lengths: int, width: int = 3, seed: int = 0) -> Conditioning:
    """Prompts of these lengths, padded with zeros to the longest."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(len(lengths), max(lengths), width, generator=generator) * mask.unsqueeze(-1)
    return Conditioning(tokens, None, mask)


def test_joined_prompts_of_unequal_length_keep_their_tokens() -> None:
    short, long = masked(2, 1), masked(5, seed=1)
    both = Conditioning.join([short, long])
    assert len(both) == 3 and both.prompt_embeds.shape == (3, 5, 3) and both.pooled_prompt_embeds is None
    assert both.prompt_mask.sum(dim=1).tolist() == [2, 1, 5]
    assert torch.equal(both.prompt_embeds[:2, :2], short.prompt_embeds)
    assert not both.prompt_embeds[:2, 2:].any()
    assert torch.equal(both.select([0, 1]).trimmed().prompt_embeds, short.prompt_embeds)


def test_without_masks_lengths_must_agree() -> None:
    one, two = (Conditioning(torch.zeros(1, length, 2), torch.zeros(1, 4)) for length in (3, 4))
    with pytest.raises(InputError, match="encoded prompts have 3 and 4 tokens"):
        Conditioning.join([one, two])
    with pytest.raises(InputError, match="only some of the encoded prompts have a pooled vector"):
        Conditioning.join([one, Conditioning(torch.zeros(1, 3, 2))])


def test_pooled_is_the_vector_or_the_mean_of_the_prompts_own_tokens() -> None:
    prompts = masked(2, 4)
    torch.testing.assert_close(prompts.pooled()[0], prompts.prompt_embeds[0, :2].mean(dim=0))
    torch.testing.assert_close(prompts.pooled()[1], prompts.prompt_embeds[1].mean(dim=0))
    given = Conditioning(torch.zeros(1, 2, 3), torch.ones(1, 4))
    assert torch.equal(given.pooled(), torch.ones(1, 4))
    assert not given.zeros().pooled().any()
    assert torch.equal(Conditioning(torch.zeros(1, 2, 3)).pooled(), torch.zeros(1, 3))  # no tokens: not 0 / 0


SCALAR = LatentSpace(16, 8, 0.3611, 0.1159)
CHANNEL = LatentSpace(2, 8, frame_downscale=4, means=(0.5, -0.5), stds=(1.0, 2.0))
NORM = LatentSpace(128, 16, statistics="ab")


@pytest.mark.parametrize(("space", "codec"), [(SCALAR, "scalar"), (CHANNEL, "channel"), (NORM, "batch_norm")])
def test_spaces_survive_their_record(space: LatentSpace, codec: str) -> None:
    assert space.codec == codec
    record = {name: list(value) if isinstance(value, tuple) else value for name, value in space.record().items()}
    assert LatentSpace.from_record(record) == space
    assert hash(space) == hash(LatentSpace.from_record(record))


def test_spaces_are_equal_if_reductions_and_constants_are() -> None:
    assert LatentSpace(128, 16, statistics="cd") != NORM
    assert LatentSpace(2, 8, frame_downscale=4, means=(0.5, -0.5), stds=(1.0, 2.5)) != CHANNEL
    assert len({str(space) for space in (SCALAR, CHANNEL, NORM)}) == 3


def test_shapes_of_images_and_clips() -> None:
    assert SCALAR.shape(1024, 512) == (16, 128, 64)
    assert CHANNEL.shape(64, 32) == (2, 1, 8, 4)
    assert CHANNEL.shape(64, 32, frames=9) == (2, 3, 8, 4)
