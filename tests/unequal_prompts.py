"""A text encoder with a mask and no pooled vector, latents with a time axis, and a source of caches with both."""

from collections.abc import Iterator, Sequence

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, LatentSpace, TapSpec
from latentreward.diffusion import DiffusionBackbone, FlowMatching
from latentreward.diffusion.cache.sources import Encoders, LatentSource, TextSpec
from latentreward.diffusion.encoders.fingerprint import text_fingerprint, vae_fingerprint
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.encoders.vae import ChannelLatentEncoder
from latentreward.reward import CLIPProjectionHead, RewardModel, ScoringNoise

SPACE = LatentSpace(channels=4, downscale=2, frame_downscale=2, means=(0.1, -0.2, 0.3, 0.0), stds=(1.1, 0.9, 1.3, 0.7))
MOST = 12
"""Greatest number of tokens of a prompt."""


class LetterStates(PromptEncoder):
    """One state per letter and one for the end, mixed by attention; the states of two letters before them are dropped.

    Each number of letters gives another number of tokens, and attention to padding would change every state.
    """

    masked = True
    dropped_tokens = 2

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 6)
        self.num_tokens, self.token_dim, self.pooled_dim = MOST, 6, 0

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        rows = [[ord(letter) % 128 for letter in f"<>{prompt[: MOST - 1]}$"] for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([[place < len(row) for place in range(longest)] for row in rows])

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        ids, mask = input_ids
        states = self.table(ids)
        weights = (states @ states.mT).masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1)
        mixed, kept = (weights @ states)[:, self.dropped_tokens :], mask[:, self.dropped_tokens :]
        return Conditioning(mixed, prompt_mask=kept)


def letter_states() -> LetterStates:
    """The same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LetterStates().eval().requires_grad_(False)


def clip_encoder() -> ChannelLatentEncoder:
    """A tiny VAE of clips; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=list(SPACE.means),
            latents_std=list(SPACE.stds),
        )
    return ChannelLatentEncoder(vae, SPACE)


class ClipsAndStates(LatentSource):
    """Latents of :func:`clip_encoder` and states of :func:`letter_states`."""

    holds = "images"
    origin = "vae"
    vae_dtype = "float32"
    posterior = "sample"

    def __init__(self, batch_size: int = 4, text_batch_size: int = 3, prompts_per_shard: int = 4) -> None:
        self.batch_size, self.text_batch_size, self.prompts_per_shard = batch_size, text_batch_size, prompts_per_shard

    def load(self) -> Encoders:
        vae, text = clip_encoder(), letter_states()
        sizes = self.text_batch_size, self.prompts_per_shard
        spec = TextSpec(text_fingerprint(text), MOST, 6, 0, "float32", *sizes, masked=True)
        return Encoders(SPACE, 4, vae, vae_fingerprint(vae.vae), text, spec)


class ClipBackbone(DiffusionBackbone):
    """A 3-D convolution over clips and the mean of the prompt's states."""

    def __init__(self) -> None:
        super().__init__(FlowMatching(), SPACE, letter_states(), clip_encoder())
        self.first, self.time, self.cross = nn.Conv3d(4, 8, 3, padding=1), nn.Linear(1, 10), nn.Linear(6, 8)

    @property
    def native_size(self) -> tuple[int, int]:
        return 16, 16

    @property
    def side_multiple(self) -> int:
        return 4

    @property
    def feature_spec(self) -> FeatureSpec:
        return FeatureSpec((TapSpec(8, (1, 8, 8)),), (), temb_dim=10, pooled_text_dim=6)

    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        pooled = conditioning.pooled()
        maps = self.first(latents) + self.cross(pooled)[:, :, None, None, None]
        return Features(
            visual=(maps.flatten(2).transpose(1, 2),),
            visual_grids=(tuple(maps.shape[2:]),),
            text=(),
            pooled_text=pooled,
            temb=self.time(timesteps[:, None] / 1000),
        )

    def blocks(self) -> Iterator[nn.Module]:
        yield self.first


def clip_reward() -> RewardModel:
    """A frozen reward of clips; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = ClipBackbone()
        reward = RewardModel(backbone, CLIPProjectionHead(backbone.feature_spec))
    reward.noise = ScoringNoise(sigmas=(0.4,))
    return reward.eval().requires_grad_(False)
