"""Classes of a user's own among the settings: what fails in a constructor, what is missing, and where."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from latentreward.core.contracts import PreferencePair
from latentreward.core.errors import InputError, where
from latentreward.core.settings.functions import MODE, ConfigFile, SettingsParser, constructor_errors, prepare_parsing
from latentreward.data import PairReader, PreferenceDataModule
from latentreward.reward import PreferenceLoss

HERE = __name__


class Rows(PairReader):
    """A reader that fails as its rows are counted, or as one is read."""

    def __init__(self, length: int = 1) -> None:
        super().__init__()
        self.length = length

    def __len__(self) -> int:
        return self.length or int("no number")

    def __getitem__(self, index: int) -> PreferencePair:
        return [][index]


class Counted(Rows):
    """A reader whose rows are counted, but not read."""

    def __getitem__(self, index: int) -> PreferencePair:
        return int("no number")


class Half(PreferenceLoss):
    def per_pair(self, scores: Any) -> Tensor:
        return scores.margin


class Failing(Half):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = {}["a"] if width == 1 else int("x" * width)

    def win_probability(self, scores: Any) -> Tensor:
        return scores.margin


class Largest(Metric):
    def __init__(self, scale: float, power: int = 1) -> None:
        super().__init__()

    def update(self, *values: Tensor) -> None: ...

    def compute(self) -> None: ...


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"loss: {HERE}.Half", "loss: Half lacks win_probability"),
        (
            f"metrics: [{{class_path: {HERE}.Largest, init_args: {{power: 2}}}}]",
            "metrics: scale is missing",
        ),
    ],
)
def test_setting_class_and_line_are_named(text: str, message: str) -> None:
    prepare_parsing([], classes=True)
    parser = SettingsParser(parser_mode=MODE)
    parser.add_argument("--metrics", type=list[Metric] | None)
    parser.add_argument("--loss", type=PreferenceLoss | None)
    with pytest.raises((InputError, ValueError)) as caught:
        parser.instantiate(parser.parse_string(text))
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):  # jsonargparse wraps what a constructor raises
        error = error.__cause__ or error.__context__
    assert str(error).startswith(message)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (1, r"list index out of range \(IndexError"),
        (0, r"invalid literal .* 'no number' \(ValueError"),
    ],
)
def test_class_and_line_of_an_error_in_a_reader_are_named(length: int, message: str) -> None:
    prepare_parsing([], classes=True)
    parser = SettingsParser(parser_mode=MODE)
    parser.add_argument("--data", type=PreferenceDataModule | None)
    train = f"{{class_path: {HERE}.Rows, init_args: {{length: {length}}}}}"
    settings = parser.parse_string(
        f"data: {{class_path: PreferenceDataModule, init_args: {{size: 32, train: {train}}}}}"
    )
    with pytest.raises(InputError, match=rf"^{message}, test_own_classes.py:\d+; --debug"), constructor_errors():
        parser.instantiate(settings)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("{}['a']", r"'a' \(KeyError, sub_parts.py:1; --debug"),
        ("def f():\n    return [][1]\nf()", r"list index out of range \(IndexError, sub_parts.py:2; --debug"),
        ("import no_such_module", "No module named 'no_such_module' in the current folder, .*sub_parts.py:1; --debug"),
        ("class Mine(1): ...", "sub_parts.py:1; --debug"),
    ],
)
def test_line_of_an_error_while_an_own_module_is_imported_is_named(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "sub_parts.py").write_text(code)
    (tmp_path / "mine.yaml").write_text("loss: sub_parts.Mine")
    prepare_parsing([], classes=True)
    with pytest.raises(InputError, match=message) as caught:
        loss_parser().parse_args([f"--config={tmp_path / 'mine.yaml'}"])
    assert "\n" not in str(caught.value)


def loss_parser() -> SettingsParser:
    parser = SettingsParser(parser_mode=MODE)
    parser.add_argument("--config", action=ConfigFile)
    parser.add_argument("--loss", type=PreferenceLoss | None)
    return parser


def test_modules_are_found_in_the_current_folder_and_beside_a_config_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "sub", "other"):
        (tmp_path / folder).mkdir()
    own = f"from {HERE} import Failing as Mine"
    places = {
        "here/both_parts.py": own,
        "sub/both_parts.py": "1 / 0",
        "sub/beside_parts.py": own,
        "sub/yaml.py": "1 / 0",
    }
    for name, code in {**places, "other/far_parts.py": own}.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, found in {"both": ["here"], "beside": ["here", "sub"], "far": None}.items():
        (tmp_path / "sub" / "mine.yaml").write_text(f"loss: {name}_parts.Mine")
        prepare_parsing([], classes=True)
        if found:
            loss_parser().parse_args(["--config=../sub/mine.yaml"])
            assert [str(tmp_path / one) for one in found] == [
                path for path in sys.path if path.startswith(str(tmp_path))
            ]
        else:
            searched = "No module named 'far_parts' in the current folder, beside the --config file, or installed"
            with pytest.raises(InputError, match=searched):
                loss_parser().parse_args(["--config=../sub/mine.yaml"])


def test_line_of_an_error_in_a_loaders_worker_is_named() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        next(iter(DataLoader(Counted(), num_workers=1)))
    assert re.fullmatch(r" \(ValueError, test_own_classes.py:\d+; --debug shows the traceback\)", where(caught.value))
    assert where(InputError("said already")) == where(None) == ""
