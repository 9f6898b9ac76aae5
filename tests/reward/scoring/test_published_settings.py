"""What the files of a published layout do not hold: given by an argument, told, recorded, refused elsewhere."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.alignment import LatentReward
from latentreward.core.errors import InputError
from latentreward.reward import CLIPProjectionHead, PublishedSettings, RewardModel
from tests.alignment.rewards.stored import write_run
from tests.diffusion.backbones.networks import tiny_backbone
from tests.marks import rotated_after
from tests.reward.scoring.models import PROMPTS, load_lrm, pictures
from tests.reward.scoring.test_published import write_dina, write_lrm
from tests.tiny_pipelines import pipeline_folder

BASE = pipeline_folder("sd15")


def scores_of(model: RewardModel) -> torch.Tensor:
    return model.score(PROMPTS, pictures(len(PROMPTS)))


def write_single_scale(folder: Path, name: str = "sd15") -> RewardModel:
    """A checkpoint of the authors' ``multi_scale: False``, and the model behind it."""
    write_lrm(folder, name)
    head = CLIPProjectionHead(tiny_backbone(name).feature_spec, 7.5, "single", project_text=name != "sdxl")
    state = torch.load(folder / "state_dict.pt", weights_only=True)
    state |= {"visual_projection": head.visual_projection.state_dict(), "logit_scale": head.logit_scale.item()}
    if name != "sdxl":
        state["text_projection"] = head.text_projection.state_dict()
    torch.save(state, folder / "state_dict.pt")
    return RewardModel(tiny_backbone(name), head).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("settings", "head"),
    [
        ({}, {}),
        ({"guidance": 1.0}, {"guidance": 1.0}),
        ({"guidance": 3.0, "multi_scale": "enhanced"}, {"guidance": 3.0, "multi_scale": "enhanced"}),
    ],
)
def test_settings_of_lrm(settings: dict[str, Any], head: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    written = write_lrm(tmp_path, "sd15").eval()
    expected = RewardModel(written.backbone, CLIPProjectionHead(written.backbone.feature_spec, **head))
    expected.head.load_state_dict(written.head.state_dict())
    model = RewardModel.from_pretrained(tmp_path, base=BASE, published=PublishedSettings(**settings))
    torch.testing.assert_close(scores_of(model), scores_of(expected.requires_grad_(False)), rtol=1e-5, atol=1e-6)
    used = {"guidance": 7.5, "multi_scale": "plain", **settings}
    assert model.published == used
    told = f"guidance {used['guidance']}, multi_scale {used['multi_scale']}"
    assert told in model.identity
    (line,) = [record.getMessage() for record in caplog.records if "scored with" in record.getMessage()]
    assert f"scored with {told}, which its files do not hold" in line


@pytest.mark.slow
def test_settings_of_dina_lrm(tmp_path: Path) -> None:
    written = write_dina(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, published=PublishedSettings(rms_eps=1e-7, t5_length=9))
    assert model.published == {"rms_eps": 1e-7, "t5_length": 9}
    assert model.backbone.text_encoder.t5_length == 9
    assert {model.head.attn1.norm_q.eps, model.head.attn2.norm_v.eps, model.head.norm_ff.eps} == {1e-7}
    assert "rms_eps 1e-07, t5_length 9" in model.identity
    default = RewardModel.from_pretrained(tmp_path)
    torch.testing.assert_close(scores_of(default), scores_of(written.eval().requires_grad_(False)))
    assert (scores_of(model) - scores_of(default)).abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, ["sd15", "sdxl"]))
def test_a_checkpoint_of_the_mid_block_alone(name: str, tmp_path: Path) -> None:
    expected, base = write_single_scale(tmp_path / "single", name), pipeline_folder(name)
    for model in (RewardModel.from_pretrained(tmp_path / "single", base=base), load_lrm(tmp_path / "single", base)):
        assert model.published["multi_scale"] == "single"
        torch.testing.assert_close(scores_of(model), scores_of(expected), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"tensor visual_projection\.weight has shape"):
        load_lrm(tmp_path / "single", base, multi_scale="plain")


@pytest.mark.parametrize("name", rotated_after(1, ["sd15", "sdxl"]))
def test_text_encoders_frozen_in_training_are_the_base_s(name: str, tmp_path: Path) -> None:
    expected, folder, base = (
        write_lrm(tmp_path / "published", name).eval(),
        tmp_path / "published",
        pipeline_folder(name),
    )
    for part in folder.glob("text_encoder*"):
        shutil.rmtree(part)
    model = RewardModel.from_pretrained(folder, base=base)
    torch.testing.assert_close(scores_of(model), scores_of(expected.requires_grad_(False)), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"has no text_encoder/: it was frozen in training .* give the base as base"):
        RewardModel.from_pretrained(folder)
    assert model.recipe.own == ("unet",)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(scores_of(RewardModel.from_pretrained(tmp_path / "saved", base=base)), scores_of(model))


def test_a_saved_folder_keeps_the_settings_and_takes_no_others(tmp_path: Path) -> None:
    write_lrm(tmp_path / "published", "sd15")
    settings = PublishedSettings(guidance=2.0, multi_scale="enhanced")
    model = RewardModel.from_pretrained(tmp_path / "published", base=BASE, published=settings)
    model.save_pretrained(tmp_path / "saved")
    again = RewardModel.from_pretrained(tmp_path / "saved", base=BASE)
    assert torch.equal(scores_of(again), scores_of(model))
    with pytest.raises(InputError, match=r"published is set, but reward model .* has neither published layout"):
        RewardModel.from_pretrained(tmp_path / "saved", base=BASE, published=settings)


def test_settings_of_another_layout_are_refused(tmp_path: Path) -> None:
    write_lrm(tmp_path / "lrm", "sd15")
    write_dina(tmp_path / "dina")
    write_run(tmp_path / "run", "lrm", "sd15")
    for name, settings, message in (
        ("dina", {"guidance": 1.0}, r"published\.guidance=1\.0 does not concern .* takes rms_eps and t5_length"),
        ("lrm", {"rms_eps": 1e-7}, r"published\.rms_eps=1e-07 does not concern .* takes guidance and multi_scale"),
        ("run", {}, "published is set, but .* leave it out"),
    ):
        with pytest.raises(InputError, match=message):
            LatentReward(str(tmp_path / name), published=PublishedSettings(**settings)).latent_space()
