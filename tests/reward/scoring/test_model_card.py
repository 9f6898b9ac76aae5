"""A model card: metadata that the hub reads, texts that stay texts, and what a score means."""

from dataclasses import replace

import pytest
import torch
import yaml

from latentreward.data.image_sizes import OneSize
from latentreward.reward import Calibration, Card, ScoringNoise
from latentreward.reward.scoring.layouts.card import model_card
from latentreward.reward.scoring.layouts.model_folder import FolderConfig
from latentreward.reward.scoring.layouts.recipe import ModelPart, ModelRecipe

NOISE = ScoringNoise(sigmas=(0.3, 0.6), seeds=(0, 1))


def config(source: str | None = "owner/base", revision: str | None = "v1", calibrated: bool = True) -> FolderConfig:
    backbone = ModelPart("sd35_medium", {"source": source, "revision": revision})
    recipe = ModelRecipe(backbone, ModelPart("GatedQFormerHead"), training={"steps": 4000, "left out": None})
    calibration = Calibration.fit(torch.linspace(-3, 5, 401), "a set", NOISE, seed=3) if calibrated else None
    return FolderConfig(recipe, ("transformer",), NOISE, OneSize(512, 512), calibration, recipe.source)


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


@pytest.mark.parametrize(("licence", "meant"), [("nonsense", ""), ("MIT", "mit"), ("apache2.0", "apache-2.0")])
def test_a_licence_that_is_not_known_here_is_warned_of_and_kept(
    licence: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = front(Card(licence=licence))
    assert found["license"] == licence and "license_name" not in found
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(f"licence is '{licence}', which is not among the hub's identifiers") and "\n" not in said
    assert meant in said and len(said) < 300


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
    text = model_card(
        config(), Card(name=evil, datasets=(evil,), training={evil: evil}, metrics={evil: evil}), "folder"
    )
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "| evil |" not in text.replace("\\| evil \\|", "")
    assert not any(line.startswith(("| evil", "# Head")) for line in text.splitlines())


def test_metrics_are_flattened_and_cut() -> None:
    text = model_card(config(), Card(metrics={"hpdv2": {"accuracy": 0.812345, "pairs": 10}, "curve": [1, 2]}), "folder")
    assert "| hpdv2.accuracy | 0.8123 |" in text
    assert "| hpdv2.pairs | 10 |" in text
    assert "curve" not in text
    many = model_card(config(), Card(metrics={f"m{n}": n for n in range(100)}), "folder")
    assert "40 more are not shown" in many
    assert "## Metrics" not in model_card(config(), Card(), "folder")
