"""Scores from a function, from the column of a file and by a server; what every scorer must return."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import HPDv3Reader
from latentreward.reward import CallableScorer, HTTPScorer, RemoteError, RemoteServer, ServedImages, TableColumn
from latentreward.reward.scorers.pair_scoring import PairScoring
from tests.apps.serving.servers import serving, tiny_reward
from tests.formats.conftest import COMMITTED
from tests.reward.remote.judges import judged, judging, plain


def brightness(prompts: Sequence[str], images: Sequence[Image.Image], scale: float = 1.0) -> torch.Tensor:
    return scale * torch.tensor([float(np.asarray(image).mean()) for image in images])


class Constant:
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.full((len(images),), self.value, dtype=torch.float64)


def pair(number: int, prompt: str = "p") -> PreferencePair:
    return PreferencePair(f"pair-{number}", prompt, ImageRef(f"{number}-a"), ImageRef(f"{number}-b"), 1.0)


def test_a_function_in_batches(pictures) -> None:
    sizes = []

    def counted(prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        sizes.append((len(prompts), len(images)))
        return brightness(prompts, images)

    scores = CallableScorer(counted, "bright", batch_size=4)(["p"] * 6, pictures)
    torch.testing.assert_close(scores, brightness([], pictures))
    assert sizes == [(4, 4), (2, 2)]
    assert CallableScorer(counted, "bright")([], []).shape == (0,)


class Remembering(Constant):
    """A function with a secret, a memory that calls fill, a network, and what is no setting of its own."""

    def __init__(self, value: Any, key: str = "sk-SECRET") -> None:
        super().__init__(value)
        self.key, self.memory, self.parts = key, dict[str, float](), [object()]
        self.network, self._calls = torch.nn.Linear(1, 1), 0

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        self.memory["first"] = self._calls = len(images)
        return super().__call__(prompts, images)


def test_settings_of_a_function_are_compared_and_not_told() -> None:
    scorer = CallableScorer(Remembering(1.0), "one")
    before = scorer.identity()
    scorer(["p"], [Image.new("RGB", (1, 1))])
    assert scorer.identity() == CallableScorer(Remembering(1.0), "one").identity() == before
    assert "SECRET" not in before
    kinds: list[Callable[[float], Any]] = [
        Remembering,
        lambda value: partial(brightness, scale=value),
        lambda value: Constant(value).__call__,
        lambda value: partial(Constant(value)),
    ]
    for kind in kinds:
        one, other = (CallableScorer(kind(value), "one").identity() for value in (1.0, 2.0))
        assert one != other, one
    assert "test_plugins.brightness, " in CallableScorer(partial(brightness, scale=1.0), "one").identity()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: torch.zeros(n, 1), r"returned \(2, 1\) for 2 images; it must be a tensor \(2,\)"),
        (lambda n: torch.zeros(1), r"returned \(1,\) for 2 images"),
        (lambda n: torch.tensor([0.0, torch.nan]), "returned nan for the prompt 'second' and an image of 40×33"),
        (lambda n: torch.tensor([torch.inf, 0.0]), "returned inf for the prompt 'first'"),
        (lambda n: [0.0] * n, "returned list for 2 images; it must be a tensor"),
    ],
)
def test_nonsense_is_one_line(pictures, returned, message: str) -> None:
    scorer = CallableScorer(lambda prompts, images: returned(len(images)), "mine")
    with pytest.raises(InputError, match=f"scorer 'mine' {message}") as error:
        scorer(["first", "second"], pictures[:2])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompts", [[], ["p"], ["p"] * 3])
def test_each_picture_has_its_prompt(prompts: list[str], pictures) -> None:
    """A network would score all pictures for the only prompt."""
    with pytest.raises(InputError, match=f"scorer 'bright' got {len(prompts)} prompts for 2 images; give one for each"):
        CallableScorer(brightness, "bright")(prompts, pictures[:2])


def test_a_scorer_may_change_its_pictures_and_the_next_one_sees_them_whole(pictures) -> None:
    def shrink(prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        for image in images:
            image.thumbnail((4, 4))
        return torch.tensor([float(image.width) for image in images])

    whole = brightness([], pictures)
    assert CallableScorer(shrink, "small")(["p"] * len(pictures), pictures).max() <= 4
    torch.testing.assert_close(CallableScorer(brightness, "bright")(["p"] * len(pictures), pictures), whole)


def test_a_column_by_pair(tmp_path: Path) -> None:
    (tmp_path / "vqa.csv").write_text("pair_id,vqa_a,vqa_b\npair-1,0.25,0.5\npair-0,,0.75\n")
    scorer = TableColumn(tmp_path / "vqa.csv", "vqa", name="vqascore")
    assert scorer.name == "vqascore"
    scores = scorer.lookup([pair(0), pair(1), pair(2)])
    np.testing.assert_array_equal(scores, [[np.nan, 0.75], [0.25, 0.5], [np.nan, np.nan]])
    assert scorer.lookup([]).shape == (0, 2)


def test_a_column_by_image(tmp_path: Path) -> None:
    keys = ["0-a", "0-b", "1-a"]
    pq.write_table(pa.table({"image_key": keys, "vqa": [1.0, 2.0, 3.0]}), tmp_path / "images.parquet")
    scores = TableColumn(tmp_path / "images.parquet", "vqa").lookup([pair(0), pair(1, "other")])
    np.testing.assert_array_equal(scores, [[1.0, 2.0], [3.0, np.nan]])
    table = pa.table({"image_key": [*keys, "0-a"], "prompt": ["p", "p", "p", "q"], "vqa": [1.0, 2.0, 3.0, 4.0]})
    pq.write_table(table, tmp_path / "prompts.parquet")
    scores = TableColumn(tmp_path / "prompts.parquet", "vqa").lookup([pair(0), pair(0, "q"), pair(1)])
    np.testing.assert_array_equal(scores, [[1.0, 2.0], [4.0, np.nan], [3.0, np.nan]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vqa_a,vqa_b\n1,2\n", "no column pair_id or image_key; it has vqa_a, vqa_b"),
        ("pair_id,vqa_a\nx,1\n", "no column vqa_b; it has pair_id, vqa_a"),
        ("image_key,vqa\nx,1\nx,2\n", "1 rows repeat an earlier image_key"),
        ("image_key,vqa\nx,word\n", "column vqa is string, not numbers"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "vqa.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        TableColumn(tmp_path / "vqa.csv", "vqa")


PROMPTS = ["a red circle", "two blue squares", "a cross"]
IMAGES = [Image.new("RGB", (16, 16), (80 * number, 0, 0)) for number in range(3)]


def test_scores_are_those_of_the_judge() -> None:
    with judging() as judge:
        scorer = HTTPScorer(RemoteServer(judge.url), name="judge", batch_size=2)
        scorer.prepare()
        expected = torch.tensor([judged(*row) for row in zip(PROMPTS, IMAGES, strict=True)])
        torch.testing.assert_close(scorer(PROMPTS, IMAGES), expected)
        assert sorted(judge.sizes) == [1, 2]
        assert scorer.identity() == f"HTTPScorer {judge.url} PlainJSON(path='/score')"
        assert scorer.columns == ("judge",)


def test_our_own_server_gives_the_models_scores() -> None:
    model = tiny_reward()
    with serving(model, token="secret") as (url, _), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCORES_TOKEN", "secret")
        scorer = HTTPScorer(RemoteServer(url, token_env="SCORES_TOKEN"), ServedImages())
        torch.testing.assert_close(scorer(PROMPTS, IMAGES), model.score(PROMPTS, IMAGES))
        with pytest.raises(RemoteError, match="HTTP 401: give this server's token"):
            HTTPScorer(RemoteServer(url), ServedImages())(PROMPTS, IMAGES)


def test_kept_scores_of_pairs_are_not_mixed_with_another_models() -> None:
    reader = HPDv3Reader(str(COMMITTED / "hpdv3"), "test", on_error="placeholder")
    tables, cut = [], len(reader) // 2
    for model in ("first", "first", "second"):
        with judging(lambda request, model=model: {**plain(request), "model": model}) as judge:
            scoring = PairScoring(reader, [HTTPScorer(RemoteServer(judge.url))])
            for rows, table in tables:
                scoring.recall(rows, table)
            if model == "first":
                tables += scoring.tables([range(cut)] if not tables else [range(cut, cut + 1)])
                continue
            told = "scorer 'http': its server now names the model 'second', but scores are kept of the model 'first'"
            with pytest.raises(InputError, match=told):
                [*scoring.tables([range(cut + 1, len(reader))])]
    assert len(tables) == 2
