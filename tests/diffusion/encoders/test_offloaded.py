"""Text encoders that are on the device only while they encode."""

import pytest
import torch

from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.apps.generation import trained_policy
from latentreward.core.contracts import Conditioning
from latentreward.core.registry import create_backbone
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.encoders.stored_prompts import OffloadedEncoder
from latentreward.reward import GatedQFormerHead
from latentreward.reward.scoring.reward_model import RewardModel
from tests.diffusion.families.twins import TWINS

PROMPTS = [f"{number} dogs on a hill" * (1 + number % 2) for number in range(7)]


@pytest.mark.parametrize("name", ["sd35_large", "z_image"])
def test_prompts_are_encoded_once_ahead_and_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TWINS[name].source().load().text_encoder
    alone = {prompt: encoder([prompt]) for prompt in [*PROMPTS, ""]}
    calls, moves = [], []
    encode, to = type(encoder).forward, PromptEncoder.to
    monkeypatch.setattr(type(encoder), "forward", lambda self, prompts: calls.extend(prompts) or encode(self, prompts))
    monkeypatch.setattr(type(encoder), "to", lambda self, device: moves.append(str(device)) or to(self, device))
    offloaded = OffloadedEncoder(encoder, PROMPTS, torch.device("cpu"), ahead=4)
    assert not [*offloaded.parameters()]
    assert offloaded.count_tokens(PROMPTS) == encoder.count_tokens(PROMPTS)
    for start in range(0, len(PROMPTS), 2):
        batch = PROMPTS[start : start + 2]
        for asked in (batch, [""]):
            found, wanted = offloaded(asked), Conditioning.join([alone[prompt] for prompt in asked])
            for field in ("prompt_embeds", "pooled_prompt_embeds", "prompt_mask"):
                ours, theirs = getattr(found, field), getattr(wanted, field)
                assert ours is theirs or torch.equal(ours, theirs)
        assert len(offloaded._rows) <= 4 + 3
    assert sorted(calls) == sorted([*PROMPTS, ""])
    assert moves.count("cpu") >= 4
    assert offloaded([PROMPTS[0]]).prompt_embeds.shape == alone[PROMPTS[0]].prompt_embeds.shape  # again, if forgotten


def test_policy_and_reward_go_on_sharing_an_encoder_and_nothing_moves_on_a_cpu() -> None:
    twin = TWINS["z_image"]
    policy = twin.source().load()
    encoder, options = policy.text_encoder, {"visual_taps": [1], "text_taps": [1], "tuning": "frozen"}
    backbone = create_backbone(twin.backbone, source=twin.folder, **options)
    backbone.text_encoder = encoder
    head = GatedQFormerHead(backbone.feature_spec, num_queries=2, num_heads=2)
    scorer = LatentScorer(RewardModel(backbone, head), policy.noise_process, policy=policy)
    trained_policy.offload_text_encoders(policy, [scorer], PROMPTS, torch.device("cpu"))
    assert policy.text_encoder is encoder is scorer.model.backbone.text_encoder
    trained_policy.offload_text_encoders(policy, [scorer], PROMPTS, torch.device("meta"))
    assert isinstance(policy.text_encoder, OffloadedEncoder)
    assert scorer.model.backbone.text_encoder is policy.text_encoder
    assert next(encoder.parameters()).device.type == "cpu"
