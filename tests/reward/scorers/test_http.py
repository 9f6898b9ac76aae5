"""A scorer on a server: a judge, and our own server, by real sockets."""

import pytest
import torch
from PIL import Image

from latentreward.core.errors import InputError
from latentreward.data import HPDv3Reader
from latentreward.reward import HTTPScorer, RemoteError, RemoteServer, ServedImages
from latentreward.reward.scorers.pair_scoring import PairScoring
from tests.apps.serving.servers import serving, tiny_reward
from tests.formats.conftest import COMMITTED
from tests.reward.remote.judges import judged, judging, plain

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
