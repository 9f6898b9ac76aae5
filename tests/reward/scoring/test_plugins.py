"""Backbones from outside the package: what they train is saved under any name, and loads by their class path."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import LatentReward
from latentreward.apps.cli import main
from latentreward.core.errors import InputError
from latentreward.reward import GatedQFormerHead, RewardModel
from latentreward.reward.scoring.recipe import ModelRecipe, backbone_part, head_part, own_parts
from tests.marks import rotated_after, slow_after
from tests.reward.scoring import plugin_backbone
from tests.tiny_pipelines import pipeline_folder

PATH = "tests.reward.scoring.plugin_backbone.two_networks"
HEAD = {"num_heads": 2}


def trained(**settings: Any) -> RewardModel:
    """A reward on the plug-in, each of its trained weights changed."""
    settings = {"source": pipeline_folder("sd15"), **settings}
    torch.manual_seed(0)
    backbone = plugin_backbone.two_networks(**settings)
    head = GatedQFormerHead(backbone.feature_spec, **HEAD)
    model = RewardModel(backbone, head)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    own = own_parts(backbone)
    model.recipe = ModelRecipe(backbone_part(PATH, settings, own), head_part(head, HEAD), own)
    return model.eval().requires_grad_(False)


def scores(model: RewardModel) -> Tensor:
    shape = (2, 4, *(side // 8 for side in model.backbone.native_size))
    return model.score_latents(["a cat", "two dogs"], torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("settings", "own", "adapters"),
    slow_after(
        1,
        [
            ({}, ["gain", "mixer"], ["denoiser"]),
            ({"tuning": "full"}, ["denoiser", "gain", "mixer"], []),
            ({"tuning": "frozen"}, ["gain", "mixer"], []),
        ],
    ),
)
def test_what_trains_is_saved_under_its_own_names(
    settings: dict[str, Any], own: list[str], adapters: list[str], tmp_path: Path
) -> None:
    model = trained(**settings)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (sorted(config["own_weights"]), config["adapters"]) == (own, adapters)
    assert config["backbone"]["class"] == PATH  # not the short name, which a new process does not know
    assert "revision" not in config["backbone"]["init_args"]  # the factory has no such setting
    again = RewardModel.from_pretrained(tmp_path / "saved", base=pipeline_folder("sd15"), trust_remote_code=True)
    assert torch.equal(scores(again), scores(model))


def test_a_published_plug_in_is_looked_at_before_it_is_loaded(tmp_path: Path) -> None:
    """Alignment builds it on the meta device, where ``load_weights`` of the plug-in reads its config alone."""
    trained().save_pretrained(tmp_path / "saved")
    reward = LatentReward(str(tmp_path / "saved"), base=pipeline_folder("sd15"), trust_remote_code=True)
    assert reward.latent_space().channels == 4
    outline = reward.stored.on_meta_device
    assert all(weight.is_meta for weight in outline.parameters())


def test_without_trust_it_is_refused(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=rf"class '{PATH}' is not registered .* --trust_remote_code=true"):
        RewardModel.from_pretrained(tmp_path / "saved", base=pipeline_folder("sd15"))


def publish(tmp_path: Path, *options: str) -> None:
    main(["publish", str(tmp_path / "saved"), str(tmp_path / "out"), "--trust_remote_code=true", *options])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drawn", "message"),
    rotated_after(
        1,
        [
            ("buffer", r"backbone\.shift differs"),
            ("attribute", r"the score is \S+ instead of \S+"),
            ("weight", r"shifter\.bias differs"),
        ],
    ),
)
def test_publish_refuses_what_it_draws_at_random(drawn: str, message: str, tmp_path: Path, capsys: Any) -> None:
    """The folder that was there before stays."""
    trained(drawn=drawn).save_pretrained(tmp_path / "saved")
    trained().save_pretrained(tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(SystemExit):
        publish(tmp_path, f"--base={pipeline_folder('sd15')}")
    assert re.search(message, capsys.readouterr().err)
    assert (tmp_path / "out" / "config.json").read_bytes() == before


@pytest.mark.slow
def test_a_buffer_of_the_backbones_own_is_saved(tmp_path: Path, capsys: Any) -> None:
    model = trained(drawn="saved")
    model.save_pretrained(tmp_path / "saved")
    publish(tmp_path, f"--base={pipeline_folder('sd15')}")
    assert "loads again to equal weights and scores" in capsys.readouterr().out
    again = RewardModel.from_pretrained(tmp_path / "out", base=pipeline_folder("sd15"), trust_remote_code=True)
    assert torch.equal(again.backbone.shift, model.backbone.shift)
    assert torch.equal(scores(again), scores(model))
