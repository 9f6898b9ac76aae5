"""A prompt of an edit is a text that carries the pictures, in the places where prompts are compared and moved."""

import json
import pickle
from pathlib import Path

import pytest

from latentreward.core.contracts import EditPrompt, ImageRef, PromptBatch, like_prompt, sources_of, sources_wanted

CAT, DOG = ImageRef("cat.png", data=b"cat"), ImageRef("dog.png", data=b"dog")


def test_equality_is_of_text_and_pictures():
    prompt = EditPrompt("make it red", [CAT])
    assert prompt == EditPrompt("make it red", [ImageRef("cat.png", data=b"cat")])
    others = [
        EditPrompt("make it red", [ImageRef("cat.png", data=b"other bytes")]),
        EditPrompt("make it red", [DOG]),
        EditPrompt("make it red", [CAT, DOG]),
        EditPrompt("make it blue", [CAT]),
    ]
    for other in [*others, "make it red"]:
        assert prompt != other and other != prompt
        assert len({prompt: 0, other: 1}) == 2
    here, there = (ImageRef("1.png", path=Path(folder, "1.png")) for folder in "ab")
    assert EditPrompt("make it red", [here]) != EditPrompt("make it red", [there])
    assert EditPrompt("make it red", [CAT, DOG]) != EditPrompt("make it red", [DOG, CAT])


def test_text_is_read_as_any_text():
    prompt = EditPrompt("make it red", [CAT])
    assert f"{prompt}" == "make it red" and json.dumps(prompt) == '"make it red"' and type(prompt.strip()) is str
    assert like_prompt(prompt.upper(), prompt) == EditPrompt("MAKE IT RED", [CAT])
    assert like_prompt("a dog", "a cat") == "a dog" and sources_of("a cat") == ()


def test_pickling_keeps_pictures():
    batch = PromptBatch((EditPrompt("make it red", [CAT]), "a cat"), ("0/0", "0/1")).times(2)
    again = pickle.loads(pickle.dumps(batch))
    assert again == batch and sources_of(again.prompts[1]) == (CAT,) and sources_of(again.prompts[3]) == ()
    assert again.prompts[0] is again.prompts[1]  # a picture's bytes travel once


@pytest.mark.parametrize(
    ("taken", "right", "wrong", "words"),
    [((0, 0), 0, 1, "0"), ((1, 1), 1, 2, "1"), ((0, 1), 1, 2, "0 to 1"), ((1, None), 99, 0, "at least 1")],
)
def test_a_number_of_pictures_is_refused_in_words(
    taken: tuple[int, int | None], right: int, wrong: int, words: str
) -> None:
    assert sources_wanted(right, taken) is None
    assert sources_wanted(wrong, taken) == words
