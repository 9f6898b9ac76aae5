"""Record of a run's settings: the same settings go on, and everything else is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentreward.apps.evaluation.policy.picture_scores import ScoreStore
from latentreward.apps.generation.image_folder import ImageFolder
from latentreward.core.errors import InputError
from latentreward.core.storage.run_folder import RunFolder

SPEC: dict[str, Any] = {"policy": {"source": "sd15", "lora": None}, "seed": 0, "sizes": (512, 512)}


def run(output: Path, **changes: Any) -> RunFolder:
    return RunFolder(output, output / "run.json", SPEC | changes, "output_dir", "choose another output_dir")


def test_equal_settings_go_on(tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder"
    assert not run(output).exists()
    run(output).claim()
    (output / "picture.png").touch()
    run(output).claim()
    run(output).compare()
    assert json.loads((output / "run.json").read_text()) == SPEC | {"sizes": [512, 512]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0, now it is 1;"),
        ({"policy": {"source": "sdxl", "lora": None}}, 'policy.source "sd15", now it is "sdxl";'),
        ({"policy": {"source": "sd15"}}, 'policy "source, lora", now it is "source";'),
        ({"more": 1}, "more none, now it is 1;"),
    ],
)
def test_other_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run(tmp_path / "out").claim()
    with pytest.raises(InputError) as error:
        run(tmp_path / "out", **changes).claim()
    assert message in str(error.value)
    run(tmp_path / "out").compare()


def test_files_without_a_record_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files and no run\.json; choose another output_dir"):
        run(tmp_path).claim(made=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


DAMAGE = ["", "{", "[]", "1", "[" * 100_000, '{"scorer": "\ud800'.encode("utf-8", "surrogatepass").decode("latin-1")]


@pytest.mark.parametrize("content", DAMAGE)
def test_damage_is_one_line_and_what_is_computed_stays(tmp_path: Path, content: str) -> None:
    """Records of settings, tables of pictures and files of scores: all give one answer."""

    def record() -> None:
        run(tmp_path / "run").claim()

    def pictures() -> ImageFolder:
        return ImageFolder(tmp_path / "pictures", {})

    def scores() -> ScoreStore:
        return ScoreStore(tmp_path / "scorer.jsonl", "one")

    record()
    row = {"file": "0.png", "prompt": "a cat", "place": 0, "image": 0, "seed": 0, "score": "", "mean_score": ""}
    pictures().add([(row, {})])
    scores().add({"key": (1.0,)})
    for name, open_again in (
        ("run/run.json", record),
        ("pictures/generate.json", pictures),
        ("pictures/images.csv", pictures),
        ("scorer.jsonl", scores),
    ):
        path = tmp_path / name
        sound = path.read_bytes()
        path.write_text(content)
        if (name, content) != ("pictures/images.csv", ""):
            with pytest.raises(InputError, match=rf"{path.name} is damaged \(.*\); (choose|restore|delete) ") as error:
                open_again()
            assert "\n" not in str(error.value)
        assert path.read_text() == content
        path.write_bytes(sound)
    assert pictures().rows == {(0, 0): {name: str(value) for name, value in row.items()}}
    assert scores().scores == {"key": (1.0,)}
