"""A model card: metadata that the hub reads, texts that stay texts, and what a score means."""

from dataclasses import replace

import pytest
import torch
import yaml

from latentreward.data.image_sizes import OneSize
from latentreward.reward import Calibration, Card, ScoringNoise
from latentreward.reward.scoring.publishing import model_card
from latentreward.reward.scoring.recipe import ModelPart, ModelRecipe
from latentreward.reward.scoring.stored import FolderConfig

NOISE = ScoringNoise(sigmas=(0.3, 0.6), seeds=(0, 1))


def config(source: str | None = "owner/base", revision: str | None = "v1", calibrated: bool = True) -> FolderConfig:
    backbone = ModelPart("sd35_medium", {"source": source, "revision": revision})
    calibration = Calibration.fit(torch.linspace(-3, 5, 401), "a set", NOISE, seed=3) if calibrated else None
    head, training = ModelPart("GatedQFormerHead"), {"steps": 4000, "left out": None}
    return FolderConfig(
        backbone=backbone,
        head=head,
        adapters=("transformer",),
        base=ModelRecipe(backbone, head).source,
        noise=NOISE,
        image_sizes=OneSize(512, 512),
        calibration=calibration,
        training=training,
    )


def front(card: Card, made: FolderConfig | None = None) -> dict:
    text = model_card(made or config(), card, "folder")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_metadata() -> None:
    found = front(Card(licence="openrail++", datasets=("owner/pairs", "our own pairs")))
    assert found["license"] == "openrail++"
    assert found["base_model"] == "owner/base"
    assert found["datasets"] == ["owner/pairs"]
    assert "reward-model" in found["tags"]
    assert "license_name" not in found


@pytest.mark.parametrize("source", [None, "/data/sd35", "./sd35", "data/sd35/part"])
def test_a_base_that_is_no_hub_id_is_not_linked(source: str | None) -> None:
    assert "base_model" not in front(Card(), config(source))


@pytest.mark.parametrize(
    "licence", ["", "Stability AI Community License", "mit\nbase_model: evil", "---", "a: b # c", "[x", "ünïcode"]
)
def test_any_licence_is_one_value(licence: str) -> None:
    found = front(Card(licence=licence))
    assert found["license"] == "other"
    assert found["base_model"] == "owner/base"
    assert set(found) <= {"license", "license_name", "library_name", "tags", "base_model"}


def test_a_reward_of_edits_is_called_one() -> None:
    edits = replace(config(), edits=True)
    assert "image-to-image" in front(Card(), edits)["tags"] and "text-to-image" in front(Card())["tags"]
    text, plain = model_card(edits, Card(), "folder"), model_card(config(), Card(), "folder")
    assert "it scores how well a picture was edited as an instruction says, as its" in text
    assert "import RewardModel, edit_prompt\n" in text and "import RewardModel\n" in plain
    assert 'reward.score([edit_prompt("make the car red", "car.png")], ["red_car.png"])' in text
    assert 'reward.score(["a red fox in the snow"], ["fox.png"])' in plain


def test_what_a_score_means() -> None:
    text = model_card(config(), Card(name="owner/reward"), "folder")
    assert "RewardModel.from_pretrained('owner/reward')" in text
    assert "| noise levels | 0.3, 0.6 |" in text
    assert "| seeds | 0, 1 |" in text
    assert "| calibrated on | a set: 401 images, seed 3 |" in text
    assert "| raw mean ± standard deviation there | 1 ± 2.318 |" in text
    assert "| raw 5 %, 50 %, 95 % quantiles there | -2.6, 1, 4.6 |" in text
    assert "| base | owner/base@v1 |" in text
    assert "| steps | 4000 |" in text
    assert "left out" not in text
    assert "calibration | none" in model_card(config(calibrated=False), Card(), "folder")


def test_hostile_texts_stay_in_their_cells() -> None:
    evil = "x | y\n| evil | row\n# Head <script>alert(1)</script> [a](http://b) `c`"
    text = model_card(config(), Card(name=evil, datasets=(evil,)), "folder")
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "| evil |" not in text.replace("\\| evil \\|", "")
    assert not any(line.startswith(("| evil", "# Head")) for line in text.splitlines())
