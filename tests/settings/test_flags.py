"""Every flag of every subcommand takes ``--flag``, ``--flag true``, ``--flag=true`` and the same with false."""

import re

import pytest
import yaml

from latentreward.cli import COMMANDS, main
from tests.settings.test_refusals import FIT, refusal

SPELLINGS = {
    "--{}": True,
    "--{} true": True,
    "--{}=true": True,
    "--{} True": True,
    "--{} false": False,
    "--{}=false": False,
}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_subcommand(command: str, capsys) -> None:
    flags = re.findall(r"^  --(\S+) \[\{true,false", printed(capsys, command, "--help"), flags=re.MULTILINE)
    assert bool(flags) == (command not in ("configs", "generate", "score-pairs"))
    for spelling, value in SPELLINGS.items() if flags else ():
        arguments = " ".join(spelling.format(flag) for flag in flags).split()
        settings = yaml.safe_load(printed(capsys, command, *arguments, "--print_config"))
        for flag in flags:
            *sections, name = flag.split(".")
            place = settings
            for section in sections:
                place = place[section]
            assert place[name] is value, (spelling, flag)


def test_a_flag_with_another_word_is_refused(capsys) -> None:
    assert refusal(capsys, "inspect", "pairs", "--decode", "maybe") == "decode: expected bool, got 'maybe'"


def test_a_setting_of_a_class_without_a_value_is_named(capsys) -> None:
    line = refusal(capsys, *FIT, "--data.shuffle", "--trainer.max_steps=1")
    assert line.startswith("--data.shuffle has no value; write --data.shuffle=VALUE")
    assert "allow_outside=VALUE" in refusal(capsys, "publish", "model", "out", "--reference.allow_outside")
