"""Every flag of every subcommand takes ``--flag``, ``--flag true``, ``--flag=true`` and the same with false."""

import re

import pytest
import yaml

from latentreward.apps.cli import COMMANDS, main

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
    assert bool(flags) == (command not in ("evaluate-policy", "export-pairs", "generate", "plan-keep", "score-pairs"))
    for spelling, value in SPELLINGS.items() if flags else ():
        arguments = " ".join(spelling.format(flag) for flag in flags).split()
        settings = yaml.safe_load(printed(capsys, command, *arguments, "--print_config"))
        for flag in flags:
            *sections, name = flag.split(".")
            place = settings
            for section in sections:
                place = place[section]
            assert place[name] is value, (spelling, flag)


@pytest.mark.parametrize(
    "arguments",
    [
        "score photos x.csv --model M --each_level",
        "score --model M photos x.csv --each_level",
        "score photos --model=M --each_level x.csv",
        "score --each_level photos -c m.yaml x.csv",
        "score --model M --each_level --print_config photos x.csv",
        "score --each_level true photos x.csv --model M",
        "score x.csv --model M --images photos --each_level",
    ],
)
def test_values_without_a_name_may_follow_options(arguments: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.yaml").write_text("model: M")
    settings = yaml.safe_load(printed(capsys, *arguments.split(), "--print_config"))
    assert [settings[name] for name in ("images", "output", "model", "each_level")] == ["photos", "x.csv", "M", True]


def test_help_of_a_class_inside_a_class(capsys) -> None:
    asked = "--data.train.help", "JSONLPairReader"
    assert "--train.columns" in printed(capsys, "fit", "--data", "PreferenceDataModule", *asked)
