"""Scorers of several columns, and what their tables remember."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import ImageRef, sources_of
from latentreward.data import HPDv3Reader, JSONLPairReader, decode_image
from latentreward.reward import CallableScorer, ImageScorer
from latentreward.reward.scorers import pair_scoring
from latentreward.reward.scorers.pair_scoring import PairScoring
from tests.formats.conftest import COMMITTED


class Channels(ImageScorer):
    """Mean of red, green and blue."""

    calls = 0

    @property
    def columns(self) -> tuple[str, ...]:
        return "red", "green", "blue"

    def identity(self) -> str:
        return "Channels"

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        self.calls += len(images)
        return torch.stack([torch.tensor(np.asarray(image)).float().mean(dim=(0, 1)) for image in images])


def reader() -> HPDv3Reader:
    return HPDv3Reader(str(COMMITTED / "hpdv3"), "test", on_error="placeholder")


def test_scores_of_another_orientation_or_size_limit_are_other_scores() -> None:
    scorers, upright = [Channels("channels")], reader()
    upright.exif = "apply" if upright.exif == "ignore" else "ignore"
    given = PairScoring(reader(), scorers).spec()
    assert PairScoring(reader(), scorers).spec() == given
    assert PairScoring(upright, scorers).spec() != given
    assert PairScoring(reader(), scorers, max_pixels=9).spec() != given


def test_each_column_has_its_scores_and_gaps() -> None:
    scoring = PairScoring(reader(), [Channels("channels", batch_size=3)])
    pairs = [reader()[row] for row in range(len(reader()))]
    ((_, table),) = scoring.tables([range(len(reader()))])
    for place, name in enumerate(("red", "green", "blue")):
        pixels = np.asarray(Image.open(pairs[0].image_a.path).convert("RGB"))
        assert table.column(f"{name}_a")[0].as_py() == pytest.approx(pixels.mean(axis=(0, 1))[place], abs=1e-3)
        columns = {side: table.column(f"{name}_{side}").to_numpy() for side in ("a", "b", "gap")}
        labels = table.column("label_a").to_numpy()
        expected = np.where(labels == 1, columns["a"] - columns["b"], columns["b"] - columns["a"])
        np.testing.assert_array_equal(columns["gap"], expected)


def test_recalled_columns_are_not_scored_again() -> None:
    rows = range(len(reader()))
    first, second = Channels("channels"), Channels("channels")
    scoring, later = PairScoring(reader(), [first]), PairScoring(reader(), [second])
    ((_, table),) = scoring.tables([rows])
    later.recall(rows, table)
    ((_, again),) = later.tables([rows])
    assert again.equals(table)
    assert first.calls > 0
    assert second.calls == 0


class Scaled:
    """Mean of an image, times a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        return self.factor * torch.tensor([float(np.asarray(image).mean()) for image in images])


def test_stored_scores_are_of_these_images_and_this_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": "a cat", "chosen": "0.png", "rejected": "1.png"}
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_scoring.py").write_text("def zero(prompts, images):\n    return 0.0\n")
    import own_scoring  # type: ignore[import-not-found]

    def spec(chosen: str = "0.png", shade: int = 0, factor: float = 1.0) -> dict[str, Any]:
        for number in range(3):
            Image.new("RGB", (8 + 90 * shade, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / "pairs.jsonl").write_text(json.dumps({**row, "chosen": chosen}))
        scorers = [CallableScorer(Scaled(factor), "scaled"), CallableScorer(own_scoring.zero, "own")]
        return PairScoring(JSONLPairReader(str(tmp_path / "pairs.jsonl")), scorers).spec()

    before = spec()
    assert spec() == before
    other = [spec(chosen="2.png"), spec(shade=1), spec(factor=-1.0)]
    (tmp_path / "own_scoring.py").write_text("def zero(prompts, images):\n    return 1.0\n")
    assert before not in [*other, spec()]


def test_an_edit_of_another_picture_is_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, colour in (("red", "red"), ("blue", "blue"), ("edit", "grey")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    sides = {"prompt": "make it red", "image_a": "edit.png", "image_b": "red.png", "label": 1.0}
    rows = [sides | {"source_images": [source]} for source in ("red.png", "blue.png", "red.png")]
    files = [tmp_path / "pairs.jsonl", tmp_path / "others.jsonl"]
    for file, written in zip(files, (rows, rows[:1] * 3), strict=True):
        file.write_text("\n".join(map(json.dumps, written)))
    scored, decoded = [], list[str]()

    def decode(image: ImageRef, *how: Any) -> Image.Image:
        decoded.append(Path(image.image_key).name)
        return decode_image(image, *how)

    def score(prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        scored.extend(prompts)
        return torch.tensor([float("red" in sources_of(prompt)[0].image_key) for prompt in prompts])

    monkeypatch.setattr(pair_scoring, "decode_image", decode)
    scoring = PairScoring(JSONLPairReader(str(files[0])), [CallableScorer(score, "judge")], decode_threads=1)
    ((_, table),) = scoring.tables([range(3)])
    assert table.column("judge_a").to_pylist() == [1, 0, 1] and len(scored) == 4
    assert sorted(decoded) == ["blue.png", "edit.png", "edit.png", "red.png", "red.png", "red.png"]  # sources once each
    others = PairScoring(JSONLPairReader(str(files[1])), scoring.scorers)
    assert others.spec()["reader"] != scoring.spec()["reader"]
