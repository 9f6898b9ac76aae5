"""A prompt beyond the limit is an odd row in every format; the samples' own prompts stand for long ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from latentreward.core.errors import InputError
from latentreward.data import HPDv2Reader, JSONLPairReader, PairReader, PickAPicReader, PromptDataModule
from latentreward.data.alignment.prompt_files import read_prompts

PAIR = {"prompt": "p", "chosen": "a.jpg", "rejected": "b.jpg"}


def write_jsonl(root: Path, *rows: dict[str, Any]) -> str:
    (root / "pairs.jsonl").write_text("".join(json.dumps({**PAIR, **row}) + "\n" for row in rows))
    return str(root / "pairs.jsonl")


@pytest.mark.parametrize("kind", [HPDv2Reader, PickAPicReader, JSONLPairReader])
def test_forwarded_settings_are_known_to_the_command_line(kind: type[PairReader]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "reader")
    given = {name: "x" for name in ("file", "root", "source", "split") if f"reader.{name}" in parser.get_defaults()}
    settings = parser.parse_object({"reader": {**given, "on_error": "skip", "max_prompt_chars": 7}}).reader
    assert (settings.on_error, settings.max_prompt_chars) == ("skip", 7)
    with pytest.raises(ArgumentError, match="on_eror"):
        parser.parse_object({"reader": {**given, "on_eror": "skip"}})


def test_the_limit_is_a_setting_and_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path, {}, {"prompt": "x" * 10_001})
    for limit, told in ({"max_prompt_chars": 20}, "=20; cor"), ({}, "=10000; cor"):
        with pytest.raises(InputError, match=f"pairs.jsonl:2: prompt has 10001 .*, more than max_prompt_chars{told}"):
            JSONLPairReader(file, **limit)
    with pytest.raises(InputError, match="max_prompt_chars is 0; it must be at least 1"):
        JSONLPairReader(file, max_prompt_chars=0)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_long_prompt_of_a_prompt_file_is_one_line(name: str, tmp_path: Path) -> None:
    text = "x" * 10_001
    content = {"p.txt": f"a cat\n{text}\n", "p.jsonl": json.dumps({"prompt": text}), "p.csv": f"prompt\n{text}\n"}
    (tmp_path / name).write_text(content[name])
    for read in (read_prompts, PromptDataModule):
        with pytest.raises(InputError, match=r"a prompt of 10001 characters, more than max_prompt_chars=10000: 'xx"):
            read(str(tmp_path / name))
    assert text in read_prompts(str(tmp_path / name), max_prompt_chars=10_001)
