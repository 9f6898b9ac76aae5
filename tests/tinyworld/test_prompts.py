import pytest

from latentreward.core.errors import InputError
from latentreward.tinyworld import TinyWorldPromptDataModule
from latentreward.tinyworld.captions import caption_splits


def test_captions_are_distinct_seeded_and_from_the_training_split() -> None:
    data = TinyWorldPromptDataModule(captions=200, data_seed=1)
    training = {caption.text for kind in caption_splits()["train"].values() for caption in kind}
    assert len(data.prompts) == len(set(data.prompts)) == 200
    assert set(data.prompts) <= training
    assert data.prompts == TinyWorldPromptDataModule(captions=200, data_seed=1).prompts
    assert data.prompts != TinyWorldPromptDataModule(captions=200, data_seed=2).prompts


@pytest.mark.parametrize("captions", [0, 100_000])
def test_more_captions_than_there_are_are_refused(captions: int) -> None:
    with pytest.raises(InputError, match=r"captions=\d+ must lie in \[1, "):
        TinyWorldPromptDataModule(captions=captions)
