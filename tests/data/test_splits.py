"""No prompt is in two splits; a fixed random cut of a data set."""

import numpy as np
import pytest

from latentreward.core.contracts import EditPrompt, ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import PairReader, normalise_prompt, select_rows
from latentreward.data.splits import SharedPrompts, split_by_prompt


class Prompts(PairReader):
    """A reader of one's own that overrides nothing it need not."""

    def __init__(self, *prompts: str, unlabelled: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.texts, self.unlabelled = prompts, unlabelled

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> PreferencePair:
        label = None if index in self.unlabelled else 1.0
        return PreferencePair(f"{index}", self.texts[index], ImageRef("a"), ImageRef("b"), label)


@pytest.mark.parametrize(
    "other", ["a red  CAT", " A red cat\n", "a\tred\n\ncat", "ａ red cat", "a red\N{NO-BREAK SPACE}cat"]
)
def test_prompts_that_differ_in_form_only_are_equal(other: str) -> None:
    assert normalise_prompt(other) == normalise_prompt("a red cat")


def selected(splits: dict[str, PairReader], shared_prompts: SharedPrompts = "drop") -> dict[str, np.ndarray]:
    """Rows of each split; the error of a split that has none left."""
    rows, emptied = select_rows(splits, shared_prompts)
    for problem in emptied.values():
        raise InputError(problem)
    return rows


def test_prompts_that_differ_stay_different() -> None:
    assert normalise_prompt("a red cat.") != normalise_prompt("a red cat")
    assert normalise_prompt("été") == normalise_prompt("e\u0301te\u0301") != normalise_prompt("ete")


def test_earlier_splits_give_way(caplog) -> None:
    splits = {
        "train": Prompts("one", "Two ", "three", "FOUR", "five", "five"),
        "val": Prompts("two", "four", "six"),
        "test": Prompts("four", "four"),
    }
    rows = selected(splits)
    assert {name: indices.tolist() for name, indices in rows.items()} == {
        "train": [0, 2, 4, 5],
        "val": [0, 2],
        "test": [0, 1],
    }
    summary = "data.train: 2 of 6 rows have a prompt that val or test has too; left out"
    assert f"{summary}, 4 labelled rows remain; to keep them, set data.shared_prompts: keep" in caplog.text
    kept = {name: {normalise_prompt(splits[name].texts[i]) for i in rows[name]} for name in rows}
    assert not (kept["train"] & kept["val"] or kept["train"] & kept["test"] or kept["val"] & kept["test"])


def test_sharing_can_be_an_error() -> None:
    with pytest.raises(InputError, match=r"data\.train: 1 of 2 rows .* first 1 'B'; set data\.shared_prompts: drop"):
        selected({"train": Prompts("a", "B"), "val": Prompts("b")}, "raise")
    selected({"train": Prompts("a", "c"), "val": Prompts("b")}, "raise")


def test_unlabelled_rows_are_left_out_but_their_prompts_count() -> None:
    rows = selected({"train": Prompts("a", "b", "c", unlabelled=(1,)), "val": Prompts("c", "d", unlabelled=(0,))})
    assert np.array_equal(rows["train"], [0])
    assert np.array_equal(rows["val"], [1])


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(
        InputError,
        match=r"data\.train: none of 2 rows left: 1 are unlabelled, 1 have a prompt that val has too; label rows, "
        r"set data\.shared_prompts: keep, or give other splits",
    ):
        selected({"train": Prompts("a", "b", unlabelled=(1,)), "val": Prompts("a")})
    with pytest.raises(InputError, match=r"none of 1 rows left: 1 are unlabelled; label rows, or give other splits"):
        selected({"train": Prompts("a", unlabelled=(0,))})


def test_keeping_shared_prompts_is_proposed_only_if_rows_would_remain() -> None:
    unlabelled = Prompts("a", "b", unlabelled=(0, 1))
    with pytest.raises(InputError) as caught:
        selected({"train": unlabelled, "val": Prompts("a", "b")})
    assert str(caught.value) == ("data.train: none of 2 rows left: 2 are unlabelled; label rows, or give other splits")


def test_shared_prompts_may_be_kept(caplog) -> None:
    rows = selected({"train": Prompts("a", "b", unlabelled=(1,)), "val": Prompts("a", "b")}, "keep")
    assert {name: indices.tolist() for name, indices in rows.items()} == {"train": [0], "val": [0, 1]}
    assert caplog.text == ""


def test_edits_of_unlike_pictures_share_no_prompt() -> None:
    cat, dog = ([ImageRef(name)] for name in ("cat.png", "dog.png"))
    edits = EditPrompt("make it red", cat), EditPrompt("Make it  red", dog), EditPrompt("MAKE IT RED", cat)
    rows = selected({"train": Prompts(*edits, "make it red"), "val": Prompts(EditPrompt("make it red", cat))})
    assert rows["train"].tolist() == [1, 3]
    assert normalise_prompt(edits[0]) == normalise_prompt(edits[2]) != normalise_prompt(edits[1])
    assert type(normalise_prompt(edits[0])) is str
    assert normalise_prompt(EditPrompt("x", [*cat, *dog])) != normalise_prompt(EditPrompt("x", [*dog, *cat]))


def test_a_share_of_the_prompts_is_held_out_whatever_the_order() -> None:
    prompts = [f"p {n % 20}" for n in range(50)]
    parts = split_by_prompt(Prompts(*prompts), 0.1)
    train, val = ({normalise_prompt(prompt) for prompt in part.prompts()} for part in parts)
    assert (len(val), len(train | val), train & val) == (2, 20, set())
    assert sum(map(len, parts)) == 50
    assert {*split_by_prompt(Prompts(*reversed(prompts)), 0.1)[1].prompts()} == {*parts[1].prompts()}
    for share, few in ((0.0, prompts), (1.0, prompts), (0.5, ["x"] * 9)):
        with pytest.raises(InputError, match=r"data\.val_share"):
            split_by_prompt(Prompts(*few), share)
