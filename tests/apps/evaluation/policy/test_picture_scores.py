"""What tells whether a picture has its scores already."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from latentreward.apps.evaluation.policy.picture_scores import PictureScoring
from latentreward.core.shared_work import SharedWork
from latentreward.reward.scorers.tools import JudgedPicture
from tests.apps.evaluation.policy.toy_scorers import Channels


def test_scores_are_of_a_picture_with_its_prompt_and_place(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    picture, scorer = JudgedPicture(0, 0, "0.png", tmp_path / "0.png", "a cat", ""), Channels("channels")
    with SharedWork(None, "cpu", tmp_path / "work") as work:

        def scoring(one: JudgedPicture) -> PictureScoring:
            return PictureScoring("policy", [one], [scorer], tmp_path / "scores", work)

        (chunk,) = scoring(picture).chunks()
        scoring(picture).stores["channels"].add({chunk["keys"][0]: (1.0, 2.0)})
        assert scoring(picture).missing(scorer) == []
        for other in (replace(picture, prompt="a dog"), replace(picture, place=1), replace(picture, image=1)):
            assert scoring(other).missing(scorer) == [0]
