"""Edits: instructions, results, the judge, pairs as files, and prompts that carry their pictures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import JSONLPairReader, decode_image
from latentreward.data.alignment.prompt_files import read_prompts
from latentreward.tinyworld import TinyWorldDataModule, TinyWorldEditPromptDataModule
from latentreward.tinyworld.edits import (
    RESULTS,
    STEP,
    EditVerdict,
    all_edits,
    draw_edit,
    draw_edit_pairs,
    draw_results,
    edit_splits,
    edited,
    judge_edit,
    parse_edit,
    scene_verdict,
)
from latentreward.tinyworld.judge import TinyWorldEditJudge
from latentreward.tinyworld.scenes import Item, Scene, render
from latentreward.tinyworld.writers import write_edits
from tools.pretraining.tokenizer import tokenize

CIRCLE, CROSS = Item("red", "circle", 8.0, 10.0, 4.5), Item("green", "cross", 23.0, 18.0, 4.0)
SOURCE = Scene("gray", (CIRCLE, CROSS))
ONE = Scene("gray", (CIRCLE,))
PAIRS = {"train": 40, "validation": 20, "test": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_edits(tmp_path_factory.mktemp("tinyworld") / "edits", PAIRS, seed=1, prompts=6)


def test_texts_fit_the_tokenizer_and_lead_back() -> None:
    assert len(all_edits()) == 339
    assert all(parse_edit(text) == edit and edit.text == text for text, edit in all_edits().items())
    assert tokenize(list(all_edits())).shape == (339, 16)
    with pytest.raises(InputError, match="not an edit of the tiny world"):
        parse_edit("paint the red circle")


def test_splits_share_only_the_edits_of_the_background() -> None:
    texts = {split: {edit.text for part in kinds.values() for edit in part} for split, kinds in edit_splits().items()}
    background = {f"make the background {name}" for name in ("black", "gray", "white")}
    assert texts["train"] & texts["test"] == texts["train"] & texts["validation"] == background
    assert texts["validation"] & texts["test"] == background
    assert set().union(*texts.values()) == set(all_edits())


@pytest.mark.parametrize(
    ("text", "items", "background"),
    [
        ("change the red circle to blue", (replace(CIRCLE, color="blue"), CROSS), "gray"),
        ("change the green cross to a square", (CIRCLE, replace(CROSS, shape="square")), "gray"),
        ("move the red circle down", (replace(CIRCLE, y=10.0 + STEP), CROSS), "gray"),
        ("move the green cross up", (CIRCLE, replace(CROSS, y=18.0 - STEP)), "gray"),
        ("remove the red circle", (CROSS,), "gray"),
        ("make the background white", (CIRCLE, CROSS), "white"),
    ],
)
def test_an_edit_changes_what_it_names(text: str, items: tuple[Item, ...], background: str) -> None:
    result = edited(SOURCE, parse_edit(text))
    assert result == Scene(background, items)
    assert scene_verdict(SOURCE, result, parse_edit(text)) == EditVerdict(True, 1.0)
    assert judge_edit(render(SOURCE), render(result), text).utility == 4.0


def test_a_second_shape_is_added_opposite_the_first() -> None:
    result = edited(ONE, parse_edit("add a second red circle"))
    assert result == Scene("gray", (CIRCLE, replace(CIRCLE, x=24.0, y=22.0)))
    assert judge_edit(render(ONE), Image.fromarray(render(result)), "add a second red circle").utility == 4.0


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (SOURCE, "change the blue circle to red"),  # no such shape
        (SOURCE, "change the red square to blue"),
        (Scene("gray", (CIRCLE, replace(CROSS, color="red"))), "remove the red circle"),  # two of its colour
        (SOURCE, "make the background gray"),  # as it is
        (SOURCE, "move the red circle left"),  # out of the picture
        (Scene("gray", (replace(CIRCLE, x=15.0),)), "add a second red circle"),  # on top of the first
    ],
)
def test_edits_that_cannot_be_made(scene: Scene, text: str) -> None:
    scene = scene if text != "add a second red circle" else Scene("gray", (Item("red", "circle", 15.0, 16.0, 4.5),))
    assert edited(scene, parse_edit(text)) is None


@pytest.mark.parametrize(
    ("result", "text", "followed", "kept"),
    [
        # Left alone are three attributes of the circle, four of the cross, the background and the number: 9.
        (SOURCE, "change the red circle to blue", False, 1.0),
        (Scene("white", (replace(CIRCLE, color="blue"), CROSS)), "change the red circle to blue", True, 8 / 9),
        (Scene("gray", (replace(CIRCLE, color="blue"),)), "change the red circle to blue", True, 5 / 9),
        (Scene("gray", (CIRCLE, replace(CROSS, x=18.0))), "change the red circle to blue", False, 8 / 9),
        (Scene("gray", (CIRCLE, replace(CROSS, x=24.4))), "change the red circle to blue", False, 1.0),
        (Scene("gray", (CIRCLE, CROSS, replace(CROSS, x=10.0))), "change the red circle to blue", False, 8 / 9),
        (Scene("gray", ()), "change the red circle to blue", False, 2 / 9),
        # Four of the cross, the background and the number: 6.
        (SOURCE, "remove the red circle", False, 1.0),
        (Scene("gray", (replace(CROSS, radius=6.0),)), "remove the red circle", True, 5 / 6),
        (Scene("gray", (replace(CIRCLE, color="blue"), CROSS)), "remove the red circle", True, 5 / 6),
        (Scene("black", (CIRCLE, CROSS)), "make the background white", False, 1.0),
        (Scene("white", (CROSS, CIRCLE)), "make the background white", True, 1.0),
        (Scene("gray", (replace(CIRCLE, x=13.0, y=11.0), CROSS)), "move the red circle right", True, 1.0),
        (Scene("gray", (replace(CIRCLE, x=10.0), CROSS)), "move the red circle right", False, 1.0),
    ],
)
def test_verdicts_by_hand(result: Scene, text: str, followed: bool, kept: float) -> None:
    verdict = scene_verdict(SOURCE, result, parse_edit(text))
    assert (verdict.followed, verdict.kept) == (followed, pytest.approx(kept))


def test_results_are_what_their_names_say() -> None:
    rng, anew = np.random.default_rng(2), []
    for _ in range(12):
        source, edit = draw_edit("train", rng)
        results = draw_results(source, edit, rng)
        verdicts = {name: scene_verdict(source, scene, edit) for name, scene in results.items()}
        assert list(verdicts) == list(RESULTS)
        assert verdicts["right"] == EditVerdict(True, 1.0)
        assert verdicts["unchanged"] == EditVerdict(False, 1.0)
        assert verdicts["overdone"].followed
        assert verdicts["overdone"].kept < 1
        assert results["another edit"] not in (results["right"], source)
        anew.append(verdicts["drawn anew"].kept)
    assert np.mean(anew) < 0.8


@pytest.mark.slow
def test_the_judge_agrees_with_the_scenes() -> None:
    pairs = draw_edit_pairs("train", 200, np.random.default_rng(3), noisy=False)
    same = [
        judge_edit(render(pair.source), render(result), pair.edit.text) == scene_verdict(pair.source, result, pair.edit)
        for pair in pairs
        for result in pair.results
    ]
    assert np.mean(same) >= 0.98


def test_pairs_as_files(folder: Path) -> None:
    oracle = {row["pair_id"]: row for row in pq.read_table(folder / "oracle.parquet").to_pylist()}
    assert len(oracle) == sum(PAIRS.values())
    for split, number in PAIRS.items():
        reader = JSONLPairReader(str(folder / f"{split}.jsonl"))
        assert len(reader) == number
        for pair in map(reader.__getitem__, range(number)):
            row = oracle[pair.pair_id]
            gap = row["utility_a"] - row["utility_b"]
            assert (pair.image_a.image_key, pair.image_b.image_key) == (row["key_a"], row["key_b"])
            assert row["utility_a"] == 2 * row["followed_a"] + 2 * row["kept_a"]
            assert split == "train" or pair.label_a == 0.5 * (1 + np.sign(gap))
            assert len(sources_of(pair.prompt)) == 1
    prompts = read_prompts(str(folder / "test_prompts.jsonl"))
    assert len(prompts) == 6
    assert all(sources_of(prompt) for prompt in prompts)


def test_equal_seeds_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    def contents(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert contents(write_edits(tmp_path / "again", PAIRS, seed=1, prompts=6)) == contents(folder)
    assert contents(write_edits(tmp_path / "other", PAIRS, seed=2, prompts=6)) != contents(folder)


def test_batches_hold_the_sources_unless_they_are_ignored(tmp_path: Path) -> None:
    settings = {"layout": "edits", "train_pairs": 8, "val_pairs": 4, "batch_size": 4, "num_workers": 0}
    batch = next(iter(TinyWorldDataModule(tmp_path / "edits", **settings).train_dataloader()))
    assert [source.shape for source in batch.sources] == [(4, 3, 32, 32)]
    blind = TinyWorldDataModule(tmp_path / "edits", sources="ignore", shared_prompts="keep", **settings)
    assert next(iter(blind.train_dataloader())).sources == ()


def test_prompts_carry_pictures_and_follow_the_seed() -> None:
    prompts = TinyWorldEditPromptDataModule(edits=5, data_seed=1).prompts
    assert prompts == TinyWorldEditPromptDataModule(edits=5, data_seed=1).prompts
    assert prompts != TinyWorldEditPromptDataModule(edits=5, data_seed=2).prompts
    assert all(str(prompt) in all_edits() for prompt in prompts)
    with pytest.raises(InputError, match="edits is 0"):
        TinyWorldEditPromptDataModule(edits=0)


def test_the_judge_as_a_scorer(folder: Path) -> None:
    line = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    (prompt, *_) = [JSONLPairReader(str(folder / "test.jsonl"))[0].prompt]
    source = decode_image(sources_of(prompt)[0])
    scores = TinyWorldEditJudge()([prompt], [source])
    assert TinyWorldEditJudge().columns == ("utility", "followed", "kept")
    torch.testing.assert_close(scores, torch.tensor([[2.0, 0.0, 1.0]]))
    with pytest.raises(InputError, match="has no picture to edit; give source_images"):
        TinyWorldEditJudge()([line["prompt"]], [source])
