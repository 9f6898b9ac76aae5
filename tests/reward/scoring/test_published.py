"""The two published layouts: complete ones load to the same scores, with settings that their files do not hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from latentreward.alignment import LatentReward
from latentreward.core.errors import InputError
from latentreward.reward import CLIPProjectionHead, GatedQFormerHead, PublishedSettings, RewardModel, ScoringNoise
from tests.alignment.rewards.stored import write_run
from tests.diffusion.backbones.networks import tiny_backbone
from tests.marks import rotated_after
from tests.reward.scoring.models import PROMPTS as SIX
from tests.reward.scoring.models import load_dina_lrm, load_lrm, pictures
from tests.tiny_pipelines import LATENTS, pipeline_folder

PROMPTS = ["a cat", "a dog"]


def scores(model: RewardModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, LATENTS, LATENTS, generator=generator)
    return model.score_latents(PROMPTS, latents, noise=ScoringNoise(sigmas=(0.5,)), draws=noise)


def write_lrm(folder: Path, name: str) -> RewardModel:
    """``casiatao/LRM``'s layout around a random reward model, which is returned."""
    source = Path(pipeline_folder(name))
    for part in ("unet", "text_encoder", *(("text_encoder_2",) if name == "sdxl" else ())):
        shutil.copytree(source / part, folder / part)
    backbone = tiny_backbone(name)
    head = CLIPProjectionHead(backbone.feature_spec, project_text=name != "sdxl", logit_scale=1.7)
    state: dict[str, Any] = {"visual_projection": head.visual_projection.state_dict()}
    if name != "sdxl":
        state["text_projection"] = head.text_projection.state_dict()
    state["logit_scale"] = head.logit_scale.data if name == "sdxl" else head.logit_scale.item()
    torch.save(state, folder / "state_dict.pt")
    return RewardModel(backbone, head)


def write_dina(folder: Path) -> RewardModel:
    """``liuhuohuo/DiNa-LRM-SD35M-12layers``' layout around a random reward model, which is returned."""
    (folder / "checkpoint" / "backbone_lora").mkdir(parents=True)
    backbone = tiny_backbone("sd35", t5_length=256)
    head = GatedQFormerHead(backbone.feature_spec, num_heads=2, rms_eps=2.0**-7)
    with torch.no_grad():
        for parameter in [*head.parameters(), *backbone.transformer.parameters()]:
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(head.state_dict(), folder / "checkpoint" / "rm_head.pt")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    settings = LoraConfig(r=64, lora_alpha=128, target_modules=targets).to_dict()
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    settings |= {"auto_mapping": {"base_model_class": "SD3Transformer2DModel"}, "written_by_newer_peft": 1}
    adapter = folder / "checkpoint" / "backbone_lora"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    state = {f"base_model.model.{k}": v for k, v in get_peft_model_state_dict(backbone.transformer).items()}
    save_file(state, adapter / "adapter_model.safetensors")
    head_options = {"width": -1, "num_queries": 4, "num_attn_heads": 2, "out_dim": 1, "use_proj_in": False}
    model = {
        "backbone_model_id": pipeline_folder("sd35"),
        "num_transformer_layers": 3,
        "visual_head_idx": [1, 3],
        "text_head_idx": [1, 3],
        "use_text_features": True,
        "use_t_embed": True,
        "use_lora": True,
        "use_logistic": False,
        "reward_head": head_options,
    }
    (folder / "config.json").write_text(json.dumps({"model": model, "training": {}}))
    return RewardModel(backbone, head)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["model"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_lrm_round_trip(tmp_path: Path, name: str) -> None:
    expected = write_lrm(tmp_path, name)
    model = load_lrm(tmp_path, base=pipeline_folder(name))
    torch.testing.assert_close(scores(model), scores(expected), rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.head.guidance == 7.5
    assert model.exif == "ignore"
    assert not load_lrm(tmp_path, pipeline_folder(name), guidance=1.0).head.needs_uncond


def test_lrm_without_base_takes_ids_and_latents(tmp_path: Path) -> None:
    full = write_lrm(tmp_path, "sd15")
    bare = load_lrm(tmp_path)
    assert bare.backbone.vae is None
    assert bare.backbone.latent_space.scaling_factor == 0.18215
    ids = full.backbone.text_encoder.tokenize(PROMPTS)
    got, want = bare.backbone.text_encoder.encode_ids(*ids), full.backbone.text_encoder.encode_ids(*ids)
    torch.testing.assert_close(got.pooled_prompt_embeds, want.pooled_prompt_embeds)
    with pytest.raises(InputError, match="there is no tokenizer"):
        bare.encode_prompts(PROMPTS)


@pytest.mark.slow
def test_dina_round_trip(tmp_path: Path) -> None:
    expected = write_dina(tmp_path)
    model = load_dina_lrm(tmp_path)
    torch.testing.assert_close(scores(model), scores(expected), rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert load_dina_lrm(tmp_path, base=pipeline_folder("sd35"), t5_length=9).backbone.text_encoder.t5_length == 9
    assert (scores(load_dina_lrm(tmp_path, rms_eps=1e-7)) - scores(expected)).abs().max() > 0


def test_dina_on_a_bare_transformer(tmp_path: Path) -> None:
    write_dina(tmp_path / "reward")
    for part in ("transformer", "scheduler"):
        shutil.copytree(Path(pipeline_folder("sd35")) / part, tmp_path / "base" / part)
    model = load_dina_lrm(tmp_path / "reward", base=str(tmp_path / "base"))
    assert model.backbone.text_encoder is None
    assert model.backbone.vae is None
    assert model.exif == "ignore"


@pytest.mark.slow
def test_logistic_constants_are_not_in_the_file_and_may_be(tmp_path: Path) -> None:
    write_dina(tmp_path)
    edit_config(tmp_path, lambda model: model.update(use_logistic=True))
    model = load_dina_lrm(tmp_path)
    assert model.head.logistic.eta4.item() == pytest.approx(0.15)
    assert (scores(model).abs() < 2).all()
    path = tmp_path / "checkpoint" / "rm_head.pt"
    torch.save({**torch.load(path), "logistic.eta3": torch.tensor(0.5), "logistic.eta4": torch.tensor(2.0)}, path)
    assert load_dina_lrm(tmp_path).head.logistic.eta4.item() == 2.0


BASE = pipeline_folder("sd15")


def scores_of(model: RewardModel) -> torch.Tensor:
    return model.score(SIX, pictures(len(SIX)))


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
