"""``latentreward score``: tables of scores from folders and lists, resumed, refused, and with what cannot be read."""

import base64
import io
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from latentreward.apps.cli import main
from latentreward.core.contracts import Conditioning
from latentreward.diffusion import DiffusionBackbone
from latentreward.reward import Calibration, RewardModel, ScoringNoise
from latentreward.reward.scoring.image_lists import read_scores
from tests.alignment.rewards.stored import write_run
from tests.data.rotated import photograph, upright
from tests.data.test_images import png_header
from tests.marks import slow_after
from tests.processes import finish, start
from tests.tiny_pipelines import pipeline_folder


def jpeg(seed: int, width: int = 24, height: int = 16) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


def write_pictures(folder: Path, number: int) -> Path:
    """JPEGs of several sizes and shapes with their prompts beside them; every third prompt recurs."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(number):
        size = [(24, 16), (16, 24), (40, 40), (120, 30)][place % 4]
        (folder / f"{place:03d}.jpg").write_bytes(jpeg(place, *size))
        (folder / f"{place:03d}.txt").write_text(f"a picture of {place - place % 3} squares\n")
    return folder


@pytest.fixture(scope="module")
def lrm(tmp_path_factory: pytest.TempPathFactory) -> str:
    write_run(tmp_path_factory.mktemp("lrm"), "lrm", "sd15")
    return str(tmp_path_factory.getbasetemp() / "lrm0")


@pytest.fixture(scope="module")
def dina(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that takes several aspects, and scores at noise levels."""
    write_run(tmp_path_factory.mktemp("dina"), "dina", "sd35")
    return str(tmp_path_factory.getbasetemp() / "dina0")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def score(images: str, output: str, model: str, *options: str) -> pa.Table:
    main(["score", images, output, f"--model={model}", "--device=cpu", *options])
    return read_scores(Path(output))


