"""A stored reward that judges edits, and a policy that makes pictures from text alone; and the other way round."""

from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from latentreward.alignment import LatentReward, LPOModule, PolicySource
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.reward import GatedQFormerHead, RewardModel
from tests.diffusion.families.made_qwen_image_edit import qwen_image_edit_folder
from tests.diffusion.families.twins import TWINS


@pytest.mark.slow
@pytest.mark.parametrize("judged", ["edits", "pictures from text"])
def test_reward_and_policy_that_do_not_both_edit_are_refused_before_weights(judged: str, tmp_path: Path) -> None:
    """The latents are of one space, and the policy's folder has no weights to load."""
    edits, plain = ("qwen_image_edit", qwen_image_edit_folder()), ("qwen_image", TWINS["qwen_image"].folder)
    (name, base), (_, other) = (edits, plain) if judged == "edits" else (plain, edits)
    backbone = create_backbone(name, source=base, visual_taps=[1], text_taps=[1])
    head = GatedQFormerHead(backbone.feature_spec, num_heads=2)
    RewardModel(backbone, head).save_pretrained(tmp_path / "reward")
    for folder, kept in (("policy", other), ("base", base)):
        copytree(kept, tmp_path / folder, ignore=ignore_patterns("*.safetensors"))
    reward = LatentReward(str(tmp_path / "reward"), base=str(tmp_path / "base"))
    shown, made = ("edits", "pictures made") if judged == "edits" else ("pictures made", "edits")
    told = rf"^reward .*reward: it judges {shown}.*, and the policy makes {made}"
    with pytest.raises(InputError, match=told):
        LPOModule(PolicySource(str(tmp_path / "policy")), reward)
