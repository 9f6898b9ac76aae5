import pytest

from latentreward.core.storage.hub import is_hub_id


@pytest.mark.parametrize(
    ("name", "alone", "with_folders"),
    [
        ("owner/na-me_1.5", True, True),
        ("owner/name/checkpoints/step=100", False, True),
        ("owner/name/", False, True),
        ("gpt2", False, False),
        ("./owner/name", False, False),
        ("../name", False, False),
        ("~/name", False, False),
        ("/owner/name", False, False),
        ("owner/.name", False, False),
        ("a folder/name", False, False),
        ("run/last.ckpt", False, False),
    ],
)
def test_a_hub_id_is_told_from_a_path(name: str, alone: bool, with_folders: bool) -> None:
    assert (is_hub_id(name), is_hub_id(name, folders=True)) == (alone, with_folders)
