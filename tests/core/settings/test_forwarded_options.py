"""Settings that one class or function hands on to another are settings like any other."""

from importlib import import_module

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from latentreward.core.registry import backbone_names
from tests.marks import rotated_after


@pytest.mark.parametrize(
    ("option", "wrong"),
    rotated_after(
        1,
        [("tuning", "halff"), ("lora", "{rank: many}"), ("quantization", "int3"), ("gradient_checkpointing", "often")],
    ),
)
@pytest.mark.parametrize("name", [name for name, path in backbone_names().items() if path.startswith("latentreward.")])
def test_every_backbone_knows_the_types_of_what_it_hands_on(name: str, option: str, wrong: str) -> None:
    module, function = backbone_names()[name].rsplit(".", 1)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(getattr(import_module(module), function))
    with pytest.raises(ArgumentError, match=option):
        parser.parse_args(["--source=folder", f"--{option}={wrong}"])
