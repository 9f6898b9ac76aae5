"""Nothing is tied to images: a toy network over latents with a time axis, with both heads and the module."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from latentreward.core.contracts import Conditioning, Features, FeatureSpec, LatentSpace, TapSpec
from latentreward.diffusion import DiffusionBackbone, FlowMatching, UniformSigma
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.reward import (
    CLIPProjectionHead,
    GatedQFormerHead,
    LRMLoss,
    PreferenceLoss,
    RewardModule,
    ThurstoneLoss,
)
from tests.alignment.modules.batches import latent_batch
from tests.reward.modules.test_reward_module import trainer

SPACE = LatentSpace(4, 8, 1.0)
FRAMES, SIDE = 3, 4


class LetterEncoder(PromptEncoder):
    """One embedding per letter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 6)
        self.num_tokens, self.token_dim, self.pooled_dim = 5, 6, 6

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return (torch.tensor([[ord(letter) % 128 for letter in prompt.ljust(5)[:5]] for prompt in prompts]),)

    def encode_ids(self, *input_ids: Tensor) -> Conditioning:
        tokens = self.table(input_ids[0])
        return Conditioning(tokens, tokens.mean(dim=1))


class VideoBackbone(DiffusionBackbone):
    """Two 3-D convolutions, the second at half the height and width."""

    def __init__(self) -> None:
        super().__init__(FlowMatching(), SPACE, LetterEncoder())
        self.first, self.second = nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 12, (1, 2, 2), stride=(1, 2, 2))
        self.time, self.cross = nn.Linear(1, 10), nn.Linear(6, 8)

    @property
    def feature_spec(self) -> FeatureSpec:
        half = SIDE // 2
        taps = (TapSpec(8, (FRAMES, SIDE, SIDE)), TapSpec(12, (FRAMES, half, half)))
        return FeatureSpec(taps, (), temb_dim=10, pooled_text_dim=6)

    def read(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Features:
        text = self.cross(conditioning.prompt_embeds.mean(dim=1))[:, :, None, None, None]
        first = self.first(latents) + text
        maps = (first, self.second(first))
        return Features(
            visual=tuple(m.flatten(2).transpose(1, 2) for m in maps),
            visual_grids=tuple(tuple(m.shape[2:]) for m in maps),
            text=(),
            pooled_text=conditioning.pooled_prompt_embeds,
            temb=self.time(timesteps[:, None] / 1000),
        )

    def blocks(self) -> Iterator[nn.Module]:
        yield from (self.first, self.second)


@pytest.mark.parametrize("loss", [ThurstoneLoss(), LRMLoss("both")], ids=["thurstone", "both"])
@pytest.mark.parametrize(
    "head", [CLIPProjectionHead, lambda spec: GatedQFormerHead(spec, num_heads=2)], ids=["lrm", "dina"]
)
def test_video_backbone_trains_and_evaluates(head: type, loss: PreferenceLoss) -> None:
    module = RewardModule(
        VideoBackbone(), head, loss, UniformSigma(), eval_sigmas=(0.3, 0.6), ensemble_sigmas=(0.2, 0.7), seed=0
    )
    batch = latent_batch((4, FRAMES, SIDE, SIDE), SPACE)
    data = DataLoader([0], collate_fn=lambda _: batch)
    run = trainer(max_epochs=2)
    run.fit(module, data, data)
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    assert {"val/accuracy", "val/accuracy_sigma0.3", "val/accuracy_ensemble"} <= set(run.callback_metrics)
    (predicted,) = run.predict(module, data)
    assert predicted.chosen.shape == (8,)


def test_video_scores_do_not_depend_on_company() -> None:
    module = RewardModule(VideoBackbone(), CLIPProjectionHead, LRMLoss(), UniformSigma(), eval_sigmas=(0.5,), seed=0)
    batch = latent_batch((4, FRAMES, SIDE, SIDE), SPACE)
    together = module.model.score_latents(batch.prompts, batch.chosen)
    alone = module.model.score_latents(batch.prompts[:1], batch.chosen[:1])
    torch.testing.assert_close(together[:1], alone)
