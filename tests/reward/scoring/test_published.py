"""The two published layouts: a complete one loads to the same scores, anything else is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from latentreward.core.errors import InputError
from latentreward.reward import CLIPProjectionHead, GatedQFormerHead, RewardModel, ScoringNoise
from tests.diffusion.backbones.networks import tiny_backbone
from tests.marks import rotated_after
from tests.reward.scoring.models import load_dina_lrm, load_lrm
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


@pytest.mark.parametrize(
    ("damage", "message"),
    rotated_after(
        2,
        [
            (lambda state: state.pop("visual_projection"), "missing entry visual_projection"),
            (lambda state: state.update(extra=1), "unexpected entry extra"),
            (lambda state: state["visual_projection"].pop("weight"), "missing tensor visual_projection.weight"),
            (lambda s: s["text_projection"].update(bias=torch.zeros(2)), "unexpected tensor text_projection.bias"),
            (lambda s: s["visual_projection"].update(weight=torch.zeros(16, 7)), r"visual_projection.weight has shape"),
        ],
    ),
)
def test_lrm_head_that_does_not_fit(tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str) -> None:
    write_lrm(tmp_path, "sd15")
    state = torch.load(tmp_path / "state_dict.pt", weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "state_dict.pt")
    with pytest.raises(InputError, match=message):
        load_lrm(tmp_path)


@pytest.mark.parametrize("missing", ["unet/config.json", "text_encoder/config.json", "state_dict.pt"])
def test_incomplete_lrm(tmp_path: Path, missing: str) -> None:
    write_lrm(tmp_path, "sd15")
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=f"lacks {missing}; download it again"):
        load_lrm(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle ran",))


@pytest.mark.parametrize("layout", ["lrm", "dina"])
def test_unsafe_pickle_is_refused(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_lrm(tmp_path, "sd15") if layout == "lrm" else write_dina(tmp_path)
    path = tmp_path / ("state_dict.pt" if layout == "lrm" else "checkpoint/rm_head.pt")
    torch.save({"logit_scale": Evil()}, path)
    with pytest.raises(InputError, match=f"cannot load {path}") as caught:
        (load_lrm if layout == "lrm" else load_dina_lrm)(tmp_path)
    assert "\n" not in str(caught.value)
    assert "a pickle ran" not in capsys.readouterr().out


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


def edit_head(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / "checkpoint" / "rm_head.pt"
        state = dict(torch.load(path, weights_only=True))
        change(state)
        torch.save(state, path)

    return apply


def edit_adapter(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / "checkpoint" / "backbone_lora" / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return apply


LORA = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    rotated_after(
        2,
        [
            (lambda f: (f / "config.json").unlink(), "lacks config.json"),
            (edit_head(lambda s: s.pop("head.weight")), "missing tensor head.weight"),
            (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
            (lambda f: (f / "checkpoint" / "rm_head.pt").unlink(), "lacks checkpoint/rm_head.pt"),
            (lambda f: (f / "checkpoint/backbone_lora/adapter_config.json").unlink(), "lacks adapter_config.json"),
            (lambda f: (f / "checkpoint/backbone_lora/adapter_model.safetensors").write_bytes(b"x"), "cannot load"),
            (edit_head(lambda s: s.update({"head.bias": torch.zeros(4)})), r"head.bias has shape"),
            (edit_adapter(lambda s: s.pop(LORA)), "missing tensor transformer_blocks.0.attn.to_q.lora_A.weight"),
            (edit_adapter(lambda s: s.update(surplus=torch.zeros(1))), "unexpected tensor surplus"),
            (lambda f: edit_config(f, lambda m: m.update(use_t_embed=False)), "model.use_t_embed=False"),
            (lambda f: edit_config(f, lambda m: m.pop("visual_head_idx")), "lacks model.visual_head_idx"),
            (lambda f: edit_config(f, lambda m: m.update(num_transformer_layers=2)), "reaches block 3"),
            (lambda f: edit_config(f, lambda m: m.update(visual_head_idx=[1])), "layer_adapters_visual"),
        ],
    ),
)
def test_damaged_dina(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write_dina(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_dina_lrm(tmp_path)
    assert "\n" not in str(caught.value)


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
