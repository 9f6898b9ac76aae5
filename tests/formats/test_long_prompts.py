"""A prompt beyond the limit is an odd row in every format; the samples' own prompts stand for long ones."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentError, ArgumentParser

from latentreward.apps.cli import main
from latentreward.core.errors import InputError
from latentreward.data import HPDv2Reader, JSONLPairReader, PairReader, PickAPicReader, PromptDataModule
from latentreward.data.alignment.prompt_files import read_prompts
from latentreward.data.format_detection import recognise
from tests.formats.conftest import COMMITTED

PAIR = {"prompt": "p", "chosen": "a.jpg", "rejected": "b.jpg"}


def write_jsonl(root: Path, *rows: dict[str, Any]) -> str:
    (root / "pairs.jsonl").write_text("".join(json.dumps({**PAIR, **row}) + "\n" for row in rows))
    return str(root / "pairs.jsonl")


@pytest.mark.parametrize(
    "sample", ["pickapic_v1", "hpdv2", "hpdv3", "imagereward", "imagerewarddb", "genai_bench_cmu", "diffusion_rm"]
)
def test_a_long_prompt_is_an_odd_row(sample: str) -> None:
    for read in recognise(str(COMMITTED / sample)).values():
        whole = read(on_error="placeholder")
        lengths = sorted(set(map(len, whole.prompts())))
        if len(lengths) < 2:
            continue
        limit, texts = lengths[-2], dict(zip(whole.pair_ids(), whole.prompts(), strict=True))
        kept = read(on_error="placeholder", max_prompt_chars=limit)
        expected = {name: text if len(text) <= limit else "" for name, text in texts.items()}
        assert dict(zip(kept.pair_ids(), kept.prompts(), strict=True)) == expected
        long = [row for row, name in enumerate(kept.pair_ids()) if len(texts[name]) > limit]
        assert np.isnan(kept.labels()[long]).all()
        assert kept.remarks["prompt too long"] > 0
        assert (kept[long[0]].prompt, kept[long[0]].label_a) == ("", None)
        skipping, every_row = read(on_error="skip", max_prompt_chars=limit), read(on_error="skip")
        short = [row for row, text in enumerate(every_row.prompts()) if len(text) <= limit]
        assert skipping.pair_ids() == [every_row.pair_ids()[row] for row in short]
        assert skipping.skipped["prompt too long"] > 0


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


@pytest.mark.parametrize("votes", [[2**63, 0], [1, 10**9 + 1], ["1e400", 1]])
def test_absurd_votes_do_not_kill_a_data_set(votes: list[Any], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path, {"votes": [3, 1]}, {"votes": votes})
    reader = JSONLPairReader(file, on_error="skip", randomise_sides=False)
    if votes == ["1e400", 1]:  # no number: as any other votes that cannot be read
        assert (len(reader), reader[1].votes, reader.remarks) == (2, None, Counter({"votes not readable": 1}))
        return
    assert (len(reader), reader[0].votes, reader.skipped) == (1, (3, 1), Counter({"too many votes": 1}))
    kept = JSONLPairReader(file, on_error="placeholder")
    assert (len(kept), kept[1].votes, kept[1].label_a) == (2, None, None)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_long_prompt_of_a_prompt_file_is_one_line(name: str, tmp_path: Path) -> None:
    text = "x" * 10_001
    content = {"p.txt": f"a cat\n{text}\n", "p.jsonl": json.dumps({"prompt": text}), "p.csv": f"prompt\n{text}\n"}
    (tmp_path / name).write_text(content[name])
    for read in (read_prompts, PromptDataModule):
        with pytest.raises(InputError, match=r"a prompt of 10001 characters, more than max_prompt_chars=10000: 'xx"):
            read(str(tmp_path / name))
    assert text in read_prompts(str(tmp_path / name), max_prompt_chars=10_001)


def test_commands_take_the_limit_and_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path, {}, {"votes": [2**63, 1]}, {"prompt": "x" * 20_000})
    main(["inspect", file, "--limit=0"])
    printed = capsys.readouterr().out
    assert re.search(r"^too many votes +1$", printed, re.MULTILINE)
    assert re.search(r"^prompt too long +1$", printed, re.MULTILINE)
    with pytest.raises(SystemExit):
        main(["generate", file, str(tmp_path / "out"), "--policy.source=sd_tiny"])
