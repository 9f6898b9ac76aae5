"""The judge learns to name emoji and to see their quality, and refuses captions that it does not know."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentreward.reward import CLIPScorer
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline
from tests.marks import WITH_ITS_FILE
from tools.emoji.judge import EmojiJudge, train_judge
from tools.emoji.world import EmojiWorld, degrade
from tools.pretraining import pixel_scorers
from tools.pretraining.pipelines import main

pytestmark = WITH_ITS_FILE


@pytest.fixture(scope="module")
def made(world: EmojiWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("judge") / "judge"
    vae = load_pipeline(PIPELINE_FOLDERS["sd_tiny"]).vae
    train_judge(world, target, vae, seed=0, number=128, steps=60)
    return target


def test_it_names_clean_emoji_and_ranks_degrees(made: Path, world: EmojiWorld) -> None:
    judge = EmojiJudge(str(made))
    known = [variants[0] for variants in world.splits["known"]]
    pixels = [np.frombuffer(emoji.pixels, np.uint8).reshape(32, 32, 3) for emoji in known]
    texts = [emoji.text for emoji in known]
    clean = judge(texts, [Image.fromarray(one) for one in pixels])
    faded = judge(texts, [Image.fromarray(degrade(one, "blur", 1.0, 0)) for one in pixels])
    utility, alignment, right, quality = clean.T
    assert right.mean() > 0.5
    assert torch.equal(utility, 4 * alignment + 2 * quality)
    assert quality.mean() > faded[:, 3].mean() + 0.2
    far = judge(texts[::-1], [Image.fromarray(one) for one in pixels])
    assert far[:, 1].mean() < alignment.mean() - 0.3
    figures = json.loads((made / "figures.json").read_text())
    assert {*figures} == {"clean", "degraded", "pairs", "category", "quality"}
    assert figures["pairs"] > 0.6


@pytest.mark.release
@pytest.mark.usefixtures("in_environment")
def test_pretraining_makes_pipelines_of_emoji(tmp_path: Path, world: EmojiWorld) -> None:
    main(["--world", "emoji", "--output", str(tmp_path), "--scale", "0.001"])
    for name in PIPELINE_FOLDERS:
        pipeline = load_pipeline(tmp_path / name)
        assert pipeline.text_encoder.config.vocab_size == len(pipeline.tokenizer)
        assert "hamster" in (tmp_path / name / "README.md").read_text()
    assert {*(tmp_path / "train.txt").read_text().splitlines()} == {*world.texts("train")}
    assert len((tmp_path / "judged.txt").read_text().splitlines()) == 192


@pytest.mark.usefixtures("in_environment")
def test_a_clip_learns_which_name_belongs_to_a_picture(tmp_path: Path, world: EmojiWorld) -> None:
    """SPO's scorer of this world starts from it."""
    pixel_scorers.main(["--world", "emoji", "--output", str(tmp_path), "--scale", "0.05"])
    rng = np.random.default_rng(5)
    emoji = [world.draw_caption(rng, "known") for _ in range(100)]
    pictures = [Image.fromarray(world.sketch(one, rng, mutation_shares=(1.0,)).draw()) for one in emoji]
    scorer, texts = CLIPScorer(str(tmp_path / "clip")), [one.text for one in emoji]
    own, other = scorer(texts, pictures), scorer([*texts[1:], texts[0]], pictures)
    assert (own > other).float().mean() > 0.75