def refusal(capsys: pytest.CaptureFixture[str], images: str, output: str, model: str, *options: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        score(images, output, model, *options)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("latentreward: error: ")
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", slow_after(1, ["csv", "parquet"]))
def test_scores_are_the_model_s_own(here: Path, dina: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = write_pictures(here / "pics", 13)
    table = score("pics", f"out/scores.{suffix}", dina, "--batch_size=3", "--flush_every=6")
    assert table.column_names == ["image", "prompt", "score", "z_score", "quantile", "width", "height", "problem"]
    files = sorted(pictures.glob("*.jpg"))
    assert table["image"].to_pylist() == [file.name for file in files]
    prompts = [file.with_suffix(".txt").read_text().removesuffix("\n") for file in files]
    assert table["prompt"].to_pylist() == prompts
    model = RewardModel.from_pretrained(dina)
    torch.testing.assert_close(torch.tensor(table["score"].to_pylist()), model.score(prompts, files), rtol=0, atol=2e-5)
    assert table["width"].to_pylist()[:4] == [24, 16, 40, 120]
    assert table["height"].to_pylist()[:4] == [16, 24, 40, 30]
    assert {*table["problem"].to_pylist(), *table["z_score"].to_pylist(), *table["quantile"].to_pylist()} == {None}
    printed = capsys.readouterr().out
    assert "13 of 13 images have a score" in printed
    assert printed.count("model loaded in") == 1
    assert "scored before" not in printed
    assert "13 images scored in" in printed
    assert sorted(path.name for path in (here / "out").iterdir()) == [f"scores.{suffix}", f"scores.{suffix}.json"]


@pytest.mark.slow
def test_levels_seeds_and_the_score_at_each_level(here: Path, dina: str) -> None:
    write_pictures(here / "pics", 3)
    table = score("pics", "s.parquet", dina, "--noise.sigmas=[0.2,0.7]", "--noise.seeds=[0,1]", "--each_level=true")
    assert table.column_names[2:5] == ["score", "score_sigma_0.2", "score_sigma_0.7"]
    model, files = RewardModel.from_pretrained(dina), [f"pics/00{place}.jpg" for place in range(3)]
    for name, sigmas in (("score", (0.2, 0.7)), ("score_sigma_0.2", (0.2,)), ("score_sigma_0.7", (0.7,))):
        expected = model.score(table["prompt"].to_pylist(), files, noise=ScoringNoise(sigmas, seeds=(0, 1)))
        torch.testing.assert_close(torch.tensor(table[name].to_pylist()), expected, rtol=0, atol=2e-5)
    only_seeds = score("pics", "t.parquet", dina, "--noise.seeds=[5]")
    noise = ScoringNoise(model.noise.sigmas, seeds=(5,))
    expected = model.score(table["prompt"].to_pylist(), files, noise=noise)
    torch.testing.assert_close(torch.tensor(only_seeds["score"].to_pylist()), expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_calibrated_model(here: Path, dina: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(here / "pics", 4)
    model = RewardModel.from_pretrained(dina)
    reference = torch.randn(100, generator=torch.Generator().manual_seed(0))
    model.calibration = Calibration.fit(reference, "a reference set", model.noise)
    model.save_pretrained("model", base=pipeline_folder("sd35"))
    table = score("pics", "s.csv", "model")
    scores = torch.tensor(table["score"].to_pylist())
    torch.testing.assert_close(torch.tensor(table["z_score"].to_pylist()), model.calibration.z_score(scores))
    torch.testing.assert_close(torch.tensor(table["quantile"].to_pylist()), model.calibration.quantile(scores))
    capsys.readouterr()
    table = score("pics", "t.csv", "model", "--noise.sigmas=[0.9]")
    assert table["z_score"].null_count == 4
    assert "the model is calibrated at sigma 0.4, not at sigma 0.9" in capsys.readouterr().out


UNREADABLE = {
    "empty.jpg": (b"", "empty image"),
    "garbage.png": (b"garbage, not an image", "unknown image format"),
    "header.jpg": (b"\xff\xd8\xff\xe0", "unknown image format"),
    "huge.png": (png_header(60000, 60000), "too many pixels"),
    "page.gif": (b"<html><body>404</body></html>", "unknown image format"),
    "truncated.jpg": (jpeg(1, 64, 64)[:-300], "truncated or damaged image"),
}


def write_unreadable(folder: Path) -> None:
    for name, (data, _) in UNREADABLE.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("unreadable")
    (folder / "broken link.png").symlink_to("nowhere.png")
    (folder / "broken link.txt").write_text("a link")
    (folder / "no prompt.png").write_bytes(jpeg(0))
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("would block for ever")


def test_what_cannot_be_read_is_recorded_and_counted(here: Path, lrm: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_unreadable(write_pictures(here / "pics", 5))
    table = score("pics", "s.csv", lrm, "--batch_size=2")
    rows = {row["image"]: row for row in table.to_pylist()}
    bad = {name: row["problem"].partition(" (")[0] for name, row in rows.items() if row["problem"]}
    assert bad == {
        **{name: problem for name, (_, problem) in UNREADABLE.items()},
        "broken link.png": "missing file",
        "no prompt.png": "no prompt",
        "pipe.png": "missing file",
    }
    for name, row in rows.items():
        assert (row["score"] is None) == (row["width"] is None) == (name in bad)
    printed = capsys.readouterr().out
    assert "5 of 14 images have a score" in printed
    assert "without a score: 3 unknown image format, 2 missing file, 1 empty image" in printed
    assert "'broken link.png', 'empty.jpg', 'garbage.png'" in printed
    assert "and 4 more" in printed
    alone = score("pics/00*.jpg", "alone.csv", lrm, "--batch_size=2")
    readable = [row["score"] for name, row in rows.items() if name not in bad]
    np.testing.assert_allclose(readable, alone["score"].to_pylist(), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_after_sigkill_it_goes_on_to_the_same_bits(here: Path, dina: str) -> None:
    write_unreadable(write_pictures(here / "pics", 120))
    options = [f"--model={dina}", "--device=cpu", "--batch_size=4", "--flush_every=8", "--noise.seeds=[0,1,2]"]
    done = finish(["score", "pics", "whole.csv", *options])
    assert "120 of 129" in done.stdout, done.stderr
    kills = 0
    for wanted in (2, 7):
        process = start(["score", "pics", "killed.csv", *options])
        while len(list(here.glob("killed.csv.parts/rows_*.parquet"))) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    left = len(list(here.glob("killed.csv.parts/rows_*.parquet")))
    assert 7 <= left < 17
    assert not (here / "killed.csv").exists()
    process = start(["score", "pics", "killed.csv", *options])
    assert process.wait(120) == 0, process.stderr
    assert (here / "killed.csv").read_bytes() == (here / "whole.csv").read_bytes()
    assert not (here / "killed.csv.parts").exists()


def test_another_run_s_output_is_refused(here: Path, lrm: str, dina: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(here / "pics", 3)
    score("pics", "s.csv", lrm)
    table = (here / "s.csv").read_bytes()
    assert 'was begun with model "lrm0", now it is "dina0"; choose' in refusal(capsys, "pics", "s.csv", dina)
    assert "was begun with noise.timesteps [], now it is [5.0]; choose" in refusal(
        capsys, "pics", "s.csv", lrm, "--noise.timesteps=[5]"
    )
    assert 'was begun with dtype "float32"' in refusal(capsys, "pics", "s.csv", lrm, "--dtype=bfloat16")
    assert "was begun with images " in refusal(capsys, "pics", "s.csv", lrm, "--prompt=another")
    (here / "pics" / "001.jpg").write_bytes(jpeg(99))
    assert "choose another output, or delete s.csv and s.csv.json" in refusal(capsys, "pics", "s.csv", lrm)
    assert (here / "s.csv").read_bytes() == table


def test_a_complete_table_is_not_made_again(
    here: Path, lrm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(here / "pics", 3)
    score("pics", "s.csv", lrm)
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_, **__: pytest.fail("loads a model"))
    capsys.readouterr()
    score("pics", "s.csv", lrm, "--gallery=page/g.html", "--batch_size=5")
    printed = capsys.readouterr().out
    assert "s.csv is complete already: 3 images" in printed
    assert "page of 3 images written in" in printed
    assert "scored in" not in printed
    (here / "s.csv").write_text((here / "s.csv").read_text() + "one,field,too,many,,,,,,\n")
    assert "s.csv is damaged" in refusal(capsys, "pics", "s.csv", lrm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere", "s.csv"], "'nowhere'"),
        (["pics", "s.txt"], "s.txt"),
        (["pics", "s.csv", "--gallery=page.pdf"], "page.pdf"),
        (["pics", "s.csv", "--batch_size=0"], "batch_size: 0"),
        (["pics", "s.csv", "--noise.sigmas=[1.5]"], "noise.sigmas holds 1.5"),
        (["pics", "s.csv", "--noise.timesteps=[5000]"], "5000"),
        (["pics", "taken.csv"], "taken.csv is there already"),
        (["pics", "taken.csv/s.csv"], "taken.csv"),
        (["gone", "s.csv"], "none of 2 in gone can be scored"),
    ],
)
def test_refused_before_a_model_is_loaded_or_scored(
    here: Path, lrm: str, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    write_pictures(here / "pics", 2)
    (here / "taken.csv").write_text("mine")
    (here / "gone").mkdir()
    (here / "gone" / "metadata.csv").write_text("file_name,prompt\na.png,x\nb.png,y\n")
    for name in "ab":
        (here / "gone" / f"{name}.png").symlink_to("nowhere")
    with pytest.raises(SystemExit) as stop:
        main(["score", *options, f"--model={lrm}"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (here / "s.csv").exists()


def overflowing(word: str) -> Callable[[DiffusionBackbone, list[str]], Conditioning]:
    """Encoding of prompts that is infinite for a batch with the given word."""
    own = DiffusionBackbone.encode_prompts

    def encode(backbone: DiffusionBackbone, prompts: list[str]) -> Conditioning:
        encoded = own(backbone, prompts)
        if not any(word in prompt for prompt in prompts):
            return encoded
        tokens, pooled = encoded.prompt_embeds, encoded.pooled_prompt_embeds
        return Conditioning(torch.full_like(tokens, torch.inf), torch.full_like(pooled, torch.inf))

    return encode


def test_an_image_without_a_finite_score_does_not_cost_the_others_theirs(
    here: Path, lrm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where bfloat16 overflows for one prompt."""
    write_pictures(here / "pics", 6)
    expected = score("pics", "expected.csv", lrm)["score"].to_pylist()
    (here / "pics" / "003.txt").write_text("overflows")
    monkeypatch.setattr(DiffusionBackbone, "encode_prompts", overflowing("overflows"))
    table = score("pics", "s.csv", lrm)
    assert [problem is not None for problem in table["problem"].to_pylist()] == [place == 3 for place in range(6)]
    assert table["problem"].to_pylist()[3].startswith("no finite score (")
    kept = [0, 1, 2, 4, 5]
    np.testing.assert_allclose(
        [table["score"].to_pylist()[place] for place in kept], [expected[place] for place in kept], rtol=1e-4
    )


def write_photographs(folder: Path) -> list[bytes]:
    """Three that lie on their side or stand on their head, and a picture without a tag."""
    folder.mkdir()
    data = [photograph(6, seed=0), photograph(3, seed=1), photograph(8, seed=2), jpeg(0, 48, 32)]
    for number, content in enumerate(data):
        (folder / f"{number}.jpg").write_bytes(content)
    return data


def tall_thumbnails(page: str) -> int:
    """Pictures on a page that are higher than wide."""
    texts = re.findall(r"data:image/[a-z]+;base64,([^\"']+)", Path(page).read_text())
    sizes = [Image.open(io.BytesIO(base64.b64decode(text))).size for text in texts]
    assert len(sizes) == 4
    return sum(height > width for width, height in sizes)


@pytest.mark.slow
def test_photographs_are_turned_as_in_training_or_as_told(
    here: Path, lrm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_photographs(here / "pics")
    model = RewardModel.from_pretrained(lrm)
    assert model.exif == "ignore"  # its checkpoint is like those of earlier versions
    stored = [Image.fromarray(np.array(Image.open(io.BytesIO(content)))) for content in data]
    table = score("pics", "as_trained.csv", lrm, "--prompt=a cat", "--gallery=as_trained.html")
    torch.testing.assert_close(
        torch.tensor(table["score"].to_pylist()), model.score("a cat", stored), rtol=0, atol=2e-5
    )
    told = "3 images have an EXIF orientation, which this model ignores: --exif apply turns them"
    assert told in capsys.readouterr().out
    table = score("pics", "told.csv", lrm, "--prompt=a cat", "--exif=apply", "--gallery=told.html")
    seen = model.score("a cat", [upright(content) for content in data])
    torch.testing.assert_close(torch.tensor(table["score"].to_pylist()), seen, rtol=0, atol=2e-5)
    assert list(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))[:2] == [(48, 32), (32, 48)]
    assert "3 images turned upright by their EXIF orientation" in capsys.readouterr().out
    assert tall_thumbnails("as_trained.html") == 0
    assert tall_thumbnails("told.html") == 2
    score("pics", "as_trained.csv", lrm, "--prompt=a cat", "--gallery=again.html")  # the table is there already
    assert tall_thumbnails("again.html") == 0
    assert "was begun with exif" in refusal(capsys, "pics", "told.csv", lrm, "--prompt=a cat")
