"""score-pairs from YAML to a table that FilteredReader takes, also after SIGKILL."""

import io
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from latentreward.apps.cli import main
from latentreward.data import PickAPicReader, ScoreTable
from latentreward.reward import CLIPScorer
from tests.data.conftest import SCHEMA, pickapic_row
from tests.processes import kill_after_parts
from tests.reward.scorers.tiny_clip import write_aesthetic, write_clip

PAIRS = 24
MY_SCORER = """
import os, time
import numpy as np, torch

def brightness(prompts, images):
    with open("calls.txt", "a") as file:
        file.writelines(f"{prompt}\\n" for prompt in prompts)
    time.sleep(float(os.environ.get("SECONDS_PER_CALL", "0")))
    return torch.tensor([float(np.asarray(image).mean()) for image in images])
"""


def noise(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 20 + seed % 9, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def rows() -> list[dict[str, Any]]:
    """Pairs in which images recur: the one of pair 3 n is also in pair 3 n + 1, for the same prompt."""
    made = []
    for number in range(PAIRS):
        row = pickapic_row(number, jpg_0=noise(2 * number), jpg_1=noise(2 * number + 1))
        if number % 3 == 1:
            row |= {
                "caption": f"prompt {number - 1}",
                "image_0_uid": f"image-{number - 1}-0",
                "jpg_0": noise(2 * number - 2),
            }
        made.append(row)
    made[5] |= {"label_0": 0.5, "label_1": 0.5}
    made[6] |= {"label_0": None, "label_1": None}
    made[8]["jpg_1"] = b"no image"
    made[9]["jpg_0"] = noise(18)[:-200]  # its copy in pair 10 is whole
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, models, and ``score.yaml`` that names them."""
    root = tmp_path_factory.mktemp("score_pairs")
    (root / "data").mkdir()
    table = pa.Table.from_pylist(rows(), schema=SCHEMA)
    pq.write_table(table, root / "data" / "train-00000-of-00001-0123456789abcdef.parquet", row_group_size=5)
    clip = write_clip(root / "clip")
    weights = write_aesthetic(root / "linearMSE.pth")
    (root / "vqa.csv").write_text("image_key,vqascore\nimage-2-0,0.25\nimage-2-1,0.5\n")
    reader = {"class_path": "PickAPicReader", "init_args": {"source": str(root), "split": "train"}}
    device = {"device": "cpu"}
    scorers = [
        {"class_path": "CLIPScorer", "init_args": {"source": clip, "batch_size": 4, **device}},
        {"class_path": "AestheticScorer", "init_args": {"weights": weights, "source": clip, **device}},
        {"class_path": "latentreward.reward.PickScorer", "init_args": {"source": clip, "processor": clip, **device}},
        {"class_path": "TableColumn", "init_args": {"path": str(root / "vqa.csv"), "column": "vqascore"}},
        {
            "class_path": "CallableScorer",
            "init_args": {"function": "my_scorer.brightness", "name": "bright", "batch_size": 8},
        },
    ]
    (root / "score.yaml").write_text(yaml.safe_dump({"reader": reader, "scorers": scorers}))
    (root / "my_scorer.py").write_text(MY_SCORER)
    return root


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the user's module in it, as the current one."""
    (tmp_path / "my_scorer.py").write_text(MY_SCORER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_scorer", raising=False)
    return tmp_path


def score(folder: Path, output: str, *options: str) -> None:
    main(["score-pairs", output, f"--config={folder}/score.yaml", *options])


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, output: str, *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        score(folder, output, *options)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latentreward: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("call", [1, 10])
def test_ctrl_c_keeps_the_parts_that_are_scored(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    score(folder, "whole.parquet")
    own, calls = CLIPScorer.score, []

    def interrupted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CLIPScorer, "score", interrupted)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            score(folder, "scores.parquet", "--flush_every=2")
    assert stop.value.code == 130
    kept = sum(pq.read_table(file).num_rows for file in Path("scores.parquet.parts").glob("rows_*"))
    line = f"{kept} of {PAIRS} rows are kept in scores.parquet.parts: the same command goes on there\n"
    assert capsys.readouterr().err == f"latentreward: stopped by Ctrl-C; {line}"
    assert kept == 0 if call == 1 else 0 < kept < PAIRS
    score(folder, "scores.parquet")
    whole, resumed = pq.read_table("whole.parquet"), pq.read_table("scores.parquet")
    assert f"{PAIRS - kept} of them scored now" in capsys.readouterr().out
    for name in whole.column_names:
        if whole.schema.field(name).type == pa.float64():
            columns = (table.column(name).to_numpy(zero_copy_only=False) for table in (whole, resumed))
            np.testing.assert_allclose(*columns, rtol=1e-4)
        else:
            assert whole.column(name).equals(resumed.column(name)), name


def test_table_of_scores(folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(folder, "scores.parquet", "--flush_every=7")
    printed = capsys.readouterr()
    table = pq.read_table("scores.parquet")
    reader = PickAPicReader(str(folder), "train")
    assert table.column("pair_id").to_pylist() == reader.pair_ids()
    assert table.column("different_flag").to_pylist() == [{5: 0, 6: None}.get(row, 1) for row in range(PAIRS)]

    columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
    for side, bad in (("a", 9), ("b", 8)):
        assert np.flatnonzero(np.isnan(columns[f"clipscore_{side}"])).tolist() == [bad]
        problems = table.column(f"problem_{side}").to_pylist()
        assert problems[bad] == {"a": "truncated or damaged image", "b": "unknown image format"}[side]
        assert sum(problem is not None for problem in problems) == 1
    labels = reader.labels()
    for name in ("clipscore", "aesthetic", "pickscore", "bright"):
        first, second, gap = (columns[f"{name}{ending}"] for ending in ("_a", "_b", "_gap"))
        winner = np.where(labels == 1, first - second, second - first)
        winner[5] = abs(winner[5])
        winner[6] = np.nan
        np.testing.assert_array_equal(gap, winner)
    assert columns["vqascore_a"][2] == 0.25
    assert np.isnan(columns["vqascore_gap"]).sum() == PAIRS - 1

    pair = reader[3]
    images = [Image.open(io.BytesIO(image.data)).convert("RGB") for image in (pair.image_a, pair.image_b)]
    expected = CLIPScorer(f"{folder}/clip", device="cpu")([pair.prompt] * 2, images).tolist()
    assert [columns["clipscore_a"][3], columns["clipscore_b"][3]] == pytest.approx(expected, abs=1e-5)

    assert "1 unknown image format" in printed.out
    assert "1 truncated or damaged image" in printed.out
    assert f"{PAIRS - 1} vqascore" in printed.out


def test_another_reader_or_scorer_is_refused(folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(folder, "scores.parquet")
    line = refusal(capsys, folder, "scores.parquet", "--reader.init_args.drop_identical=true", "--scorers=[]")
    assert "scorers are none" in line
    line = refusal(capsys, folder, "scores.parquet", "--max_pixels=1000000")
    assert "was begun with max_pixels 67108864, now it is 1000000" in line
    only = '[{"class_path":"CallableScorer","init_args":{"function":"my_scorer.brightness","name":"bright"}}]'
    assert "was begun with scorers" in refusal(capsys, folder, "scores.parquet", f"--scorers={only}")


def test_shipped_config(folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_L_PATH", f"{folder}/clip")
    monkeypatch.setenv("AESTHETIC_WEIGHTS", f"{folder}/linearMSE.pth")
    monkeypatch.setenv("VQA_SCORES", f"{folder}/vqa.csv")
    reader = ["--reader=PickAPicReader", f"--reader.source={folder}", "--reader.split=train"]
    main(["score-pairs", "scores.parquet", "--config=configs/scorers/mpcf.yaml", *reader])
    assert ScoreTable("scores.parquet").scorers == ("aesthetic", "clipscore", "vqascore")


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(folder: Path, here: Path) -> None:
    """SIGKILL of a real process between two parts; what it had flushed is not scored again, and nothing is lost."""
    score(folder, "expected.parquet", "--flush_every=4")
    everything = len(Path("calls.txt").read_text().splitlines())
    Path("calls.txt").unlink()

    options = [f"--config={folder}/score.yaml", "--flush_every=4"]
    parts = Path("scores.parquet.parts")
    slow = {"SECONDS_PER_CALL": "0.5"}
    kill_after_parts(["score-pairs", "scores.parquet", *options], parts, environment=slow)
    assert not Path("scores.parquet").exists()
    kept = 4 * len(list(parts.glob("rows_*.parquet")))
    assert 8 <= kept < PAIRS
    before = len(Path("calls.txt").read_text().splitlines())

    score(folder, "scores.parquet", "--flush_every=4")
    again = before + everything - len(Path("calls.txt").read_text().splitlines())
    assert Path("scores.parquet").read_bytes() == Path("expected.parquet").read_bytes()
    assert not parts.exists()
    assert again >= -8  # at most the images of one flush were scored twice
