"""Classes of a user's own among the settings: what fails in a constructor, what is missing, and where."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torchmetrics import Metric

from latentreward.errors import InputError
from latentreward.losses import PreferenceLoss
from latentreward.settings.functions import MODE, SettingsParser, prepare

HERE = __name__


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


LINE = next(number for number, line in enumerate(Path(__file__).read_text().splitlines(), 1) if '{}["a"]' in line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"loss: {HERE}.Half", "loss: Half lacks win_probability of PreferenceLoss; define what is missing"),
        (
            f"loss: {HERE}.Failing",
            f"loss: {HERE}.Failing stopped with KeyError: 'a', test_own_classes.py:{LINE}; --debug shows the traceback",
        ),
        (
            f"loss: {{class_path: {HERE}.Failing, init_args: {{width: 2}}}}",
            f"loss: {HERE}.Failing stopped with ValueError: invalid literal for int() with base 10: 'xx', "
            f"test_own_classes.py:{LINE}; --debug shows the traceback",
        ),
        (
            f"metrics: [{{class_path: {HERE}.Largest, init_args: {{scale: 1.0}}}}, "
            f"{{class_path: {HERE}.Largest, init_args: {{power: 2}}}}]",
            f"metrics[1] ({HERE}.Largest): scale is missing; write it under the init_args of this class",
        ),
    ],
)
def test_setting_class_and_line_are_named(text: str, message: str) -> None:
    prepare([])
    parser = SettingsParser(parser_mode=MODE)
    parser.add_argument("--metrics", type=list[Metric] | None)
    parser.add_argument("--loss", type=PreferenceLoss | None)
    with pytest.raises((InputError, ValueError)) as caught:
        parser.instantiate(parser.parse_string(text))
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):  # jsonargparse wraps what a constructor raises
        error = error.__cause__ or error.__context__
    assert str(error) == message
