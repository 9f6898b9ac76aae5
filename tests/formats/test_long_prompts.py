"""A prompt beyond the limit is an odd row in every format; the samples' own prompts stand for long ones."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentError, ArgumentParser

from latentreward.apps.cli import main
from latentreward.core.errors import InputError
from latentreward.data import (
    DiffusionRMReader,
    FolderPairReader,
    GenAIBenchCMUReader,
    GenAIBenchReader,
    HPDv2Reader,
    HPDv3Reader,
    ImageRewardDBReader,
    ImageRewardReader,
    JSONLPairReader,
    PairReader,
    PickAPicReader,
    PickAPicTarReader,
    PromptDataModule,
)
from latentreward.data.alignment.prompt_files import read_prompts
from tests.data.conftest import encode
from tests.formats.conftest import COMMITTED

PROMPTS = ("a cat", "a " + "very " * 4 + "long prompt", "a dog")


def write_folders(root: Path) -> PairReader:
    for number, prompt in enumerate(PROMPTS):
        for side in ("chosen", "rejected"):
            (root / side).mkdir(parents=True, exist_ok=True)
            (root / side / f"{number}.jpg").write_bytes(encode())
        (root / "chosen" / f"{number}.txt").write_text(prompt)
    return root


def write_jsonl(root: Path) -> Path:
    rows = [{"prompt": prompt, "chosen": "a.jpg", "rejected": "b.jpg"} for prompt in PROMPTS]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "pairs.jsonl"


def write_tars(root: Path) -> Path:
    with tarfile.open(root / "00000.tar", "w") as archive:
        for number, prompt in enumerate(PROMPTS):
            texts = {"label_0.txt": b"1", "label_1.txt": b"0", "original_prompt.txt": prompt.encode()}
            for name, data in {**texts, "jpg_0.jpg": encode(), "jpg_1.jpg": encode((1, 2, 3))}.items():
                member = tarfile.TarInfo(f"{number:08d}.{name}")
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
    return root


READERS: dict[str, Callable[..., PairReader]] = {
    "pickapic": lambda root, **options: PickAPicReader(str(COMMITTED / "pickapic_v1"), "train", **options),
    "tars": lambda root, **options: PickAPicTarReader(str(write_tars(root)), **options),
    "hpdv2 train": lambda root, **options: HPDv2Reader(str(COMMITTED / "hpdv2"), "train", **options),
    "hpdv2 test": lambda root, **options: HPDv2Reader(str(COMMITTED / "hpdv2"), "test", **options),
    "hpdv3": lambda root, **options: HPDv3Reader(str(COMMITTED / "hpdv3"), "train", **options),
    "imagereward": lambda root, **options: ImageRewardReader(str(COMMITTED / "imagereward"), **options),
    "imagerewarddb": lambda root, **options: ImageRewardDBReader(str(COMMITTED / "imagerewarddb"), "test", **options),
    "genai_bench": lambda root, **options: GenAIBenchReader(str(COMMITTED / "genai_bench"), "test", **options),
    "genai_bench_cmu": lambda root, **options: GenAIBenchCMUReader(str(COMMITTED / "genai_bench_cmu"), **options),
    "diffusion_rm": lambda root, **options: DiffusionRMReader(str(COMMITTED / "diffusion_rm"), **options),
    "folders": lambda root, **options: FolderPairReader(str(write_folders(root)), **options),
    "jsonl": lambda root, **options: JSONLPairReader(str(write_jsonl(root)), **options),
}


@pytest.mark.parametrize("name", READERS)
def test_a_long_prompt_is_an_odd_row(name: str, tmp_path: Path) -> None:
    read = READERS[name]
    whole = read(tmp_path, on_error="placeholder")
    limit = sorted(set(map(len, whole.prompts())))[-2]
    texts = dict(zip(whole.pair_ids(), whole.prompts(), strict=True))
    kept = read(tmp_path, on_error="placeholder", max_prompt_chars=limit)
    expected = {name: text if len(text) <= limit else "" for name, text in texts.items()}
    assert dict(zip(kept.pair_ids(), kept.prompts(), strict=True)) == expected
    long = [row for row, name in enumerate(kept.pair_ids()) if len(texts[name]) > limit]
    assert np.isnan(kept.labels()[long]).all()
    assert kept.remarks["prompt too long"] > 0
    assert (kept[long[0]].prompt, kept[long[0]].label_a) == ("", None)
    skipping, every_row = read(tmp_path, on_error="skip", max_prompt_chars=limit), read(tmp_path, on_error="skip")
    short = [row for row, text in enumerate(every_row.prompts()) if len(text) <= limit]
    assert skipping.pair_ids() == [every_row.pair_ids()[row] for row in short]
    assert skipping.skipped["prompt too long"] > 0
    assert skipping[len(short) - 1] == every_row[short[-1]]
    np.testing.assert_array_equal(skipping.labels(), every_row.labels()[short])


@pytest.mark.parametrize(
    "kind", [HPDv2Reader, ImageRewardDBReader, PickAPicReader, JSONLPairReader, GenAIBenchCMUReader]
)
def test_forwarded_settings_are_known_to_the_command_line(kind: type[PairReader]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "reader")
    given = {name: "x" for name in ("file", "root", "source", "split") if f"reader.{name}" in parser.get_defaults()}
    settings = parser.parse_object({"reader": {**given, "on_error": "skip", "max_prompt_chars": 7}}).reader
    assert (settings.on_error, settings.max_prompt_chars) == ("skip", 7)
    with pytest.raises(ArgumentError, match="on_eror"):
        parser.parse_object({"reader": {**given, "on_eror": "skip"}})


def test_the_limit_is_a_setting_and_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path)
    with pytest.raises(
        InputError, match=r"pairs.jsonl:2: prompt has 33 characters, more than max_prompt_chars=20; cor"
    ):
        JSONLPairReader(str(file), max_prompt_chars=20)
    with pytest.raises(InputError, match="max_prompt_chars is 0; it must be at least 1"):
        JSONLPairReader(str(file), max_prompt_chars=0)
    file.write_text(
        json.dumps({"prompt": "x" * 10_001, "chosen": "a.jpg", "rejected": "b.jpg"}) + "\n" + file.read_text()
    )
    assert len(JSONLPairReader(str(file), on_error="skip")) == 3


@pytest.mark.parametrize("votes", [[2**63, 0], [1, 10**9 + 1], ["1e400", 1]])
def test_absurd_votes_do_not_kill_a_data_set(votes: list[Any], tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a.jpg", "rejected": "b.jpg", "votes": counts} for counts in ([3, 1], votes)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = JSONLPairReader(str(file), on_error="skip", randomise_sides=False)
    if votes == ["1e400", 1]:  # no number: as any other votes that cannot be read
        assert (len(reader), reader[1].votes, reader.remarks) == (2, None, Counter({"votes not readable": 1}))
        return
    assert (len(reader), reader[0].votes, reader.skipped) == (1, (3, 1), Counter({"too many votes": 1}))
    kept = JSONLPairReader(str(file), on_error="placeholder")
    assert (len(kept), kept[1].votes, kept[1].label_a) == (2, None, None)
    with pytest.raises(
        InputError, match=r"pairs.jsonl:2: votes is \[.*more than 1000000000 for an image; correct the row"
    ):
        JSONLPairReader(str(file))


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_long_prompt_of_a_prompt_file_is_one_line(name: str, tmp_path: Path) -> None:
    text = "x" * 10_001
    (tmp_path / "p.txt").write_text(f"a cat\n{text}\n")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text}))
    (tmp_path / "p.csv").write_text(f"prompt\n{text}\n")
    with pytest.raises(
        InputError, match=r"holds a prompt of 10001 characters, more than max_prompt_chars=10000: 'xx.*xx\.\.\.;"
    ):
        read_prompts(str(tmp_path / name))
    assert text in read_prompts(str(tmp_path / name), max_prompt_chars=10_001)
    with pytest.raises(InputError, match="more than max_prompt_chars=10000"):
        PromptDataModule(str(tmp_path / name))
    with pytest.raises(SystemExit):
        main(
            [
                "generate",
                str(tmp_path / name),
                str(tmp_path / "out"),
                "--policy.source=sd_tiny",
                "--max_prompt_chars=9999",
            ]
        )


def test_inspect_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path)
    row = {"prompt": "p", "chosen": "a.jpg", "rejected": "b.jpg", "votes": [2**63, 1]}
    file.write_text(file.read_text() + json.dumps(row) + "\n" + json.dumps({**row, "prompt": "x" * 20_000}) + "\n")
    main(["inspect", str(file), "--limit=0"])
    printed = capsys.readouterr().out
    assert re.search(r"^too many votes +1$", printed, re.MULTILINE)
    assert re.search(r"^prompt too long +1$", printed, re.MULTILINE)
