"""Edits of a generated folder are rated beside the pictures that were edited."""

import json
import urllib.request
from pathlib import Path

import pytest

from latentreward.apps.taste.pairs import RATINGS, RatingReader, from_ratings
from latentreward.apps.taste.ratings import Ratings
from latentreward.core.contracts import sources_of
from tests.apps.taste.folders import edited_folder
from tests.apps.taste.rating_servers import rating_server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return edited_folder(tmp_path, ("make it red", "make it red", "make it blue"))


def test_results_of_one_edit_are_compared_and_trained_on(folder: Path) -> None:
    ratings = Ratings(folder)
    assert {frozenset(pair.names) for pair in ratings.pairs} == {
        frozenset((f"{place}_0.png", f"{place}_1.png")) for place in range(3)
    }
    while ratings.next is not None:
        ratings.rate(ratings.next.names, "a")
    lines = [json.loads(line) for line in (folder / RATINGS).read_text().splitlines()]
    assert all(line["source_images"] == [f"sources/{line['image_a'][0]}.png"] for line in lines)
    assert {len(sources_of(pair.prompt)) for pair in from_ratings(folder).pairs} == {1}
    assert len({*RatingReader(folder).prompts()}) == 3


def test_the_page_shows_what_was_edited(folder: Path) -> None:
    with rating_server(folder) as server:
        state = json.load(urllib.request.urlopen(server.url + "state"))
        (place,) = state["sources"]
        shown = urllib.request.urlopen(f"{server.url}picture/{place}").read()
        assert shown[:3] == b"\xff\xd8\xff" and state["pair"]["prompt"].startswith("make it")
