"""Rewards of a family on disk: what their settings hold, and that they import nothing without trust."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from latentreward.alignment import LatentReward
from latentreward.core.checkpoints.shards import frozen_names
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion import LoRA
from latentreward.reward import DiNaLRMModule, GatedQFormerHead, RewardModel, RewardModelScorer
from tests.diffusion.families.twins import TWINS, noise_for

TWIN = TWINS["lumina2"]
BACKBONE = {"source": TWIN.folder, "visual_taps": [1, 2], "text_taps": [1, 2]}
TRAINING = {"gradient_checkpointing": True, "attention_backend": "native"}
HEAD = {"num_queries": 2, "num_heads": 2}
OWN = "from latentreward.diffusion.families.lumina2 import Lumina2\n\n\nclass Own(Lumina2):\n    pass\n"
REFUSED = r"config\.\w+: .*backbone: family 'own_family\.Own' is not of this package.*--trust_remote_code=true"


def score(model: RewardModel) -> Tensor:
    latents = noise_for(model.backbone.family.latent_shape(*TWIN.size))
    with torch.no_grad():
        return model.score_latents(["a cat", "two dogs"], latents)


@pytest.fixture(scope="module")
def trained() -> DiNaLRMModule:
    torch.manual_seed(0)
    backbone = create_backbone("lumina2", **BACKBONE, **TRAINING, lora=LoRA(2, 4.0))
    module = DiNaLRMModule(backbone, lambda spec: GatedQFormerHead(spec, **HEAD))
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return module.eval()


@pytest.fixture(scope="module")
def stored(trained: DiNaLRMModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reward as a model folder, as a run, and as a checkpoint that holds its settings itself."""
    folder = tmp_path_factory.mktemp("stored")
    trained.model.save_pretrained(folder / "model")
    frozen = frozen_names(trained)
    state = {name: value for name, value in trained.state_dict().items() if name not in frozen}
    path = "latentreward.diffusion.families.lumina2.lumina2"
    backbone = {"class_path": path, "init_args": {**BACKBONE, **TRAINING, "lora": {"rank": 2, "alpha": 4.0}}}
    head = {"class_path": "latentreward.reward.GatedQFormerHead", "init_args": HEAD}
    settings = {"backbone": backbone, "head": head}
    for name in ("run", "notes"):
        (folder / name).mkdir()
        noted = {"reward_settings": {"training": {}, **settings}} if name == "notes" else {}
        torch.save({"state_dict": state, "exif": "apply", **noted}, folder / name / "reward.ckpt")
    run = {"model": {"class_path": "latentreward.reward.DiNaLRMModule", "init_args": settings}}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(run))
    return folder


def with_family(stored: Path, kind: str, family: str, folder: Path) -> Path:
    """A copy of a stored reward that names a family."""
    copy = shutil.copytree(stored / kind, folder / kind)
    if kind == "model":
        config = json.loads((copy / "config.json").read_text())
        config["backbone"]["init_args"]["family"] = family
        (copy / "config.json").write_text(json.dumps(config))
    elif kind == "run":
        run = yaml.safe_load((copy / "config.yaml").read_text())
        run["model"]["init_args"]["backbone"]["init_args"]["family"] = family
        (copy / "config.yaml").write_text(yaml.safe_dump(run))
    else:
        content = torch.load(copy / "reward.ckpt", weights_only=True)
        content["reward_settings"]["backbone"]["init_args"]["family"] = family
        torch.save(content, copy / "reward.ckpt")
    return copy


def load(path: Path, **options: Any) -> RewardModel:
    return RewardModel.from_pretrained(path, base=TWIN.folder, **options)


def as_reward(path: Path) -> None:
    LatentReward(str(path), base=TWIN.folder).latent_space()


def as_scorer(path: Path) -> None:
    RewardModelScorer(str(path), base=TWIN.folder, device="cpu").prepare()


KINDS = pytest.mark.parametrize("kind", ["model", "run", "notes"])


def test_a_published_record_holds_no_settings_of_training(
    stored: Path, trained: DiNaLRMModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = json.loads((stored / "model" / "config.json").read_text())["backbone"]
    frozen = {"revision": None, "tuning": "frozen", "text_encoder_tuning": "frozen"}
    assert record == {"class": "lumina2", "init_args": {**BACKBONE, "source": Path(TWIN.folder).name, **frozen}}
    assert torch.equal(score(load(stored / "model")), score(trained.model))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"the base 'lumina2' is the name of a folder .* as --base FOLDER"):
        RewardModel.from_pretrained(stored / "model")
    copy = shutil.copytree(stored / "model", tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    config["backbone"]["init_args"]["attention_backend"] = "native"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"backbone\.init_args\.attention_backend is for training alone; remove it"):
        load(copy)


@KINDS
@pytest.mark.parametrize("door", [load, as_reward, as_scorer])
def test_a_family_of_others_is_not_imported(
    kind: str, door: Callable[[Path], object], stored: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = with_family(stored, kind, "own_family.Own", tmp_path)
    (copy / "own_family.py").write_text(OWN)
    monkeypatch.syspath_prepend(copy)
    with pytest.raises(InputError, match=REFUSED.replace(r"config\.\w+", r"(config\.\w+|reward\.ckpt)")) as caught:
        door(copy)
    assert "\n" not in str(caught.value) and "own_family" not in sys.modules


@KINDS
def test_a_family_that_is_not_a_text_is_refused(kind: str, stored: Path, tmp_path: Path) -> None:
    copy = with_family(stored, kind, ["own_family", "Own"], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"backbone: family=\['own_family', 'Own'\] is no import path; get the model"):
        load(copy)


def test_a_trusted_family_does_not_lie_beside_the_model(
    stored: Path, trained: DiNaLRMModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = with_family(stored, "model", "own_family.Own", tmp_path)
    (copy / "own_family.py").write_text(OWN)
    monkeypatch.syspath_prepend(copy)
    with pytest.raises(InputError, match=r"module 'own_family' lies in .*, beside a model that came from others"):
        load(copy, trust_remote_code=True)
    here = tmp_path / "here"
    here.mkdir()
    (here / "own_family.py").write_text(OWN)
    (copy / "own_family.py").unlink()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        assert torch.equal(score(load(copy, trust_remote_code=True)), score(trained.model))
    finally:
        sys.modules.pop("own_family", None)
